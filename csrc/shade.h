// Launch API of shading. Twin: sdi_fast/reference/shade.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

enum Shading : int32_t { kAlbedo = 0, kTextureless = 1, kDiffuse = 2 };

// A view index outside [0, n_views) is refused on the CPU; on the GPU the sample's light is NaN,
// and so is whatever depends on it.
template <class T>
struct ShadeArgs {
  const T* albedo;              // [n, 3]
  const T* normal;              // [n, 3], unit length
  const T* x_world;             // [n, 3], scene units
  const T* light_positions;     // [n_views, 3], scene units
  const int64_t* view_indices;  // [n], in [0, n_views)
  T* rgb;                       // [n, 3]; forward only
  const T* grad_rgb;            // [n, 3]; backward only
  T* grad_albedo;               // [n, 3]; backward only
  T* grad_normal;               // [n, 3]; backward only
  int64_t n;
  int64_t n_views;
  int32_t shading;  // Shading
};

}  // namespace sdi
