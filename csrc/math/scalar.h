// The per-sample maths' value types, and the activations.
//
// Packs have to be known before the templates that use them: vector types have no namespace, so a
// later overload would not be found.
#pragma once

#include "base.h"
#if !defined(__CUDACC__) && !defined(SDI_EMULATE)
#include "../cpu/pack.h"
#endif

namespace sdi {
namespace SDI_ISA {

// 1 / (1 + exp(-x))
template <class R>
SDI_HD R sigmoid(R x) {
  using T = ScalarOf<R>;
  return T(1) / (T(1) + exp_of(-x));
}

// log(1 + exp(x)), with PyTorch's switch to x above 20
template <class R>
SDI_HD R softplus(R x) {
  using T = ScalarOf<R>;
  const R magnitude = x < T(0) ? -x : x;
  const R positive = x < T(0) ? R{} : x;  // NaN stays NaN
  const R value = positive + log1p_of(exp_of(-magnitude));
  return x > T(20) ? x : value;
}

// softplus', with the same switch
template <class R>
SDI_HD R softplus_slope(R x) {
  using T = ScalarOf<R>;
  const R one = R{} + T(1);
  return x > T(20) ? one : sigmoid(x);
}

}  // namespace SDI_ISA
}  // namespace sdi
