// Compositing along one ray (methods.md D, Compositing).
//
// alpha = 1 - exp(-sigma dt), T = exp(-sum of sigma dt before), w = T alpha.
// rgb = sum w c, opacity O = sum w, depth = sum w t, normal_sum = sum w n,
// z_variance = [O > .5] sum w' (t - zbar)^2 with w' = w / max(O, 1e-5),
// orient = sum sg(w) max(0, n . d)^2.
//
// Backward, with G_k = d loss / d w_k: d loss / d sigma_k = dt (T_{k+1} G_k - sum_{j>k} w_j G_j).
// Where O > .5 the weights w' sum to one, so that d z_variance / d w_k = ((t_k - zbar)^2 - zvar) /
// O. The running sums are in double whatever T is: a ray has hundreds of samples.
#pragma once

#include "../composite.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

constexpr double kMinOpacity = 0.5;
constexpr double kWeightFloor = 1e-5;

template <class T>
SDI_HD void composite_ray(const CompositeFwdArgs<T>& a, int64_t ray, int64_t first, int64_t count) {
  double before = 0, opacity = 0, depth = 0, orient = 0, rgb[3] = {0, 0, 0}, normal[3] = {0, 0, 0};
  const T* d = a.directions + 3 * ray;
  for (int64_t k = first; k < first + count; ++k) {
    const T optical = a.density[k] * (a.t_ends[k] - a.t_starts[k]);
    const T weight = exp_of(static_cast<T>(-before)) * -expm1_of(-optical);
    before += optical;
    a.weights[k] = weight;
    opacity += weight;
    depth += weight * (T(0.5) * (a.t_starts[k] + a.t_ends[k]));
    const T* n = a.normal + 3 * k;
    const T facing = n[0] * d[0] + n[1] * d[1] + n[2] * d[2];
    const T away = facing < T(0) ? T(0) : facing;
    orient += weight * (away * away);
    for (int c = 0; c < 3; ++c) {
      rgb[c] += weight * a.rgb[3 * k + c];
      normal[c] += weight * n[c];
    }
  }
  double variance = 0;
  if (opacity > kMinOpacity) {
    const double centre = depth / opacity;
    for (int64_t k = first; k < first + count; ++k) {
      const double off = T(0.5) * (a.t_starts[k] + a.t_ends[k]) - centre;
      variance += a.weights[k] * (off * off);
    }
    variance /= opacity;
  }
  a.opacity[ray] = static_cast<T>(opacity);
  a.depth[ray] = static_cast<T>(depth);
  a.orient[ray] = static_cast<T>(orient);
  a.z_variance[ray] = static_cast<T>(variance);
  for (int c = 0; c < 3; ++c) {
    a.rgb_sum[3 * ray + c] = static_cast<T>(rgb[c]);
    a.normal_sum[3 * ray + c] = static_cast<T>(normal[c]);
  }
}

// Cotangent of w_k.
template <class T>
SDI_HD T weight_cotangent(const CompositeBwdArgs<T>& a, int64_t ray, int64_t k, T centre) {
  const T middle = T(0.5) * (a.t_starts[k] + a.t_ends[k]);
  T g = a.grad_opacity[ray] + a.grad_depth[ray] * middle;
  for (int c = 0; c < 3; ++c) {
    g += a.grad_rgb_sum[3 * ray + c] * a.rgb[3 * k + c];
    g += a.grad_normal_sum[3 * ray + c] * a.normal[3 * k + c];
  }
  const T opacity = a.opacity[ray];
  if (opacity > T(kMinOpacity)) {
    const T off = middle - centre;
    g += a.grad_z_variance[ray] * (off * off - a.z_variance[ray]) / opacity;
  }
  return g;
}

template <class T>
SDI_HD void composite_ray_backward(const CompositeBwdArgs<T>& a, int64_t ray, int64_t first,
                                   int64_t count) {
  const T* d = a.directions + 3 * ray;
  const T opacity = a.opacity[ray];
  const T centre = opacity > T(kMinOpacity) ? a.depth[ray] / opacity : T(0);
  double optical_sum = 0, behind = 0;  // up to and with sample k; sum of w_j G_j over j > k
  for (int64_t k = first; k < first + count; ++k) {
    optical_sum += a.density[k] * (a.t_ends[k] - a.t_starts[k]);
  }
  for (int64_t k = first + count - 1; k >= first; --k) {
    const T step = a.t_ends[k] - a.t_starts[k];
    const T weight = a.weights[k];
    const T g = weight_cotangent(a, ray, k, centre);
    const T after = exp_of(static_cast<T>(-optical_sum));
    a.grad_density[k] = step * static_cast<T>(after * g - behind);
    optical_sum -= a.density[k] * step;
    behind += weight * g;
    const T* n = a.normal + 3 * k;
    const T facing = n[0] * d[0] + n[1] * d[1] + n[2] * d[2];
    const T orient = facing > T(0) ? T(2) * a.grad_orient[ray] * weight * facing : T(0);
    for (int c = 0; c < 3; ++c) {
      a.grad_rgb[3 * k + c] = weight * a.grad_rgb_sum[3 * ray + c];
      a.grad_normal[3 * k + c] = weight * a.grad_normal_sum[3 * ray + c] + orient * d[c];
    }
  }
}

}  // namespace SDI_ISA
}  // namespace sdi
