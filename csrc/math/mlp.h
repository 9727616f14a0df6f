// Small dense layers without bias, one sample (or pack of samples) at a time.
//
// Weights come transposed and padded: w[i * n_out + o], n_out a multiple of kPad, zeros in the
// padding, so that a tile of outputs stays in registers while the inputs stream past.
#pragma once

#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

constexpr int kTile = 8;  // outputs held in registers
constexpr int kPad = 16;  // a multiple of kTile and of every pack's width

SDI_HD int padded(int n) { return (n + kPad - 1) / kPad * kPad; }

// out[o] = sum_i w[i, o] in[i]; n_out is padded, and so is out
template <class R, class T>
SDI_HD void dense(const T* w, int n_in, int n_out, const R* in, R* out) {
  for (int o = 0; o < n_out; o += kTile) {
    R sums[kTile] = {};
    for (int i = 0; i < n_in; ++i) {
      const R value = in[i];
      const T* row = w + i * n_out + o;
      for (int k = 0; k < kTile; ++k) sums[k] += value * row[k];
    }
    for (int k = 0; k < kTile; ++k) out[o + k] = sums[k];
  }
}

// out[o] = sum_h w[o * n + h] in[h] for a few outputs; n a multiple of kPad
template <int kOut, class R, class T>
SDI_HD void output_layer(const T* w, int n, const R* in, R* out) {
  constexpr int kWays = 4;  // independent sums, since one would wait for itself
  R sums[kOut][kWays] = {};
  for (int h = 0; h < n; h += kWays) {
    for (int k = 0; k < kWays; ++k) {
      for (int o = 0; o < kOut; ++o) sums[o][k] += in[h + k] * w[o * n + h + k];
    }
  }
  for (int o = 0; o < kOut; ++o) out[o] = (sums[o][0] + sums[o][1]) + (sums[o][2] + sums[o][3]);
}

template <class R>
SDI_HD R relu(R x) {
  using T = ScalarOf<R>;
  return x < T(0) ? R{} : x;  // NaN stays NaN
}

// 1[x > 0] * value
template <class R>
SDI_HD R gate(R x, R value) {
  using T = ScalarOf<R>;
  return x > T(0) ? value : R{};
}

}  // namespace SDI_ISA
}  // namespace sdi
