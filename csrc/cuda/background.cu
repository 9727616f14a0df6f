// Environment background on the GPU, forward and backward (methods.md D, Background).
// Twin: sdi_fast/reference/background.py. Maths: math/background.h, as on the CPU.
//
// Forward: one thread a ray; the 448 weights are staged in shared memory. Backward: a block takes
// tiles of kRays rays, one thread a ray recomputes the forward and leaves activations and gradients
// in shared memory; then every thread owns a few weights and sums their gradients over the tile's
// rays, in order. Blocks leave rows of a workspace that a second kernel adds up in order:
// deterministic, no atomics. Precision: T throughout. Numbers per ray: 3 read and 3 written
// forward, 6 read backward.
#include "../math/background.h"

#include "dispatch.h"
#include "launch.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kThreads = 256;  // forward
constexpr int kRays = 64;      // backward: rays a tile, threads a block
constexpr int kW1 = 0, kW2 = kBgHidden * kSh, kW3 = kW2 + kBgHidden * kBgHidden;
constexpr int kOwned = (kBackgroundWeights + kRays - 1) / kRays;  // weights a thread
constexpr int kColumn = kRays + 1;  // padded, so that a column's readers hit different banks

template <class T>
__device__ void load_weights(const BackgroundArgs<T>& a, T* shared) {
  for (int k = threadIdx.x; k < kBackgroundWeights; k += blockDim.x) {
    shared[k] = k < kW2 ? a.w1[k] : k < kW3 ? a.w2[k - kW2] : a.w3[k - kW3];
  }
  __syncthreads();
}

template <class T>
__global__ void background_fwd_kernel(const BackgroundArgs<T> a) {
  __shared__ T w[kBackgroundWeights];
  load_weights(a, w);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= a.n) return;
  const T d[3] = {a.directions[3 * i], a.directions[3 * i + 1], a.directions[3 * i + 2]};
  BackgroundState<T> s;
  background_forward(d, w + kW1, w + kW2, w + kW3, s);
  for (int c = 0; c < 3; ++c) a.rgb[3 * i + c] = s.rgb[c];
}

// Activations and gradients of a tile of rays, [quantity, ray].
template <class T>
struct Tile {
  T sh[kSh][kColumn];
  T h1[kBgHidden][kColumn];
  T h2[kBgHidden][kColumn];
  T g1[kBgHidden][kColumn];
  T g2[kBgHidden][kColumn];
  T g3[3][kColumn];
};

template <class T>
__device__ void fill_tile(const BackgroundArgs<T>& a, const T* w, int64_t i, Tile<T>& tile) {
  BackgroundState<T> s{};
  T g1[kBgHidden] = {}, g2[kBgHidden] = {}, g3[3] = {};
  if (i < a.n) {  // past the end: zeros, which add nothing
    const T d[3] = {a.directions[3 * i], a.directions[3 * i + 1], a.directions[3 * i + 2]};
    const T grad[3] = {a.grad_rgb[3 * i], a.grad_rgb[3 * i + 1], a.grad_rgb[3 * i + 2]};
    background_forward(d, w + kW1, w + kW2, w + kW3, s);
    background_backward(s, grad, w + kW2, w + kW3, g1, g2, g3);
  }
  const int ray = threadIdx.x;
  for (int k = 0; k < kSh; ++k) tile.sh[k][ray] = s.sh[k];
  for (int h = 0; h < kBgHidden; ++h) {
    tile.h1[h][ray] = s.h1[h];
    tile.h2[h][ray] = s.h2[h];
    tile.g1[h][ray] = g1[h];
    tile.g2[h][ray] = g2[h];
  }
  for (int c = 0; c < 3; ++c) tile.g3[c][ray] = g3[c];
}

// Rows whose product, summed over the rays, is weight k's gradient.
template <class T>
__device__ void factors(const Tile<T>& tile, int k, const T*& grad, const T*& input) {
  if (k < kW2) {
    grad = tile.g1[k / kSh];
    input = tile.sh[k % kSh];
  } else if (k < kW3) {
    grad = tile.g2[(k - kW2) / kBgHidden];
    input = tile.h1[(k - kW2) % kBgHidden];
  } else {
    grad = tile.g3[(k - kW3) / kBgHidden];
    input = tile.h2[(k - kW3) % kBgHidden];
  }
}

template <class T>
__global__ void background_bwd_kernel(const BackgroundArgs<T> a) {
  __shared__ T w[kBackgroundWeights];
  __shared__ Tile<T> tile;
  load_weights(a, w);
  T sums[kOwned] = {};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kRays;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kRays; first < a.n; first += stride) {
    fill_tile(a, w, first + threadIdx.x, tile);
    __syncthreads();
    for (int j = 0; j < kOwned; ++j) {
      const int k = threadIdx.x + j * kRays;
      if (k >= kBackgroundWeights) break;
      const T *grad, *input;
      factors(tile, k, grad, input);
      for (int ray = 0; ray < kRays; ++ray) sums[j] += grad[ray] * input[ray];
    }
    __syncthreads();
  }
  for (int j = 0; j < kOwned; ++j) {
    const int k = threadIdx.x + j * kRays;
    if (k < kBackgroundWeights) a.workspace[blockIdx.x * kBackgroundWeights + k] = sums[j];
  }
}

template <class T>
__global__ void background_reduce_kernel(const BackgroundArgs<T> a, int n_rows) {
  const int k = blockIdx.x * blockDim.x + threadIdx.x;
  if (k >= kBackgroundWeights) return;
  T sum = T(0);
  for (int row = 0; row < n_rows; ++row) sum += a.workspace[row * kBackgroundWeights + k];
  a.grad_weights[k] = sum;
}

}  // namespace

template <class T>
int launch_background_fwd(const BackgroundArgs<T>& args, void* stream) {
  if (args.n == 0) return kOk;
  const unsigned blocks = blocks_for(args.n, kThreads);
  if (blocks == 0) return kBadArgument;
  return launch(background_fwd_kernel<T>, blocks, kThreads, 0, stream, args);
}

template <class T>
int launch_background_bwd(const BackgroundArgs<T>& args, void* stream) {
  const int64_t tiles = (args.n + kRays - 1) / kRays;
  const int blocks = static_cast<int>(tiles < kBackgroundMaxBlocks ? tiles : kBackgroundMaxBlocks);
  if (blocks > 0) {
    const int status =
        launch(background_bwd_kernel<T>, static_cast<unsigned>(blocks), kRays, 0, stream, args);
    if (status != kOk) return status;
  }
  return launch(background_reduce_kernel<T>, blocks_for(kBackgroundWeights, kThreads), kThreads, 0,
                stream, args, blocks);
}

SDI_INSTANTIATE_CUDA(background_fwd, BackgroundArgs)
SDI_INSTANTIATE_CUDA(background_bwd, BackgroundArgs)

}  // namespace cuda
}  // namespace sdi
