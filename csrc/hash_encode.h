// Launch API of the hash encoding. Twin: sdi_fast/reference/hash_encode.py.
#pragma once

#include "grid_spec.h"
#include "status.h"

namespace sdi {

template <class T>
struct HashEncodeFwdArgs {
  const T* x;             // [n, 3], in [0, 1]
  const T* table;         // [n_params]
  T* features;            // [n, L * F]; levels >= active_levels are zeroed
  int64_t n;              // samples
  int32_t active_levels;  // 0 to L
  GridSpec grid;
};

template <class T>
struct HashEncodeBwdArgs {
  const T* x;              // [n, 3], in [0, 1]
  const T* table;          // [n_params]; read for grad_x
  const T* grad_features;  // [n, L * F]
  T* grad_table;           // [n_params], zeroed by the caller; may be null
  T* grad_x;               // [n, 3]; may be null
  int64_t n;
  int32_t active_levels;
  GridSpec grid;
};

}  // namespace sdi
