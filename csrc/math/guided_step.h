// Guidance and a DDIM step for one number of a latent (methods.md A, B3, C3, C6, C7).
// Twin: sdi_fast/reference/guided_step.py.
#pragma once

#include "../guided_step.h"
#include "philox.h"

namespace sdi {
namespace SDI_ISA {

constexpr double kPerpEps = 1e-6;  // sdi_fast/constants.py PERP_EPS

// What all numbers of a sample share.
template <class T>
struct StepNumbers {
  T signal, noise;            // sqrt(a), sqrt(1 - a)
  T signal_next, noise_next;  // the same at t_next
  T spread;                   // eta sqrt(V)
  T scale;
  T along[2];   // <n_i - u, d> / <d, d>
  T weight[2];  // of the negatives
};

template <class T>
SDI_HD T alpha_of(const GuidedStepArgs<T>& a, int64_t t) {
  const int64_t last = a.n_levels - 2;
  return T(a.levels[(t < 0 ? -1 : t > last ? last : t) + 1]);
}

// dots: <n_1 - u, d>, <n_2 - u, d>, <d, d>; unused without negatives
template <class T>
SDI_HD StepNumbers<T> step_numbers(const GuidedStepArgs<T>& a, int64_t sample, const T (&dots)[3]) {
  StepNumbers<T> s{};
  const T level = alpha_of(a, a.t[sample]);
  s.signal = sqrt_of(level);
  s.noise = sqrt_of(T(1) - level);
  s.scale = static_cast<T>(a.scale);
  if (a.t_next) {
    const T next = alpha_of(a, a.t_next[sample]);
    s.signal_next = sqrt_of(next);
    s.noise_next = sqrt_of(T(1) - next);
    // 1 - next / level as (level - next) / level, whose difference is exact for near levels
    const T v = (T(1) - level) * (level - next) / ((T(1) - next) * level);
    s.spread = static_cast<T>(a.eta) * sqrt_of(v < T(0) ? T(0) : v);
  }
  if (a.n_conditions == 4) {
    const T length = max_of(dots[2], static_cast<T>(kPerpEps));
    for (int i = 0; i < 2; ++i) {
      s.along[i] = dots[i] / length;
      s.weight[i] = a.neg_weights[2 * sample + i];
    }
  }
  return s;
}

// The guided output of one number from its K raw ones.
template <class T>
SDI_HD T guided_of(const GuidedStepArgs<T>& a, const StepNumbers<T>& s, const T (&o)[4]) {
  const T d = o[0] - o[1];
  if (a.n_conditions == 2) {
    return (a.flags & kPaperConvention ? o[1] : o[0]) + s.scale * d;
  }
  T total = d;
  for (int i = 0; i < 2; ++i) total += s.weight[i] * ((o[2 + i] - o[1]) - s.along[i] * d);
  return o[1] + s.scale * total;
}

// x at t_next, or z; xi is the noise.
template <class T>
SDI_HD T stepped(const GuidedStepArgs<T>& a, const StepNumbers<T>& s, T x, T output, T xi, T& eps) {
  T x0;
  if (a.flags & kVPrediction) {
    x0 = s.signal * x - s.noise * output;
    eps = s.signal * output + s.noise * x;
  } else {
    x0 = (x - s.noise * output) / s.signal;
    eps = output;
  }
  if (!a.t_next) return x0;
  const T moved = s.signal_next * x0 + s.noise_next * eps;
  return a.noise || a.rng ? moved + s.spread * xi : moved;
}

}  // namespace SDI_ISA
}  // namespace sdi
