// The guided DDIM step on the GPU, in one launch (methods.md C3, C6, C7).
// Twin: sdi_fast/reference/guided_step.py. Maths: math/guided_step.h, as on the CPU.
//
// kParts blocks a sample. With Perp-Neg each of them sums the three dot products of the whole
// sample (16384 numbers of 4 conditions: 128 KiB of f16, from the L2 cache but once), in the same
// order, so that no block waits for another and all agree to the last bit; then it updates its part
// of the sample, one thread a group of 4 numbers, which are one Philox counter. No atomics:
// deterministic. Precision: T, the drawn noise in f32. Bytes per number of x in f32 with 4 outputs
// in f16: 8 read kParts times, 12 read and 4 (with eps 8) written.
#include "../math/guided_step.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dispatch.h"
#include "launch.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kParts = 8;

template <class E, int N>
struct __align__(sizeof(E) * N) Vector {
  E v[N];
};

template <class T, class E>
__device__ __forceinline__ T real_of(E x) {
  return static_cast<T>(x);
}
template <>
__device__ __forceinline__ float real_of<float, __half>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ double real_of<double, __half>(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float real_of<float, __nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
template <>
__device__ __forceinline__ double real_of<double, __nv_bfloat16>(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T, class E, int N>
__device__ __forceinline__ void add_dots(const E* at, int64_t stride, T (&dots)[3]) {
  using V = Vector<E, N>;
  const V p = *reinterpret_cast<const V*>(at);
  const V u = *reinterpret_cast<const V*>(at + stride);
  const V n1 = *reinterpret_cast<const V*>(at + 2 * stride);
  const V n2 = *reinterpret_cast<const V*>(at + 3 * stride);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const T low = real_of<T>(u.v[i]), d = real_of<T>(p.v[i]) - low;
    dots[0] += (real_of<T>(n1.v[i]) - low) * d;
    dots[1] += (real_of<T>(n2.v[i]) - low) * d;
    dots[2] += d * d;
  }
}

// The sums over the block, for all its threads.
template <class T>
__device__ void sum_over_block(T (&dots)[3]) {
  __shared__ T rows[3][kWarps];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    for (int far = 16; far > 0; far /= 2) dots[i] += __shfl_xor_sync(0xffffffffu, dots[i], far);
    if (lane == 0) rows[i][warp] = dots[i];
  }
  __syncthreads();
  for (int i = 0; i < 3; ++i) {
    dots[i] = T(0);
    for (int w = 0; w < kWarps; ++w) dots[i] += rows[i][w];
  }
}

template <class T, class E, bool kAligned>
__device__ __forceinline__ void load_group(const GuidedStepArgs<T>& a, const E* outputs, int64_t j,
                                           int count, T (&o)[4][4]) {
  const int64_t stride = a.batch * a.channels * a.pixels;
  const bool channels_last = a.flags & kChannelsLast;
  int64_t at[4];
  int64_t channel = j / a.pixels, pixel = j - channel * a.pixels;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    at[i] = channels_last ? pixel * a.channels + channel : j + i;
    if (++pixel == a.pixels) {
      pixel = 0;
      ++channel;
    }
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {  // a constant bound keeps o in registers
    if (k >= a.n_conditions) break;
    const E* row = outputs + k * stride;
    if (kAligned && !channels_last) {
      const Vector<E, 4> v = *reinterpret_cast<const Vector<E, 4>*>(row + j);
#pragma unroll
      for (int i = 0; i < 4; ++i) o[i][k] = real_of<T>(v.v[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < count) o[i][k] = real_of<T>(row[at[i]]);
      }
    }
  }
}

template <class T, bool kAligned>
__device__ __forceinline__ void load4(const T* from, int count, T (&to)[4]) {
  if (kAligned) {
    const Vector<T, 4> v = *reinterpret_cast<const Vector<T, 4>*>(from);
    for (int i = 0; i < 4; ++i) to[i] = v.v[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = from[i];
    }
  }
}

template <class T, bool kAligned>
__device__ __forceinline__ void store4(const T (&from)[4], int count, T* to) {
  if (kAligned) {
    Vector<T, 4> v;
    for (int i = 0; i < 4; ++i) v.v[i] = from[i];
    *reinterpret_cast<Vector<T, 4>*>(to) = v;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i < count) to[i] = from[i];
    }
  }
}

// kAligned: samples are whole groups of 16 / sizeof(E) and of 4 numbers, at aligned addresses.
template <class T, class E, bool kAligned>
__global__ void __launch_bounds__(kThreads) guided_step_kernel(const GuidedStepArgs<T> a) {
  const int64_t sample = blockIdx.x / kParts;
  const int part = static_cast<int>(blockIdx.x % kParts);
  const int64_t n = a.channels * a.pixels, first = sample * n;
  const E* outputs = static_cast<const E*>(a.outputs) + first;
  const bool lives = !a.lengths || a.lengths[sample] > a.step;
  const bool draws = !a.noise && a.rng && a.eta != 0.0;
  T dots[3] = {};
  if (a.n_conditions == 4 && (lives || a.eps)) {  // the same for the whole block
    constexpr int kVector = kAligned ? static_cast<int>(16 / sizeof(E)) : 1;
    for (int64_t j = static_cast<int64_t>(threadIdx.x) * kVector; j < n; j += kThreads * kVector) {
      add_dots<T, E, kVector>(outputs + j, a.batch * n, dots);
    }
    sum_over_block(dots);
  }
  const StepNumbers<T> s = step_numbers(a, sample, dots);
  const int64_t n_groups = (n + 3) / 4, per_part = (n_groups + kParts - 1) / kParts;
  const int64_t stop = (part + 1) * per_part < n_groups ? (part + 1) * per_part : n_groups;
  for (int64_t group = part * per_part + threadIdx.x; group < stop; group += kThreads) {
    const int64_t j = 4 * group;
    const int count = static_cast<int>(n - j < 4 ? n - j : 4);
    T o[4][4] = {}, x[4] = {}, xi[4] = {}, result[4], eps[4];
    load_group<T, E, kAligned>(a, outputs, j, count, o);
    load4<T, kAligned>(a.x + first + j, count, x);
    if (a.noise) {
      load4<T, kAligned>(a.noise + first + j, count, xi);
    } else if (draws) {
      float normals[4];
      philox_normals(static_cast<uint64_t>(a.rng[0]), static_cast<uint64_t>(a.rng[1] + a.draw),
                     static_cast<uint32_t>(sample), static_cast<uint32_t>(group), normals);
      for (int i = 0; i < 4; ++i) xi[i] = static_cast<T>(normals[i]);
    }
    for (int i = 0; i < 4; ++i) {
      const T moved = stepped(a, s, x[i], guided_of(a, s, o[i]), xi[i], eps[i]);
      result[i] = lives ? moved : x[i];
    }
    store4<T, kAligned>(result, count, a.result + first + j);
    if (a.eps) store4<T, kAligned>(eps, count, a.eps + first + j);
  }
}

template <class T, class E>
int launch_with(const GuidedStepArgs<T>& a, void* stream) {
  const auto address = [](const void* p) { return reinterpret_cast<uintptr_t>(p); };
  const bool aligned =
      a.channels * a.pixels % 8 == 0 && address(a.outputs) % 16 == 0 &&
      (address(a.x) | address(a.noise) | address(a.result) | address(a.eps)) % (4 * sizeof(T)) == 0;
  const unsigned blocks = blocks_for(a.batch * kParts, 1);
  if (blocks == 0) return kBadArgument;
  return aligned ? launch(guided_step_kernel<T, E, true>, blocks, kThreads, 0, stream, a)
                 : launch(guided_step_kernel<T, E, false>, blocks, kThreads, 0, stream, a);
}

}  // namespace

template <class T>
int launch_guided_step(const GuidedStepArgs<T>& args, void* stream) {
  if (args.batch * args.channels * args.pixels == 0) return kOk;
  if (args.flags & kHalfOutputs) return launch_with<T, __half>(args, stream);
  if (args.flags & kBf16Outputs) return launch_with<T, __nv_bfloat16>(args, stream);
  return launch_with<T, T>(args, stream);
}

SDI_INSTANTIATE_CUDA(guided_step, GuidedStepArgs)

}  // namespace cuda
}  // namespace sdi
