// Launch API of compositing. Twin: sdi_fast/reference/composite.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

// A row of packed_info that leaves [0, n) is refused on the CPU; on the GPU, where finding out
// would take a synchronisation, it counts as empty.
template <class T>
struct CompositeFwdArgs {
  const T* density;            // [n], 1/scene unit
  const T* rgb;                // [n, 3]
  const T* normal;             // [n, 3]
  const T* t_starts;           // [n]
  const T* t_ends;             // [n]
  const int64_t* packed_info;  // [n_rays, 2]
  const T* directions;         // [n_rays, 3]
  T* rgb_sum;                  // [n_rays, 3]
  T* opacity;                  // [n_rays]
  T* depth;                    // [n_rays], scene units
  T* normal_sum;               // [n_rays, 3]
  T* z_variance;               // [n_rays], scene units^2
  T* orient;                   // [n_rays]
  T* weights;                  // [n]; zero outside the rays' ranges is the caller's business
  int64_t n;
  int64_t n_rays;
};

template <class T>
struct CompositeBwdArgs {
  const T* density;            // [n]
  const T* rgb;                // [n, 3]
  const T* normal;             // [n, 3]
  const T* t_starts;           // [n]
  const T* t_ends;             // [n]
  const int64_t* packed_info;  // [n_rays, 2]
  const T* directions;         // [n_rays, 3]
  const T* weights;            // [n], from the forward
  const T* opacity;            // [n_rays], from the forward
  const T* depth;              // [n_rays], from the forward
  const T* z_variance;         // [n_rays], from the forward
  const T* grad_rgb_sum;       // [n_rays, 3]
  const T* grad_opacity;       // [n_rays]
  const T* grad_depth;         // [n_rays]
  const T* grad_normal_sum;    // [n_rays, 3]
  const T* grad_z_variance;    // [n_rays]
  const T* grad_orient;        // [n_rays]
  T* grad_density;             // [n]; as weights outside the rays' ranges, and so are the next two
  T* grad_rgb;                 // [n, 3]
  T* grad_normal;              // [n, 3]
  int64_t n;
  int64_t n_rays;
};

}  // namespace sdi
