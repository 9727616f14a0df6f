// The radiance field on the CPU, forward (methods.md D). Twin: sdi_fast/reference/field.py.
//
// One lane a sample: hash gather, both MLPs and the closed-form normal of a whole pack in one go;
// packs are shared out between the threads. Nothing is kept for the backward. Precision: T.
// Numbers per sample: 8 L F gathered, 3 read, 7 written.
#include "dispatch.h"
#include "field_weights.h"
#include "pack.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
int launch_density(const DensityArgs<T>& a, int n_threads) {
  using R = Pack<T>;
  const WeightStore<T> store_of(a.spec);
  if (!store_of.ok()) return kOutOfMemory;
  const PackedWeights<T> weights = store_of.pack(a.spec, a.params);
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(static)
  for (int64_t i = 0; i < a.n; i += kWidth<T>) {
    FieldState<R> state;
    load_points<R>(a.x_world, i, a.n, state.x);
    const R value = evaluate_density(a.spec, a.params.table, weights, state);
    store_strided<R>(a.density, i, a.n, 1, 0, value);
  }
  return kOk;
}

template <class T>
int launch_field_fwd(const FieldFwdArgs<T>& a, int n_threads) {
  using R = Pack<T>;
  const WeightStore<T> store_of(a.spec);
  if (!store_of.ok()) return kOutOfMemory;
  const PackedWeights<T> weights = store_of.pack(a.spec, a.params);
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(static)
  for (int64_t i = 0; i < a.n; i += kWidth<T>) {
    FieldState<R> state;
    load_points<R>(a.x_world, i, a.n, state.x);
    evaluate_field(a.spec, a.params.table, weights, state);
    store_strided<R>(a.density, i, a.n, 1, 0, softplus(state.logit));
    for (int c = 0; c < 3; ++c) {
      store_strided<R>(a.albedo, i, a.n, 3, c, state.albedo[c]);
      store_strided<R>(a.normal, i, a.n, 3, c, state.normal[c]);
    }
  }
  return kOk;
}

SDI_INSTANTIATE(density, DensityArgs)
SDI_INSTANTIATE(field_fwd, FieldFwdArgs)

}  // namespace SDI_ISA
}  // namespace sdi
