// The losses on single rays on the GPU, forward and backward (methods.md D, Losses).
// Twin: sdi_fast/reference/ray_losses.py. Formula and maths: math/ray_losses.h, as on the CPU.
//
// Forward: threads take rays in strides of the whole grid and sum them; a block adds its threads'
// sums in a tree and leaves a row of the workspace; a second kernel of one block adds the rows.
// Backward: one thread a ray. Deterministic, no atomics.
// Precision: T a ray, the sums in double. Bytes per ray (f32): 12 read forward; 4 read and 12
// written backward.
#include "../math/ray_losses.h"

#include "dispatch.h"
#include "launch.h"
#include "reduce.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kThreads = 256;

template <class T>
__global__ void ray_losses_fwd_kernel(const RayLossesArgs<T> a) {
  __shared__ double shared[kThreads * kRaySums];
  double sums[kRaySums] = {};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.n;
       i += stride) {
    add_ray(a.opacity[i], a.orient[i], a.z_variance[i], sums);
  }
  block_sum<kThreads>(sums, shared);
  if (threadIdx.x != 0) return;
  for (int k = 0; k < kRaySums; ++k) a.workspace[blockIdx.x * kRaySums + k] = sums[k];
}

template <class T>
__global__ void ray_losses_reduce_kernel(const RayLossesArgs<T> a, int n_rows) {
  __shared__ double shared[kThreads * kRaySums];
  double sums[kRaySums] = {};
  for (int row = threadIdx.x; row < n_rows; row += kThreads) {
    for (int k = 0; k < kRaySums; ++k) sums[k] += a.workspace[row * kRaySums + k];
  }
  block_sum<kThreads>(sums, shared);
  if (threadIdx.x == 0) finish_ray_losses(sums, a.n, a.losses, a.counts);
}

template <class T>
__global__ void ray_losses_bwd_kernel(const RayLossesArgs<T> a) {
  __shared__ RayLossScales<T> scales;  // divisions in double: once a block
  if (threadIdx.x == 0) scales = ray_loss_scales(a);
  __syncthreads();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= a.n) return;
  a.grad_opacity[i] = opacity_gradient(scales, a.opacity[i]);
  a.grad_orient[i] = scales.orient;
  a.grad_z_variance[i] = scales.z_variance;
}

}  // namespace

template <class T>
int launch_ray_losses_fwd(const RayLossesArgs<T>& args, void* stream) {
  const int64_t wanted = (args.n + kThreads - 1) / kThreads;
  const int blocks = static_cast<int>(wanted < kRayLossesMaxBlocks ? wanted : kRayLossesMaxBlocks);
  if (blocks > 0) {
    const int status =
        launch(ray_losses_fwd_kernel<T>, static_cast<unsigned>(blocks), kThreads, 0, stream, args);
    if (status != kOk) return status;
  }
  return launch(ray_losses_reduce_kernel<T>, 1u, kThreads, 0, stream, args, blocks);
}

template <class T>
int launch_ray_losses_bwd(const RayLossesArgs<T>& args, void* stream) {
  if (args.n == 0) return kOk;
  const unsigned blocks = blocks_for(args.n, kThreads);
  if (blocks == 0) return kBadArgument;
  return launch(ray_losses_bwd_kernel<T>, blocks, kThreads, 0, stream, args);
}

SDI_INSTANTIATE_CUDA(ray_losses_fwd, RayLossesArgs)
SDI_INSTANTIATE_CUDA(ray_losses_bwd, RayLossesArgs)

}  // namespace cuda
}  // namespace sdi
