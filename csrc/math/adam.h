// Adam on one parameter (methods.md D, Optimiser), as torch.optim.Adam computes it.
#pragma once

#include "../adam.h"
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

SDI_HD double one_minus_power(double beta, int64_t step) {
  return 1.0 - pow(beta, static_cast<double>(step));
}

template <class T>
SDI_HD AdamConstants<T> adam_constants(const AdamArgs<T>& a, int64_t step, double lr) {
  return {
      static_cast<T>(1.0 - a.beta1), static_cast<T>(a.beta2),
      static_cast<T>(1.0 - a.beta2), static_cast<T>(1.0 / sqrt_of(one_minus_power(a.beta2, step))),
      static_cast<T>(a.eps),         static_cast<T>(lr / one_minus_power(a.beta1, step))};
}

template <class R, class T>
SDI_HD void adam_update(const AdamConstants<T>& c, R grad, R& param, R& exp_avg, R& exp_avg_sq) {
  exp_avg = exp_avg + c.lerp1 * (grad - exp_avg);
  exp_avg_sq = exp_avg_sq * c.beta2 + c.lerp2 * (grad * grad);
  param = param - c.rate * (exp_avg / (sqrt_of(exp_avg_sq) * c.inverse_root + c.eps));
}

// Whether the step moves a parameter: from zeros it does not, by 0 / (0 + eps). NaN moves it.
template <class T>
SDI_HD bool is_moving(const AdamConstants<T>& c, T grad, T exp_avg, T exp_avg_sq) {
  return !(grad == T(0)) | !(exp_avg == T(0)) | !(exp_avg_sq == T(0)) | (c.eps == T(0));
}

}  // namespace SDI_ISA
}  // namespace sdi
