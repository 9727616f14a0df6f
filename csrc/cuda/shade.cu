// Shading on the GPU, forward and backward (methods.md D, Shading).
// Twin: sdi_fast/reference/shade.py. Maths: math/shade.h, as on the CPU.
//
// light = 0.1 + 0.9 max(0, n . l); colour = albedo, light, or albedo * light. One thread a sample;
// the backward recomputes the light. Precision: T throughout. Bytes per sample in f32: 44 read and
// 12 written forward, 56 read and 24 written backward.
#include "../math/shade.h"

#include "dispatch.h"
#include "items.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kThreads = 256;

template <class T>
__device__ void load_light(const ShadeArgs<T>& a, int64_t i, T light[3]) {
  const int64_t view = a.view_indices[i];
  const bool exists = view >= 0 && view < a.n_views;
  for (int c = 0; c < 3; ++c) light[c] = exists ? a.light_positions[3 * view + c] : T(NAN);
}

template <class T>
__global__ void shade_fwd_kernel(const ShadeArgs<T> a) {
  for (int64_t i = first_item(); i < a.n; i += item_stride()) {
    T light[3];
    load_light(a, i, light);
    shade_forward(a.shading, a.albedo + 3 * i, a.normal + 3 * i, a.x_world + 3 * i, light,
                  a.rgb + 3 * i);
  }
}

template <class T>
__global__ void shade_bwd_kernel(const ShadeArgs<T> a) {
  for (int64_t i = first_item(); i < a.n; i += item_stride()) {
    T light[3];
    load_light(a, i, light);
    shade_backward(a.shading, a.albedo + 3 * i, a.normal + 3 * i, a.x_world + 3 * i, light,
                   a.grad_rgb + 3 * i, a.grad_albedo + 3 * i, a.grad_normal + 3 * i);
  }
}

}  // namespace

template <class T>
int launch_shade_fwd(const ShadeArgs<T>& args, void* stream) {
  return launch_items(shade_fwd_kernel<T>, args.n, kThreads, kThreads, stream, args);
}

template <class T>
int launch_shade_bwd(const ShadeArgs<T>& args, void* stream) {
  return launch_items(shade_bwd_kernel<T>, args.n, kThreads, kThreads, stream, args);
}

SDI_INSTANTIATE_CUDA(shade_fwd, ShadeArgs)
SDI_INSTANTIATE_CUDA(shade_bwd, ShadeArgs)

}  // namespace cuda
}  // namespace sdi
