// Launch API of Adam. Twin: sdi_fast/reference/adam.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

template <class T>
struct AdamArgs {
  T* param;                // [n], in place
  const T* grad;           // [n]
  T* exp_avg;              // [n], in place
  T* exp_avg_sq;           // [n], in place
  uint16_t* shadow;        // [n], param rounded to half precision (its bits), in place; or null
  const int64_t* step_at;  // [1], where the step is; null: `step`
  const double* lr_at;     // [1], where the learning rate is; null: `lr`
  const uint8_t* skip;     // [1], not 0: nothing is changed; or null
  int64_t n;
  int64_t step;  // 1-based
  double lr;
  double beta1;
  double beta2;
  double eps;
};

}  // namespace sdi
