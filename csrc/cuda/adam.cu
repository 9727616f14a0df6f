// Adam on the GPU (methods.md D, Optimiser). Twin: sdi_fast/reference/adam.py.
// Formula and maths: math/adam.h, as on the CPU.
//
// Threads take 16 bytes of every array at a time, in strides of the whole grid; arrays that are not
// 16-byte aligned, and the last few parameters, go one by one. Where gradient and moments are zero
// nothing else is read and nothing written, which is exact: the update is 0 / (0 + eps). A step or
// a learning rate on the device is read once a block.
// Precision: T, the bias corrections in double. Bytes per parameter (f32): 16 read and 12 written
// (14 with the half shadow); 12 read and none written where it is at rest.
#include "../math/adam.h"

#include "../math/half.h"
#include "dispatch.h"
#include "launch.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kThreads = 256;
constexpr int kVector = 16;  // bytes
template <class T>
constexpr int kResident = sizeof(T) == 4 ? 5 : 3;  // blocks that one multiprocessor holds
constexpr int kMultiprocessors = 132;              // of H100 and H200: one wave of blocks

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Vector {
  T at[kWidth];
};

template <class T>
__device__ AdamConstants<T> constants_at_run_time(const AdamArgs<T>& a) {
  __shared__ AdamConstants<T> shared;
  if (threadIdx.x == 0) {
    shared = adam_constants(a, a.step_at ? *a.step_at : a.step, a.lr_at ? *a.lr_at : a.lr);
  }
  __syncthreads();
  return shared;
}

// Parameters i kWidth to (i + 1) kWidth.
template <int kWidth, class T>
__device__ void update(const AdamArgs<T>& a, const AdamConstants<T>& c, int64_t i) {
  using V = Vector<T, kWidth>;
  V* moments = reinterpret_cast<V*>(a.exp_avg);
  V* squares = reinterpret_cast<V*>(a.exp_avg_sq);
  V* params = reinterpret_cast<V*>(a.param);
  const V grad = reinterpret_cast<const V*>(a.grad)[i];
  V m = moments[i], v = squares[i];
  bool moving = false;
  for (int k = 0; k < kWidth; ++k) moving |= is_moving(c, grad.at[k], m.at[k], v.at[k]);
  if (!moving) return;
  V p = params[i];
  for (int k = 0; k < kWidth; ++k) adam_update(c, grad.at[k], p.at[k], m.at[k], v.at[k]);
  params[i] = p;
  moments[i] = m;
  squares[i] = v;
  if (!a.shadow) return;
  using H = Vector<uint16_t, kWidth>;
  H half;
  for (int k = 0; k < kWidth; ++k) half.at[k] = half_bits(p.at[k]);
  reinterpret_cast<H*>(a.shadow)[i] = half;
}

template <int kWidth, class T>
__global__ void __launch_bounds__(kThreads, kResident<T>)
    adam_kernel(const AdamArgs<T> a, AdamConstants<T> c) {
  if (a.skip && *a.skip) return;  // the whole grid
  if (a.step_at || a.lr_at) c = constants_at_run_time(a);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = first; i < a.n / kWidth; i += stride) update<kWidth>(a, c, i);
  const int64_t rest = a.n / kWidth * kWidth + first;
  if (rest < a.n) update<1>(a, c, rest);  // fewer than kWidth
}

template <int kWidth, class T>
int launch_width(const AdamArgs<T>& a, const AdamConstants<T>& c, void* stream) {
  const int64_t wanted = (a.n / kWidth + kThreads) / kThreads;  // at least one, for the rest
  constexpr int64_t kMost = kResident<T> * kMultiprocessors;
  const unsigned blocks = static_cast<unsigned>(wanted < kMost ? wanted : kMost);
  return launch(adam_kernel<kWidth, T>, blocks, kThreads, 0, stream, a, c);
}

bool is_aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

template <class T>
int launch_adam_step(const AdamArgs<T>& args, void* stream) {
  if (args.n == 0) return kOk;
  constexpr int kWidth = kVector / sizeof(T);
  const bool on_device = args.step_at || args.lr_at;  // then the kernel works them out
  const AdamConstants<T> c =
      on_device ? AdamConstants<T>{} : adam_constants(args, args.step, args.lr);
  const bool aligned = is_aligned(args.param, kVector) && is_aligned(args.grad, kVector) &&
                       is_aligned(args.exp_avg, kVector) && is_aligned(args.exp_avg_sq, kVector) &&
                       is_aligned(args.shadow, kWidth * sizeof(uint16_t));
  return aligned ? launch_width<kWidth>(args, c, stream) : launch_width<1>(args, c, stream);
}

SDI_INSTANTIATE_CUDA(adam_step, AdamArgs)

}  // namespace cuda
}  // namespace sdi
