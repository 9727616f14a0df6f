// The losses on single rays (methods.md D, Losses): from a ray's opacity O, orient and z_variance.
//
// orient = sum orient / max(#{O > 0}, 1), sparsity = mean sqrt(O^2 + .01),
// opaque = mean entropy(c) with c = O clamped to [.001, .999] and
// entropy(c) = -(c log c + (1 - c) log(1 - c)), z_variance = sum z_variance / max(#{O > .5}, 1).
// Backward: the entropy's slope is log(1 - c) - log(c), and 0 where O lies outside the clamp; at
// its edges the gradient passes, as torch.clamp has it.
#pragma once

#include "../ray_losses.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

constexpr double kOpacityClamp = 1e-3;
constexpr double kSparsityEps = 0.01;
constexpr double kOpaqueFrom = 0.5;  // z_variance counts rays above it

SDI_HD float log_of(float x) { return logf(x); }
SDI_HD double log_of(double x) { return log(x); }

template <class T>
SDI_HD T clamp_opacity(T o) {  // NaN stays NaN
  const T low = static_cast<T>(kOpacityClamp), high = static_cast<T>(1.0 - kOpacityClamp);
  return o < low ? low : o > high ? high : o;
}

// Adds one ray to the sums, which are in double whatever T is.
template <class T>
SDI_HD void add_ray(T opacity, T orient, T z_variance, double sums[kRaySums]) {
  const T c = clamp_opacity(opacity);
  sums[0] += orient;
  sums[1] += sqrt_of(opacity * opacity + static_cast<T>(kSparsityEps));
  sums[2] -= c * log_of(c) + (T(1) - c) * log_of(T(1) - c);
  sums[3] += z_variance;
  sums[4] += opacity > T(0) ? 1.0 : 0.0;
  sums[5] += opacity > static_cast<T>(kOpaqueFrom) ? 1.0 : 0.0;
}

// Of no rays at all the two means are 0 / 0.
template <class T>
SDI_HD void finish_ray_losses(const double sums[kRaySums], int64_t n, T losses[kRayLosses],
                              double counts[2]) {
  for (int k = 0; k < 2; ++k) counts[k] = sums[4 + k] > 1.0 ? sums[4 + k] : 1.0;
  losses[0] = static_cast<T>(sums[0] / counts[0]);
  losses[1] = static_cast<T>(sums[1] / static_cast<double>(n));
  losses[2] = static_cast<T>(sums[2] / static_cast<double>(n));
  losses[3] = static_cast<T>(sums[3] / counts[1]);
}

// Gradients of the four losses, divided by what their sums are divided by.
template <class T>
struct RayLossScales {
  T orient, sparsity, opaque, z_variance;
};

template <class T>
SDI_HD RayLossScales<T> ray_loss_scales(const RayLossesArgs<T>& a) {
  const double n = static_cast<double>(a.n);
  return {static_cast<T>(a.grad_losses[0] / a.counts[0]), static_cast<T>(a.grad_losses[1] / n),
          static_cast<T>(a.grad_losses[2] / n), static_cast<T>(a.grad_losses[3] / a.counts[1])};
}

template <class T>
SDI_HD T opacity_gradient(const RayLossScales<T>& scales, T o) {
  const T root = sqrt_of(o * o + static_cast<T>(kSparsityEps));
  const T c = clamp_opacity(o);
  const T slope = c == o ? log_of(T(1) - c) - log_of(c) : T(0);
  return scales.sparsity * (o / root) + scales.opaque * slope;
}

}  // namespace SDI_ISA
}  // namespace sdi
