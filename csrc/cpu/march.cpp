// Marching on the CPU: count, then fill (methods.md D, Marching).
// Twin: sdi_fast/reference/march.py.
//
// One thread walks a ray, one lane a step (math/march.h); both passes make the same decisions.
// Built without fused multiply-add, so that they are the twin's too. Precision: T. Bytes per step:
// 1 read; per sample kept: 8 bytes and 2 numbers written.
#include "../math/march.h"

#include "dispatch.h"
#include "pack.h"
#include "parallel.h"

namespace sdi {
namespace SDI_ISA {
namespace {

// Calls emit(k) for every kept step of the ray, in order.
template <class T, class Emit>
void walk_ray(const MarchArgs<T>& a, const RayWalk<T>& walk, Emit&& emit) {
  using R = Pack<T>;
  constexpr int kLanes = kWidth<T>;
  using I = IndexOf<R>;
  const unsigned n = static_cast<unsigned>(a.resolution);
  R lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<T>(i);
  int64_t first, last;
  step_range(walk, first, last);
  for (int64_t k = first; k < last; k += kLanes) {
    I cell[3];
    const I inside = (I)cells_of(walk, lanes + static_cast<T>(k), cell);
    const I at = (cell[0] * n + cell[1]) * n + cell[2];
    alignas(64) decltype(at[0] + 0) where[kLanes], is_inside[kLanes];
    std::memcpy(where, &at, sizeof(at));
    std::memcpy(is_inside, &inside, sizeof(inside));
    const int width = static_cast<int>(last - k < kLanes ? last - k : kLanes);
    for (int i = 0; i < width; ++i) {
      if (is_inside[i] && a.occupancy[where[i]]) emit(k + i);
    }
  }
}

}  // namespace

template <class T>
int launch_march_count(const MarchArgs<T>& a, int n_threads) {
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(dynamic, 256)
  for (int64_t ray = 0; ray < a.n_rays; ++ray) {
    int64_t count = 0;
    walk_ray(a, make_walk(a, ray), [&count](int64_t) { ++count; });
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
    walk_ray(a, walk, [&](int64_t k) {
      a.ray_indices[at] = ray;
      a.t_starts[at] = begin_of(walk, static_cast<T>(k));
      a.t_ends[at] = begin_of(walk, static_cast<T>(k) + T(1));
      ++at;
    });
  }
  return kOk;
}

SDI_INSTANTIATE(march_count, MarchArgs)
SDI_INSTANTIATE(march_fill, MarchArgs)

}  // namespace SDI_ISA
}  // namespace sdi
