// Pruning on the CPU: mark and count, then fill (methods.md D, Marching).
// Twin: sdi_fast/reference/prune.py.
//
// One thread takes a ray (math/prune.h). Precision: T per sample, double for the sum of optical
// depths. Per sample: 3 numbers read, a byte written; per kept one 8 bytes and 2 numbers written.
#include "../math/prune.h"

#include "dispatch.h"
#include "parallel.h"
#include "ranges.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
int launch_prune_count(const PruneArgs<T>& a, int n_threads) {
  if (!ranges_fit(a.packed_info, a.n_rays, a.n)) return kBadArgument;
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(dynamic, 256)
  for (int64_t ray = 0; ray < a.n_rays; ++ray) {
    a.counts[ray] = prune_ray(a, a.packed_info[2 * ray], a.packed_info[2 * ray + 1]);
  }
  return kOk;
}

template <class T>
int launch_prune_fill(const PruneArgs<T>& a, int n_threads) {
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(dynamic, 256)
  for (int64_t ray = 0; ray < a.n_rays; ++ray) {
    copy_kept(a, ray, a.packed_info[2 * ray], a.packed_info[2 * ray + 1]);
  }
  return kOk;
}

SDI_INSTANTIATE(prune_count, PruneArgs)
SDI_INSTANTIATE(prune_fill, PruneArgs)

}  // namespace SDI_ISA
}  // namespace sdi
