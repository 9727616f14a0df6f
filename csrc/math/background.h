// Environment background of one direction: SH of bands 0 to 2, MLP 9-16-16-3, sigmoid
// (methods.md D, Background). Twin: sdi_fast/reference/background.py.
#pragma once

#include "mlp.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

constexpr int kSh = 9;
constexpr int kBgHidden = 16;

// Everything that the backward needs of one direction.
template <class R>
struct BackgroundState {
  R sh[kSh];
  R h1[kBgHidden];  // after ReLU
  R h2[kBgHidden];  // after ReLU
  R rgb[3];
};

// tiny-cuda-nn's order and signs
template <class R>
SDI_HD void spherical_harmonics(const R d[3], R out[kSh]) {
  using T = ScalarOf<R>;
  const R x = d[0], y = d[1], z = d[2];
  out[0] = R{} + T(0.28209479177387814);
  out[1] = T(-0.48860251190291987) * y;
  out[2] = T(0.48860251190291987) * z;
  out[3] = T(-0.48860251190291987) * x;
  out[4] = T(1.0925484305920792) * x * y;
  out[5] = T(-1.0925484305920792) * y * z;
  out[6] = T(0.94617469575755997) * z * z - T(0.31539156525251999);
  out[7] = T(-1.0925484305920792) * x * z;
  out[8] = T(0.54627421529603959) * (x * x - y * y);
}

template <int kIn, int kOut, class R, class T>
SDI_HD void small_dense(const T* w, const R* in, R* out) {  // w [kOut, kIn], as torch.nn.Linear's
  for (int o = 0; o < kOut; ++o) {
    R sum = in[0] * w[o * kIn];
    for (int i = 1; i < kIn; ++i) sum += in[i] * w[o * kIn + i];
    out[o] = sum;
  }
}

template <class R, class T>
SDI_HD void background_forward(const R d[3], const T* w1, const T* w2, const T* w3,
                               BackgroundState<R>& s) {
  spherical_harmonics(d, s.sh);
  small_dense<kSh, kBgHidden>(w1, s.sh, s.h1);
  for (int h = 0; h < kBgHidden; ++h) s.h1[h] = relu(s.h1[h]);
  small_dense<kBgHidden, kBgHidden>(w2, s.h1, s.h2);
  for (int h = 0; h < kBgHidden; ++h) s.h2[h] = relu(s.h2[h]);
  small_dense<kBgHidden, 3>(w3, s.h2, s.rgb);
  for (int c = 0; c < 3; ++c) s.rgb[c] = sigmoid(s.rgb[c]);
}

// Gradients at the three layers' outputs before activation: g1, g2 [16], g3 [3].
template <class R, class T>
SDI_HD void background_backward(const BackgroundState<R>& s, const R grad_rgb[3], const T* w2,
                                const T* w3, R g1[kBgHidden], R g2[kBgHidden], R g3[3]) {
  for (int c = 0; c < 3; ++c) g3[c] = grad_rgb[c] * s.rgb[c] * (T(1) - s.rgb[c]);
  for (int h = 0; h < kBgHidden; ++h) {
    R sum = g3[0] * w3[h];
    for (int c = 1; c < 3; ++c) sum += g3[c] * w3[c * kBgHidden + h];
    g2[h] = gate(s.h2[h], sum);
  }
  for (int h = 0; h < kBgHidden; ++h) {
    R sum = g2[0] * w2[h];
    for (int o = 1; o < kBgHidden; ++o) sum += g2[o] * w2[o * kBgHidden + h];
    g1[h] = gate(s.h1[h], sum);
  }
}

}  // namespace SDI_ISA
}  // namespace sdi
