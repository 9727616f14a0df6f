// Adam on one parameter (methods.md D, Optimiser), as torch.optim.Adam computes it.
#pragma once

#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
struct AdamConstants {
  T lerp1;  // 1 - beta1
  T beta2;
  T lerp2;         // 1 - beta2
  T inverse_root;  // 1 / sqrt(1 - beta2^step)
  T eps;
  T rate;  // lr / (1 - beta1^step)
};

template <class R, class T>
SDI_HD void adam_update(const AdamConstants<T>& c, R grad, R& param, R& exp_avg, R& exp_avg_sq) {
  exp_avg = exp_avg + c.lerp1 * (grad - exp_avg);
  exp_avg_sq = exp_avg_sq * c.beta2 + c.lerp2 * (grad * grad);
  param = param - c.rate * (exp_avg / (sqrt_of(exp_avg_sq) * c.inverse_root + c.eps));
}

}  // namespace SDI_ISA
}  // namespace sdi
