// The guided DDIM step on the CPU (methods.md C3, C6, C7).
// Twin: sdi_fast/reference/guided_step.py. Maths: math/guided_step.h.
//
// One sample after the other, since latents are small: the dot products of Perp-Neg, then every
// number. Precision: T, the dot products in double, the drawn noise in f32. Numbers per number of
// x: K + 1 read twice and 2 written.
#include "../math/guided_step.h"

#include "dispatch.h"
#include "parallel.h"

namespace sdi {
namespace SDI_ISA {
namespace {

template <class T>
void step_sample(const GuidedStepArgs<T>& a, int64_t sample) {
  const int64_t n = a.channels * a.pixels, stride = a.batch * n, first = sample * n;
  const T* outputs = static_cast<const T*>(a.outputs) + first;
  double sums[3] = {};
  if (a.n_conditions == 4) {
    for (int64_t j = 0; j < n; ++j) {
      const double u = outputs[stride + j], d = outputs[j] - u;
      sums[0] += (outputs[2 * stride + j] - u) * d;
      sums[1] += (outputs[3 * stride + j] - u) * d;
      sums[2] += d * d;
    }
  }
  const T dots[3] = {static_cast<T>(sums[0]), static_cast<T>(sums[1]), static_cast<T>(sums[2])};
  const StepNumbers<T> s = step_numbers(a, sample, dots);
  const bool lives = !a.lengths || a.lengths[sample] > a.step;
  const bool draws = !a.noise && a.rng && a.eta != 0.0;
  float normals[4] = {};
  for (int64_t j = 0; j < n; ++j) {
    if (draws && j % 4 == 0) {
      philox_normals(static_cast<uint64_t>(a.rng[0]), static_cast<uint64_t>(a.rng[1] + a.draw),
                     static_cast<uint32_t>(sample), static_cast<uint32_t>(j / 4), normals);
    }
    const int64_t at = a.flags & kChannelsLast ? j % a.pixels * a.channels + j / a.pixels : j;
    T o[4] = {}, eps;
    for (int k = 0; k < a.n_conditions; ++k) o[k] = outputs[k * stride + at];
    const T xi = a.noise ? a.noise[first + j] : static_cast<T>(normals[j % 4]);
    const T moved = stepped(a, s, a.x[first + j], guided_of(a, s, o), xi, eps);
    a.result[first + j] = lives ? moved : a.x[first + j];
    if (a.eps) a.eps[first + j] = eps;
  }
}

}  // namespace

template <class T>
int launch_guided_step(const GuidedStepArgs<T>& a, int n_threads) {
  if (a.flags & (kHalfOutputs | kBf16Outputs)) return kBadArgument;
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(static)
  for (int64_t sample = 0; sample < a.batch; ++sample) step_sample(a, sample);
  return kOk;
}

SDI_INSTANTIATE(guided_step, GuidedStepArgs)

}  // namespace SDI_ISA
}  // namespace sdi
