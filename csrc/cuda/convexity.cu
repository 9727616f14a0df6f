// The convexity loss on the GPU, forward and backward (methods.md D, Losses; G6).
// Twin: sdi_fast/reference/convexity.py. Formula and maths: math/convexity.h, as on the CPU.
//
// Forward: a block a view, whose 64 threads are the map's points; each samples its own, and their
// cross products are added up in a tree. One view's sum is the loss already; those of several go
// through a workspace and a second kernel, which adds them in order. Backward: a block a pixel row
// writes the row's zeros; where the map reads this row (16 rows a view at most) the block samples
// the map again and then writes the values over the zeros, a thread a pixel. A pixel gathers from
// all map points, so that taps that coincide (sides under 16) add up; deterministic, no atomics.
// Precision: double inside, rounded to T once at the end. Bytes: 256 pixels read a view (times 16
// backward, from the cache); backward, 12 written per pixel, 16 with opacity (f32).
#include "../math/convexity.h"

#include "dispatch.h"
#include "launch.h"
#include "reduce.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kPoints = kMapSide * kMapSide;  // threads of the forward
constexpr int kRowThreads = 128;              // backward; at least kPoints
constexpr int kVector = 16;                   // bytes a store

// Thread t samples point t, for t < kPoints; no barrier inside.
template <class T>
__device__ void sample_point(const NormalView<T>& view, NormalMap& map) {
  const int t = threadIdx.x;
  if (t < kPoints) sample_map(view, t / kMapSide, t % kMapSide, map[t / kMapSide][t % kMapSide]);
}

template <class T>
__global__ void convexity_fwd_kernel(const ConvexityArgs<T> a) {
  __shared__ NormalMap map;
  __shared__ double shared[kPoints];
  sample_point(view_of(a, blockIdx.x), map);
  __syncthreads();
  double sum[1] = {convexity_at(map, threadIdx.x / kMapSide, threadIdx.x % kMapSide)};
  block_sum<kPoints>(sum, shared);
  if (threadIdx.x != 0) return;
  if (a.batch == 1) {
    *a.loss = static_cast<T>(-sum[0] / kMapPairs);
  } else {
    a.workspace[blockIdx.x] = sum[0];
  }
}

template <class T>
__global__ void convexity_reduce_kernel(const ConvexityArgs<T> a) {
  __shared__ double shared[kPoints];
  double sum[1] = {0};
  for (int64_t b = threadIdx.x; b < a.batch; b += kPoints) sum[0] += a.workspace[b];
  block_sum<kPoints>(sum, shared);
  if (threadIdx.x == 0) *a.loss = static_cast<T>(-sum[0] / (a.batch * kMapPairs));
}

struct alignas(kVector) Zeros {
  int words[kVector / 4];
};

// All threads of the block write `n` zeros.
template <class T>
__device__ void fill_zeros(T* out, int64_t n) {
  constexpr int kWidth = kVector / sizeof(T);
  int64_t done = 0;
  if (reinterpret_cast<uintptr_t>(out) % kVector == 0) {
    done = n / kWidth * kWidth;
    Zeros* vectors = reinterpret_cast<Zeros*>(out);
    for (int64_t i = threadIdx.x; i < n / kWidth; i += kRowThreads) vectors[i] = Zeros{};
  }
  for (int64_t i = done + threadIdx.x; i < n; i += kRowThreads) out[i] = T(0);
}

__device__ bool map_reads_row(int64_t y, int64_t height) {
  for (int r = 0; r < kMapSide; ++r) {
    const Taps taps = taps_of(r, height);
    if (y == taps.low || y == taps.high) return true;
  }
  return false;
}

// Whether no earlier tap names the same pixel.
__device__ bool is_first_tap(int tap, int64_t n) {
  const int64_t pixel = pixel_of_tap(tap, n);
  for (int other = 0; other < tap; ++other) {
    if (pixel_of_tap(other, n) == pixel) return false;
  }
  return true;
}

template <class T>
__global__ void convexity_bwd_kernel(const ConvexityArgs<T> a) {
  __shared__ NormalMap map, grad;
  __shared__ double row[kMapSide][2];
  const int t = threadIdx.x;
  const int64_t b = blockIdx.x / a.height, y = blockIdx.x % a.height;
  const int64_t first = b * a.height * a.width;  // pixel of the view
  T* grad_normals = a.grad_normals + 3 * first;
  T* grad_opacity = a.opacity ? a.grad_opacity + first : nullptr;
  fill_zeros(grad_normals + 3 * y * a.width, 3 * a.width);
  if (grad_opacity) fill_zeros(grad_opacity + y * a.width, a.width);
  if (!map_reads_row(y, a.height)) return;  // the whole block
  const NormalView<T> view = view_of(a, b);
  sample_point(view, map);
  __syncthreads();
  if (t < kPoints) {
    const double scale = -static_cast<double>(*a.grad_loss) / (a.batch * kMapPairs);
    const int r = t / kMapSide, c = t % kMapSide;
    convexity_gradient(map, r, c, scale, grad[r][c]);
  }
  __syncthreads();
  if (t < kTaps) row[t / 2][t % 2] = row_gradient(grad, y, a.height, t / 2, t % 2);
  __syncthreads();  // the zeros are written, too
  if (t < kTaps && is_first_tap(t, a.width)) {
    write_pixel_gradient(view, row, y, pixel_of_tap(t, a.width), grad_normals, grad_opacity);
  }
}

}  // namespace

template <class T>
int launch_convexity_fwd(const ConvexityArgs<T>& args, void* stream) {
  if (args.batch > kMaxBlocks) return kBadArgument;
  const int status =
      launch(convexity_fwd_kernel<T>, static_cast<unsigned>(args.batch), kPoints, 0, stream, args);
  if (status != kOk || args.batch == 1) return status;
  return launch(convexity_reduce_kernel<T>, 1u, kPoints, 0, stream, args);
}

template <class T>
int launch_convexity_bwd(const ConvexityArgs<T>& args, void* stream) {
  const int64_t rows = args.batch * args.height;
  if (rows > kMaxBlocks) return kBadArgument;
  return launch(convexity_bwd_kernel<T>, static_cast<unsigned>(rows), kRowThreads, 0, stream, args);
}

SDI_INSTANTIATE_CUDA(convexity_fwd, ConvexityArgs)
SDI_INSTANTIATE_CUDA(convexity_bwd, ConvexityArgs)

}  // namespace cuda
}  // namespace sdi
