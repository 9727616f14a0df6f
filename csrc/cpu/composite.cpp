// Compositing on the CPU, forward and backward (methods.md D, Compositing).
// Twin: sdi_fast/reference/composite.py.
//
// One thread takes a ray and walks it once forward, once back (math/compositing.h has the
// formulas). The backward recomputes the transmittance from the densities and reads the weights.
// Precision: T per sample, double for the running sums.
// Numbers per sample: 9 read and 1 written forward, 10 and 7 backward.
#include "../math/compositing.h"

#include "dispatch.h"
#include "parallel.h"
#include "ranges.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
int launch_composite_fwd(const CompositeFwdArgs<T>& a, int n_threads) {
  if (!ranges_fit(a.packed_info, a.n_rays, a.n)) return kBadArgument;
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(dynamic, 128)
  for (int64_t ray = 0; ray < a.n_rays; ++ray) {
    composite_ray(a, ray, a.packed_info[2 * ray], a.packed_info[2 * ray + 1]);
  }
  return kOk;
}

template <class T>
int launch_composite_bwd(const CompositeBwdArgs<T>& a, int n_threads) {
  if (!ranges_fit(a.packed_info, a.n_rays, a.n)) return kBadArgument;
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(dynamic, 128)
  for (int64_t ray = 0; ray < a.n_rays; ++ray) {
    composite_ray_backward(a, ray, a.packed_info[2 * ray], a.packed_info[2 * ray + 1]);
  }
  return kOk;
}

SDI_INSTANTIATE(composite_fwd, CompositeFwdArgs)
SDI_INSTANTIATE(composite_bwd, CompositeBwdArgs)

}  // namespace SDI_ISA
}  // namespace sdi
