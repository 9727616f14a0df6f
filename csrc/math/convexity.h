// SDI's convexity loss on one normal map (methods.md D, Losses; G6).
//
// M = bilinear 8 x 8 map (align_corners false, no antialias) of the first two components, which are
// the normals' own, or those of the decoded normals 2 n - O in axes fixed to the camera;
// loss = -(sum [M(r, c) x M(r, c+1)]_3 + sum [M(r+1, c) x M(r, c)]_3) / (56 B), M = 0 beyond its
// edge.
//
// Backward: with V(r, c+1) - V(r, c-1) + V(r-1, c) - V(r+1, c) =: K V, the sums' gradients at M are
// K M_2 and -K M_1, and a pixel (y, x) gets sum_rc Y(y, r) X(x, c) of them, where Y(y, r) is the
// share that pixel row y has in map row r, and X alike: taps that coincide add up in one place.
//
// In double whatever T is: the loss cancels, and 256 pixels cost nothing.
#pragma once

#include "../convexity.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

constexpr int kMapSide = 8;
constexpr int kMapPairs = kMapSide * (kMapSide - 1);  // of neighbours, a direction and map
constexpr int kTaps = 2 * kMapSide;                   // pixel rows (or columns) that the map reads

struct Taps {  // two pixel rows (or columns) and the second's weight
  int64_t low, high;
  double share;  // a multiple of 1 / 16: exact
};

// Map row (or column) i of n pixels.
SDI_HD Taps taps_of(int i, int64_t n) {
  const int64_t source = (2 * i + 1) * n - kMapSide;  // (i + .5) n / 8 - .5 in 16ths of a pixel
  const int64_t inside = source < 0 ? 0 : source;
  const int64_t low = inside / kTaps;
  return {low, low + 1 < n ? low + 1 : n - 1,
          static_cast<double>(inside - low * kTaps) * (1.0 / kTaps)};
}

// Taps 2 i and 2 i + 1 are map row i's two pixels.
SDI_HD int64_t pixel_of_tap(int tap, int64_t n) {
  const Taps taps = taps_of(tap / 2, n);
  return tap % 2 ? taps.high : taps.low;
}

// What pixel row (or column) `pixel` counts in map row (or column) i.
SDI_HD double share_in(int i, int64_t pixel, int64_t n) {
  const Taps taps = taps_of(i, n);
  return (pixel == taps.low ? 1.0 - taps.share : 0.0) + (pixel == taps.high ? taps.share : 0.0);
}

template <class T>
struct NormalView {
  const T* normals;   // [height, width, 3]
  const T* opacity;   // [height, width] or null
  double axes[2][3];  // the map's two components; with opacity only
  int64_t height, width;
};

template <class T>
SDI_HD NormalView<T> view_of(const ConvexityArgs<T>& a, int64_t b) {
  const int64_t pixels = a.height * a.width;
  NormalView<T> view{a.normals + 3 * pixels * b, nullptr, {}, a.height, a.width};
  if (!a.opacity) return view;
  view.opacity = a.opacity + pixels * b;
  for (int i = 0; i < 3; ++i) {
    const T* row = a.c2w + 12 * b + 4 * i;
    view.axes[0][i] = row[2];
    view.axes[1][i] = (static_cast<double>(row[0]) + row[1]) * 0.70710678118654752;
  }
  return view;
}

// The map's two components at (r, c).
template <class T>
SDI_HD void sample_map(const NormalView<T>& view, int r, int c, double out[2]) {
  const Taps y = taps_of(r, view.height), x = taps_of(c, view.width);
  double sum[3] = {0, 0, 0};
  for (int corner = 0; corner < 4; ++corner) {
    const int64_t pixel =
        (corner & 2 ? y.high : y.low) * view.width + (corner & 1 ? x.high : x.low);
    const double weight =
        (corner & 2 ? y.share : 1.0 - y.share) * (corner & 1 ? x.share : 1.0 - x.share);
    const T* n = view.normals + 3 * pixel;
    if (view.opacity) {
      const double opacity = view.opacity[pixel];
      for (int k = 0; k < 3; ++k) sum[k] += weight * (2.0 * n[k] - opacity);
    } else {
      for (int k = 0; k < 2; ++k) sum[k] += weight * n[k];
    }
  }
  for (int k = 0; k < 2; ++k) {
    const double* axis = view.axes[k];
    out[k] = view.opacity ? axis[0] * sum[0] + axis[1] * sum[1] + axis[2] * sum[2] : sum[k];
  }
}

using NormalMap = double[kMapSide][kMapSide][2];

// The cross products of (r, c) with its right and its lower neighbour.
SDI_HD double convexity_at(const NormalMap& map, int r, int c) {
  const double* here = map[r][c];
  double sum = 0;
  if (c + 1 < kMapSide) sum += here[0] * map[r][c + 1][1] - here[1] * map[r][c + 1][0];
  if (r + 1 < kMapSide) sum += map[r + 1][c][0] * here[1] - map[r + 1][c][1] * here[0];
  return sum;
}

// scale * d (sum of all cross products) / d M(r, c).
SDI_HD void convexity_gradient(const NormalMap& map, int r, int c, double scale, double out[2]) {
  double curl[2] = {0, 0};
  for (int k = 0; k < 2; ++k) {
    if (c + 1 < kMapSide) curl[k] += map[r][c + 1][k];
    if (c > 0) curl[k] -= map[r][c - 1][k];
    if (r > 0) curl[k] += map[r - 1][c][k];
    if (r + 1 < kMapSide) curl[k] -= map[r + 1][c][k];
  }
  out[0] = scale * curl[1];
  out[1] = -scale * curl[0];
}

// One pixel row's part of the map's gradient: sum over r of Y(y, r) grad(r, c).
SDI_HD double row_gradient(const NormalMap& grad, int64_t y, int64_t height, int c, int k) {
  double sum = 0;
  for (int r = 0; r < kMapSide; ++r) sum += share_in(r, y, height) * grad[r][c][k];
  return sum;
}

// Pixel (y, x)'s gradients, from its row's.
template <class T>
SDI_HD void write_pixel_gradient(const NormalView<T>& view, const double row[kMapSide][2],
                                 int64_t y, int64_t x, T* grad_normals, T* grad_opacity) {
  double at_map[2] = {0, 0};
  for (int c = 0; c < kMapSide; ++c) {
    const double share = share_in(c, x, view.width);
    for (int k = 0; k < 2; ++k) at_map[k] += share * row[c][k];
  }
  const int64_t pixel = y * view.width + x;
  T* out = grad_normals + 3 * pixel;
  if (!view.opacity) {
    for (int k = 0; k < 2; ++k) out[k] = static_cast<T>(at_map[k]);
    return;
  }
  double sum = 0;
  for (int i = 0; i < 3; ++i) {
    const double grad = at_map[0] * view.axes[0][i] + at_map[1] * view.axes[1][i];
    out[i] = static_cast<T>(2.0 * grad);
    sum -= grad;
  }
  grad_opacity[pixel] = static_cast<T>(sum);
}

}  // namespace SDI_ISA
}  // namespace sdi
