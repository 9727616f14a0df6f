// Launch API of the radiance field. Twin: sdi_fast/reference/field.py.
#pragma once

#include "grid_spec.h"
#include "status.h"

namespace sdi {

constexpr int kFieldMaxBlocks = 528;  // of the CUDA backward: rows of its workspace

struct FieldSpec {
  GridSpec grid;
  double radius;      // scene units
  double blob_scale;  // logits
  double blob_std;    // scene units
  int32_t hidden;
  int32_t active_levels;
};

template <class T>
struct FieldParams {
  const T* table;       // [n_params]
  const T* density_w1;  // [hidden, L * F]
  const T* density_w2;  // [1, hidden]
  const T* color_w1;    // [hidden, L * F]
  const T* color_w2;    // [3, hidden]
};

template <class T>
struct DensityArgs {
  const T* x_world;  // [n, 3], scene units
  FieldParams<T> params;
  T* density;  // [n], 1/scene unit
  int64_t n;
  FieldSpec spec;
};

template <class T>
struct FieldFwdArgs {
  const T* x_world;  // [n, 3], scene units
  FieldParams<T> params;
  T* density;  // [n], 1/scene unit
  T* albedo;   // [n, 3], in (0, 1)
  T* normal;   // [n, 3], unit length, world frame
  int64_t n;
  FieldSpec spec;
};

template <class T>
struct FieldBwdArgs {
  const T* x_world;  // [n, 3], scene units
  FieldParams<T> params;
  const T* grad_density;  // [n]
  const T* grad_albedo;   // [n, 3]
  const T* grad_normal;   // [n, 3]
  T* grad_table;          // [n_params], zeroed by the caller
  T* grad_density_w1;     // [hidden, L * F]
  T* grad_density_w2;     // [1, hidden]
  T* grad_color_w1;       // [hidden, L * F]
  T* grad_color_w2;       // [3, hidden]
  T* workspace;           // [kFieldMaxBlocks, hidden * (2 L F + 3)]; CUDA only
  int64_t n;
  FieldSpec spec;
};

}  // namespace sdi
