// Pruning on the GPU: mark and count, then fill (methods.md D, Marching).
// Twin: sdi_fast/reference/prune.py. Maths: math/prune.h, as on the CPU.
//
// Kept while exp(-sum of sigma dt before) >= eps, if 1 - exp(-sigma dt) >= threshold. One thread
// takes a ray, and stops where the ray is opaque. Precision: T per sample, double for the sum; no
// fused multiply-add, so that only a sample whose exp is within its rounding of a threshold can be
// judged otherwise than by the twin. Bytes per sample in f32: 12 read and 1 written by count, 1
// read by fill, and 8 read and 16 written for a kept one.
#include "../math/prune.h"

#include "dispatch.h"
#include "items.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kThreads = 128;

template <class T>
__global__ void prune_count_kernel(const PruneArgs<T> a) {
  for (int64_t ray = first_item(); ray < a.n_rays; ray += item_stride()) {
    const Range range = range_of(a.packed_info, ray, a.n);
    a.counts[ray] = prune_ray(a, range.first, range.count);
  }
}

template <class T>
__global__ void prune_fill_kernel(const PruneArgs<T> a) {
  for (int64_t ray = first_item(); ray < a.n_rays; ray += item_stride()) {
    const Range range = range_of(a.packed_info, ray, a.n);
    copy_kept(a, ray, range.first, range.count);
  }
}

}  // namespace

template <class T>
int launch_prune_count(const PruneArgs<T>& args, void* stream) {
  return launch_items(prune_count_kernel<T>, args.n_rays, kThreads, kThreads, stream, args);
}

template <class T>
int launch_prune_fill(const PruneArgs<T>& args, void* stream) {
  return launch_items(prune_fill_kernel<T>, args.n_rays, kThreads, kThreads, stream, args);
}

SDI_INSTANTIATE_CUDA(prune_count, PruneArgs)
SDI_INSTANTIATE_CUDA(prune_fill, PruneArgs)

}  // namespace cuda
}  // namespace sdi
