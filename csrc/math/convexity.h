// SDI's convexity loss on one normal map (methods.md D, Losses).
//
// M = bilinear 8 x 8 map (align_corners false, no antialias);
// loss = -(mean [M(r, c) x M(r, c+1)]_3 + mean [M(r+1, c) x M(r, c)]_3) over all maps of the batch.
#pragma once

#include "../convexity.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

constexpr int kMapSide = 8;

template <class T>
struct Taps {  // two source rows (or columns) and the second's weight
  int64_t low, high;
  T share;
};

template <class T>
SDI_HD Taps<T> taps_of(int i, int64_t n) {
  const T source =
      max_of((static_cast<T>(i) + T(0.5)) * (static_cast<T>(n) / T(kMapSide)) - T(0.5), T(0));
  const int64_t low = min_of(static_cast<int64_t>(source), n - 1);
  return {low, min_of(low + 1, n - 1), source - static_cast<T>(low)};
}

// The first two components of the 8 x 8 map; the third does not enter.
template <class T>
SDI_HD void sample_map(const T* normals, int64_t height, int64_t width,
                       T map[kMapSide][kMapSide][2]) {
  for (int r = 0; r < kMapSide; ++r) {
    const Taps<T> y = taps_of<T>(r, height);
    for (int c = 0; c < kMapSide; ++c) {
      const Taps<T> x = taps_of<T>(c, width);
      for (int k = 0; k < 2; ++k) {
        const T* plane = normals + k;
        const T top = plane[3 * (y.low * width + x.low)] * (T(1) - x.share) +
                      plane[3 * (y.low * width + x.high)] * x.share;
        const T bottom = plane[3 * (y.high * width + x.low)] * (T(1) - x.share) +
                         plane[3 * (y.high * width + x.high)] * x.share;
        map[r][c][k] = top * (T(1) - y.share) + bottom * y.share;
      }
    }
  }
}

template <class T>
SDI_HD T cross_third(const T a[2], const T b[2]) {
  return a[0] * b[1] - a[1] * b[0];
}

// Sum of both cross-product terms of one map.
template <class T>
SDI_HD T convexity_sum(const T* normals, int64_t height, int64_t width) {
  T map[kMapSide][kMapSide][2];
  sample_map(normals, height, width, map);
  T sum = T(0);
  for (int r = 0; r < kMapSide; ++r) {
    for (int c = 0; c + 1 < kMapSide; ++c) sum += cross_third(map[r][c], map[r][c + 1]);
  }
  for (int r = 0; r + 1 < kMapSide; ++r) {
    for (int c = 0; c < kMapSide; ++c) sum += cross_third(map[r + 1][c], map[r][c]);
  }
  return sum;
}

// Adds scale * d sum / d normals.
template <class T>
SDI_HD void convexity_backward(const T* normals, int64_t height, int64_t width, T scale,
                               T* grad_normals) {
  T map[kMapSide][kMapSide][2], grad[kMapSide][kMapSide][2] = {};
  sample_map(normals, height, width, map);
  auto add_pair = [&](int r, int c, int r2, int c2) {  // of a x b: d a = (b1, -b0), d b = (-a1, a0)
    grad[r][c][0] += map[r2][c2][1];
    grad[r][c][1] -= map[r2][c2][0];
    grad[r2][c2][0] -= map[r][c][1];
    grad[r2][c2][1] += map[r][c][0];
  };
  for (int r = 0; r < kMapSide; ++r) {
    for (int c = 0; c + 1 < kMapSide; ++c) add_pair(r, c, r, c + 1);
  }
  for (int r = 0; r + 1 < kMapSide; ++r) {
    for (int c = 0; c < kMapSide; ++c) add_pair(r + 1, c, r, c);
  }
  for (int r = 0; r < kMapSide; ++r) {
    const Taps<T> y = taps_of<T>(r, height);
    for (int c = 0; c < kMapSide; ++c) {
      const Taps<T> x = taps_of<T>(c, width);
      for (int k = 0; k < 2; ++k) {
        const T g = scale * grad[r][c][k];
        T* plane = grad_normals + k;
        plane[3 * (y.low * width + x.low)] += g * (T(1) - y.share) * (T(1) - x.share);
        plane[3 * (y.low * width + x.high)] += g * (T(1) - y.share) * x.share;
        plane[3 * (y.high * width + x.low)] += g * y.share * (T(1) - x.share);
        plane[3 * (y.high * width + x.high)] += g * y.share * x.share;
      }
    }
  }
}

}  // namespace SDI_ISA
}  // namespace sdi
