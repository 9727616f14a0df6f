// Pruning on the CPU: mark and count, then fill (methods.md D, Marching).
// Twin: sdi_fast/reference/prune.py.
//
// One thread takes a ray: T = exp(-sum of sigma dt before), summed in double as the twin does, over
// all samples given. Precision: T per sample, double for the sum. Per sample: 3 numbers read, a
// byte written; per kept one 8 bytes and 2 numbers written.
#include "dispatch.h"
#include "parallel.h"
#include "ranges.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
int launch_prune_count(const PruneArgs<T>& a, int n_threads) {
  if (!ranges_fit(a.packed_info, a.n_rays, a.n)) return kBadArgument;
  for (int64_t k = 0; k < a.n; ++k) a.keep[k] = 0;
  const T eps = static_cast<T>(a.early_stop_eps), threshold = static_cast<T>(a.alpha_threshold);
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(dynamic, 256)
  for (int64_t ray = 0; ray < a.n_rays; ++ray) {
    const int64_t first = a.packed_info[2 * ray], count = a.packed_info[2 * ray + 1];
    double before = 0;
    int64_t kept = 0;
    for (int64_t k = first; k < first + count; ++k) {
      const T optical = a.density[k] * (a.t_ends[k] - a.t_starts[k]);
      const T transmittance = exp_of(static_cast<T>(-before));
      if (transmittance < eps) break;  // it only falls from here; NaN is not below, nor kept
      a.keep[k] = transmittance >= eps && -expm1_of(-optical) >= threshold;
      kept += a.keep[k];
      before += optical;
    }
    a.counts[ray] = kept;
  }
  return kOk;
}

template <class T>
int launch_prune_fill(const PruneArgs<T>& a, int n_threads) {
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(dynamic, 256)
  for (int64_t ray = 0; ray < a.n_rays; ++ray) {
    const int64_t first = a.packed_info[2 * ray], count = a.packed_info[2 * ray + 1];
    int64_t at = a.first_sample[ray];
    for (int64_t k = first; k < first + count; ++k) {
      if (!a.keep[k]) continue;
      a.ray_indices_out[at] = ray;
      a.t_starts_out[at] = a.t_starts[k];
      a.t_ends_out[at] = a.t_ends[k];
      ++at;
    }
  }
  return kOk;
}

SDI_INSTANTIATE(prune_count, PruneArgs)
SDI_INSTANTIATE(prune_fill, PruneArgs)

}  // namespace SDI_ISA
}  // namespace sdi
