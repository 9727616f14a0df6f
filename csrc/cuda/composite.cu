// Compositing on the GPU, forward and backward (methods.md D, Compositing).
// Twin: sdi_fast/reference/composite.py. Maths and formulas: math/compositing.h, as on the CPU.
//
// w = T alpha; rgb, O, depth and normal_sum are sums of w times a value, z_variance the variance of
// t under w / O where O > .5, orient = sum sg(w) max(0, n . d)^2. One thread takes a ray and walks
// it once forward, once back: neighbouring rays' samples share no cache line, so that this is not
// the fast path (render.h), but the general one. The backward recomputes the transmittance from the
// densities and reads the weights. Precision: T per sample, double for the running sums; no
// atomics. Bytes per sample in f32: 36 read and 4 written forward, 40 and 28 backward.
#include "../math/compositing.h"

#include "dispatch.h"
#include "items.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kThreads = 128;

template <class T>
__global__ void composite_fwd_kernel(const CompositeFwdArgs<T> a) {
  for (int64_t ray = first_item(); ray < a.n_rays; ray += item_stride()) {
    const Range range = range_of(a.packed_info, ray, a.n);
    composite_ray(a, ray, range.first, range.count);
  }
}

template <class T>
__global__ void composite_bwd_kernel(const CompositeBwdArgs<T> a) {
  for (int64_t ray = first_item(); ray < a.n_rays; ray += item_stride()) {
    const Range range = range_of(a.packed_info, ray, a.n);
    composite_ray_backward(a, ray, range.first, range.count);
  }
}

}  // namespace

template <class T>
int launch_composite_fwd(const CompositeFwdArgs<T>& args, void* stream) {
  return launch_items(composite_fwd_kernel<T>, args.n_rays, kThreads, kThreads, stream, args);
}

template <class T>
int launch_composite_bwd(const CompositeBwdArgs<T>& args, void* stream) {
  return launch_items(composite_bwd_kernel<T>, args.n_rays, kThreads, kThreads, stream, args);
}

SDI_INSTANTIATE_CUDA(composite_fwd, CompositeFwdArgs)
SDI_INSTANTIATE_CUDA(composite_bwd, CompositeBwdArgs)

}  // namespace cuda
}  // namespace sdi
