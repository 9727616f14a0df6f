// Launch API of Adam. Twin: sdi_fast/reference/adam.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

template <class T>
struct AdamArgs {
  T* param;       // [n], in place
  const T* grad;  // [n]
  T* exp_avg;     // [n], in place
  T* exp_avg_sq;  // [n], in place
  int64_t n;
  int64_t step;  // 1-based
  double lr;
  double beta1;
  double beta2;
  double eps;
};

}  // namespace sdi
