// Pruning one ray (methods.md D, Marching): keep a sample while T >= eps if alpha >= threshold.
//
// alpha = 1 - exp(-sigma dt), T = exp(-sum of sigma dt before), over all samples given. The optical
// depths are rounded one by one (mul_exact, add_exact) and summed in double, as the twin does.
#pragma once

#include "../march.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

// Marks what is kept of the samples [first, first + count), whose marks are 0; returns how many.
template <class T>
SDI_HD int64_t prune_ray(const PruneArgs<T>& a, int64_t first, int64_t count) {
  const T eps = static_cast<T>(a.early_stop_eps), threshold = static_cast<T>(a.alpha_threshold);
  double before = 0;
  int64_t kept = 0;
  for (int64_t k = first; k < first + count; ++k) {
    const T optical = mul_exact(a.density[k], a.t_ends[k] - a.t_starts[k]);
    const T transmittance = exp_of(static_cast<T>(-before));
    if (transmittance < eps) break;  // it only falls from here; NaN is not below, nor kept
    a.keep[k] = transmittance >= eps && -expm1_of(-optical) >= threshold;
    kept += a.keep[k];
    before = add_exact(before, static_cast<double>(optical));
  }
  return kept;
}

// Copies what is kept of the samples [first, first + count) to the ray's place in the results.
template <class T>
SDI_HD void copy_kept(const PruneArgs<T>& a, int64_t ray, int64_t first, int64_t count) {
  int64_t at = a.first_sample[ray];
  const int64_t stop = at + a.counts[ray];
  for (int64_t k = first; k < first + count && at < stop; ++k) {
    if (!a.keep[k]) continue;
    a.ray_indices_out[at] = ray;
    a.t_starts_out[at] = a.t_starts[k];
    a.t_ends_out[at] = a.t_ends[k];
    ++at;
  }
}

}  // namespace SDI_ISA
}  // namespace sdi
