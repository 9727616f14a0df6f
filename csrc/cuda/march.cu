// Marching on the GPU: count, then fill (methods.md D, Marching).
// Twin: sdi_fast/reference/march.py. Maths: math/march.h, as on the CPU.
//
// Sample k is [t0 + k dt, t0 + (k + 1) dt], kept if its midpoint's cell is inside and occupied. One
// warp takes a ray, one lane a step; a ballot finds each kept step's place among the kept. Both
// passes make the same decisions, the twin's: no fused multiply-add (mul_exact, add_exact), IEEE
// division. Precision: T. Bytes per step: 1 read; per sample kept in f32: 16 written.
#include "../math/march.h"

#include "dispatch.h"
#include "items.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kThreads = 256;
constexpr int kRays = kThreads / kWarp;  // a block at once

template <class T>
__device__ bool is_kept(const MarchArgs<T>& a, const RayWalk<T>& walk, int64_t step) {
  uint32_t cell[3];
  if (!cells_of(walk, static_cast<T>(step), cell)) return false;
  return a.occupancy[(static_cast<int64_t>(cell[0]) * a.resolution + cell[1]) * a.resolution +
                     cell[2]] != 0;
}

// Calls emit(step of this lane, mask of the lanes whose steps are kept), in all lanes together.
template <class T, class Emit>
__device__ void walk_ray(const MarchArgs<T>& a, const RayWalk<T>& walk, int lane, Emit&& emit) {
  int64_t first, last;
  step_range(walk, first, last);  // the same in all lanes
  for (int64_t start = first; start < last; start += kWarp) {
    const int64_t step = start + lane;
    const bool kept = step < last && is_kept(a, walk, step);
    emit(step, __ballot_sync(kAllLanes, kept));
  }
}

template <class T>
__global__ void march_count_kernel(const MarchArgs<T> a) {
  const int lane = threadIdx.x % kWarp;
  for (int64_t ray = first_item() / kWarp; ray < a.n_rays; ray += item_stride() / kWarp) {
    int64_t count = 0;
    walk_ray(a, make_walk(a, ray), lane, [&](int64_t, unsigned mask) { count += __popc(mask); });
    if (lane == 0) a.counts[ray] = count;
  }
}

template <class T>
__global__ void march_fill_kernel(const MarchArgs<T> a) {
  const int lane = threadIdx.x % kWarp;
  const unsigned lanes_before = (1u << lane) - 1u;
  for (int64_t ray = first_item() / kWarp; ray < a.n_rays; ray += item_stride() / kWarp) {
    const RayWalk<T> walk = make_walk(a, ray);
    int64_t next = a.first_sample[ray];
    walk_ray(a, walk, lane, [&](int64_t step, unsigned mask) {
      if ((mask >> lane) & 1u) {
        const int64_t at = next + __popc(mask & lanes_before);
        a.ray_indices[at] = ray;
        a.t_starts[at] = begin_of(walk, static_cast<T>(step));
        a.t_ends[at] = begin_of(walk, static_cast<T>(step) + T(1));
      }
      next += __popc(mask);
    });
  }
}

}  // namespace

template <class T>
int launch_march_count(const MarchArgs<T>& args, void* stream) {
  return launch_items(march_count_kernel<T>, args.n_rays, kRays, kThreads, stream, args);
}

template <class T>
int launch_march_fill(const MarchArgs<T>& args, void* stream) {
  return launch_items(march_fill_kernel<T>, args.n_rays, kRays, kThreads, stream, args);
}

SDI_INSTANTIATE_CUDA(march_count, MarchArgs)
SDI_INSTANTIATE_CUDA(march_fill, MarchArgs)

}  // namespace cuda
}  // namespace sdi
