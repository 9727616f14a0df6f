// Density blob, unit normal and its backward (methods.md D; design.md, "The normal").
//
// g = d logit / d x_world, normal = -g / max(|g|, eps). Backward, with c the cotangent of normal:
// grad_g = -(c - n (n . c)) / |g|, or -c / eps below the floor.
#pragma once

#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

constexpr double kNormalizeEps = 1e-12;  // torch.nn.functional.normalize's
constexpr double kCentreEps = 1e-12;     // scene units; the blob's slope at the centre is 0

// blob_scale (1 - |x| / blob_std); adds its gradient to g
template <class R>
SDI_HD R add_blob(const R x[3], double blob_scale, double blob_std, R g[3]) {
  using T = ScalarOf<R>;
  const R distance = sqrt_of(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]);
  const R floored = distance < T(kCentreEps) ? R{} + T(kCentreEps) : distance;
  const R slope = T(-blob_scale / blob_std) / floored;
  for (int a = 0; a < 3; ++a) g[a] += slope * x[a];
  return T(blob_scale) * (T(1) - distance * T(1.0 / blob_std));
}

// Returns max(|g|, eps).
template <class R>
SDI_HD R normal_from_gradient(const R g[3], R normal[3]) {
  using T = ScalarOf<R>;
  const R length = sqrt_of(g[0] * g[0] + g[1] * g[1] + g[2] * g[2]);
  const R floored = length < T(kNormalizeEps) ? R{} + T(kNormalizeEps) : length;
  for (int a = 0; a < 3; ++a) normal[a] = -g[a] / floored;
  return floored;
}

template <class R>
SDI_HD void normal_backward(const R normal[3], R length, const R cotangent[3], R grad_g[3]) {
  using T = ScalarOf<R>;
  R along = normal[0] * cotangent[0] + normal[1] * cotangent[1] + normal[2] * cotangent[2];
  along = length > T(kNormalizeEps) ? along : R{};
  for (int a = 0; a < 3; ++a) grad_g[a] = (normal[a] * along - cotangent[a]) / length;
}

}  // namespace SDI_ISA
}  // namespace sdi
