// Shading of one sample by its view's point light (methods.md D, Shading).
#pragma once

#include "../shade.h"
#include "normal.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

constexpr double kAmbientLight = 0.1;
constexpr double kDiffuseLight = 0.9;

// Unit vector to the light, and n . l before the clamp.
template <class T>
SDI_HD T lambert(const T n[3], const T x[3], const T light[3], T to_light[3]) {
  for (int a = 0; a < 3; ++a) to_light[a] = light[a] - x[a];
  const T length =
      sqrt_of(to_light[0] * to_light[0] + to_light[1] * to_light[1] + to_light[2] * to_light[2]);
  const T floored = max_of(length, T(kNormalizeEps));
  for (int a = 0; a < 3; ++a) to_light[a] /= floored;
  return n[0] * to_light[0] + n[1] * to_light[1] + n[2] * to_light[2];
}

template <class T>
SDI_HD void shade_forward(int shading, const T albedo[3], const T n[3], const T x[3],
                          const T light[3], T rgb[3]) {
  T to_light[3];
  const T cosine = lambert(n, x, light, to_light);
  const T lit = T(kAmbientLight) + T(kDiffuseLight) * (cosine < T(0) ? T(0) : cosine);
  for (int c = 0; c < 3; ++c) {
    rgb[c] = shading == kAlbedo ? albedo[c] : shading == kTextureless ? lit : albedo[c] * lit;
  }
}

template <class T>
SDI_HD void shade_backward(int shading, const T albedo[3], const T n[3], const T x[3],
                           const T light[3], const T grad_rgb[3], T grad_albedo[3],
                           T grad_normal[3]) {
  T to_light[3];
  const T cosine = lambert(n, x, light, to_light);
  const T lit = T(kAmbientLight) + T(kDiffuseLight) * (cosine < T(0) ? T(0) : cosine);
  T grad_lit = T(0);
  for (int c = 0; c < 3; ++c) {
    grad_albedo[c] = shading == kAlbedo    ? grad_rgb[c]
                     : shading == kDiffuse ? grad_rgb[c] * lit
                                           : T(0);
    grad_lit += shading == kDiffuse ? grad_rgb[c] * albedo[c] : grad_rgb[c];
  }
  const bool is_lit = shading != kAlbedo && cosine >= T(0);  // clamp_min passes the gradient at 0
  for (int a = 0; a < 3; ++a) {
    grad_normal[a] = is_lit ? T(kDiffuseLight) * grad_lit * to_light[a] : T(0);
  }
}

}  // namespace SDI_ISA
}  // namespace sdi
