// Shading on the CPU, forward and backward (methods.md D, Shading).
// Twin: sdi_fast/reference/shade.py.
//
// One sample at a time, the samples shared out between the threads; the backward recomputes the
// light. Precision: T. Numbers per sample: 10 read and 3 written forward, 13 and 6 backward.
#include "../math/shade.h"

#include "dispatch.h"
#include "parallel.h"
#include "ranges.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
int launch_shade_fwd(const ShadeArgs<T>& a, int n_threads) {
  if (!indices_fit(a.view_indices, a.n, a.n_views)) return kBadArgument;
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(static)
  for (int64_t i = 0; i < a.n; ++i) {
    shade_forward(a.shading, a.albedo + 3 * i, a.normal + 3 * i, a.x_world + 3 * i,
                  a.light_positions + 3 * a.view_indices[i], a.rgb + 3 * i);
  }
  return kOk;
}

template <class T>
int launch_shade_bwd(const ShadeArgs<T>& a, int n_threads) {
  if (!indices_fit(a.view_indices, a.n, a.n_views)) return kBadArgument;
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(static)
  for (int64_t i = 0; i < a.n; ++i) {
    shade_backward(a.shading, a.albedo + 3 * i, a.normal + 3 * i, a.x_world + 3 * i,
                   a.light_positions + 3 * a.view_indices[i], a.grad_rgb + 3 * i,
                   a.grad_albedo + 3 * i, a.grad_normal + 3 * i);
  }
  return kOk;
}

SDI_INSTANTIATE(shade_fwd, ShadeArgs)
SDI_INSTANTIATE(shade_bwd, ShadeArgs)

}  // namespace SDI_ISA
}  // namespace sdi
