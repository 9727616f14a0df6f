// The losses on single rays on the CPU, forward and backward (methods.md D, Losses).
// Twin: sdi_fast/reference/ray_losses.py. Maths: math/ray_losses.h.
//
// Chunks of rays are summed on their own and added in their order: the result does not depend on
// the number of threads. Precision: T a ray, the sums in double. Numbers per ray: 3 read forward;
// 1 read and 3 written backward.
#include "../math/ray_losses.h"

#include "dispatch.h"
#include "parallel.h"

namespace sdi {
namespace SDI_ISA {
namespace {

constexpr int64_t kChunk = 4096;  // rays

}  // namespace

template <class T>
int launch_ray_losses_fwd(const RayLossesArgs<T>& a, int n_threads) {
  const int64_t n_chunks = (a.n + kChunk - 1) / kChunk;
  Buffer<double> partial(n_chunks * kRaySums);
  if (!partial.ok()) return kOutOfMemory;
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(static)
  for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
    const int64_t stop = (chunk + 1) * kChunk < a.n ? (chunk + 1) * kChunk : a.n;
    double sums[kRaySums] = {};
    for (int64_t i = chunk * kChunk; i < stop; ++i) {
      add_ray(a.opacity[i], a.orient[i], a.z_variance[i], sums);
    }
    for (int k = 0; k < kRaySums; ++k) partial.get()[chunk * kRaySums + k] = sums[k];
  }
  double sums[kRaySums] = {};
  for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
    for (int k = 0; k < kRaySums; ++k) sums[k] += partial.get()[chunk * kRaySums + k];
  }
  finish_ray_losses(sums, a.n, a.losses, a.counts);
  return kOk;
}

template <class T>
int launch_ray_losses_bwd(const RayLossesArgs<T>& a, int n_threads) {
  if (a.n == 0) return kOk;
  const RayLossScales<T> scales = ray_loss_scales(a);
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(static)
  for (int64_t i = 0; i < a.n; ++i) {
    a.grad_opacity[i] = opacity_gradient(scales, a.opacity[i]);
    a.grad_orient[i] = scales.orient;
    a.grad_z_variance[i] = scales.z_variance;
  }
  return kOk;
}

SDI_INSTANTIATE(ray_losses_fwd, RayLossesArgs)
SDI_INSTANTIATE(ray_losses_bwd, RayLossesArgs)

}  // namespace SDI_ISA
}  // namespace sdi
