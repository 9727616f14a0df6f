// Adam on the CPU (methods.md D, Optimiser). Twin: sdi_fast/reference/adam.py.
//
// Bound by memory: 4 numbers read and 3 written per parameter. A block whose gradients and moments
// are all zero is left alone, which is exact: its update is 0 / (0 + eps). Precision: T, the bias
// corrections in double.
#include "../math/adam.h"

#include "../math/half.h"
#include "dispatch.h"
#include "pack.h"
#include "parallel.h"

namespace sdi {
namespace SDI_ISA {
namespace {

constexpr int64_t kBlock = 1024;  // parameters

template <class T>
bool is_at_rest(const AdamArgs<T>& a, const AdamConstants<T>& c, int64_t first, int64_t n) {
  int moving = 0;
  for (int64_t i = first; i < first + n; ++i) {
    moving |= is_moving(c, a.grad[i], a.exp_avg[i], a.exp_avg_sq[i]);
  }
  return moving == 0;
}

template <class T>
void update_block(const AdamArgs<T>& a, const AdamConstants<T>& c, int64_t first, int64_t n) {
  using R = Pack<T>;
  int64_t i = first;
  for (; i + kWidth<T> <= first + n; i += kWidth<T>) {
    R p = load<R>(a.param + i), m = load<R>(a.exp_avg + i), v = load<R>(a.exp_avg_sq + i);
    adam_update(c, load<R>(a.grad + i), p, m, v);
    store<R>(a.param + i, p);
    store<R>(a.exp_avg + i, m);
    store<R>(a.exp_avg_sq + i, v);
  }
  for (; i < first + n; ++i) adam_update(c, a.grad[i], a.param[i], a.exp_avg[i], a.exp_avg_sq[i]);
  if (!a.shadow) return;
  for (i = first; i < first + n; ++i) a.shadow[i] = half_bits(a.param[i]);
}

}  // namespace

template <class T>
int launch_adam_step(const AdamArgs<T>& a, int n_threads) {
  if (a.skip && *a.skip) return kOk;
  const AdamConstants<T> c =
      adam_constants(a, a.step_at ? *a.step_at : a.step, a.lr_at ? *a.lr_at : a.lr);
  const int64_t n_blocks = (a.n + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(static)
  for (int64_t b = 0; b < n_blocks; ++b) {
    const int64_t first = b * kBlock;
    const int64_t n = a.n - first < kBlock ? a.n - first : kBlock;
    if (!is_at_rest(a, c, first, n)) update_block(a, c, first, n);
  }
  return kOk;
}

SDI_INSTANTIATE(adam_step, AdamArgs)

}  // namespace SDI_ISA
}  // namespace sdi
