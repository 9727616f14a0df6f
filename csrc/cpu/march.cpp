// Marching on the CPU: count, then fill (methods.md D, Marching). Twin:
// sdi_fast/reference/march.py.
//
// One thread walks a ray, cell by cell (math/march.h); both passes make the same decisions. Built
// without fused multiply-add, so that they are the twin's too. Bytes per sample: 24 written.
#include "../math/march.h"

#include "dispatch.h"
#include "parallel.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
int launch_march_count(const MarchArgs<T>& a, int n_threads) {
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(dynamic, 256)
  for (int64_t ray = 0; ray < a.n_rays; ++ray) {
    int64_t count = 0;
    walk_ray(make_walk(a, ray), [&count](int64_t) { ++count; });
    a.counts[ray] = count;
  }
  return kOk;
}

template <class T>
int launch_march_fill(const MarchArgs<T>& a, int n_threads) {
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(dynamic, 256)
  for (int64_t ray = 0; ray < a.n_rays; ++ray) {
    const RayWalk<T> walk = make_walk(a, ray);
    int64_t at = a.first_sample[ray];
    walk_ray(walk, [&](int64_t k) {
      a.ray_indices[at] = ray;
      a.t_starts[at] = walk.begin_of(k);
      a.t_ends[at] = walk.end_of(k);
      ++at;
    });
  }
  return kOk;
}

SDI_INSTANTIATE(march_count, MarchArgs)
SDI_INSTANTIATE(march_fill, MarchArgs)

}  // namespace SDI_ISA
}  // namespace sdi
