// Multiresolution hash grid, one level at one point (methods.md D, Geometry).
//
// position = u * scale + 0.5, cell = floor(position), trilinear over the cell's eight corners.
// Corner k is +1 along x, y, z where bits 0, 1, 2 of k are set. Dense levels index x + y R + z R^2
// (one past a face wraps, as in tiny-cuda-nn), others XOR coordinate * prime, both modulo the size.
// Table reads: 8 corners * F numbers a level.
#pragma once

#include "../grid_spec.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

constexpr uint32_t kPrimeY = 2654435761u;
constexpr uint32_t kPrimeZ = 805459861u;

template <class T>
struct Level {
  const T* entries;  // [size, F]
  T scale;
  uint32_t size;
  uint32_t resolution;
  bool is_dense;
};

template <class T>
SDI_HD Level<T> level_of(const GridSpec& grid, int level, const T* table) {
  return {table + grid.offset[level] * grid.n_features, static_cast<T>(grid.scale[level]),
          static_cast<uint32_t>(grid.offset[level + 1] - grid.offset[level]),
          static_cast<uint32_t>(grid.resolution[level]), grid.is_dense[level] != 0};
}

template <class R>
struct Cell {
  IndexOf<R> index[8];  // entries of the corners, in [0, size)
  R x, y, z;            // offset inside the cell, in [0, 1)
};

// u is clamped to [0, 1], so that no index leaves the level whatever comes in.
template <class R>
SDI_HD void split(R u, ScalarOf<R> scale, IndexOf<R>& corner, R& offset) {
  using T = ScalarOf<R>;
  const R zero = R{}, one = R{} + T(1);
  R inside = u > T(0) ? u : zero;  // NaN too
  inside = inside < T(1) ? inside : one;
  const R position = inside * scale + T(0.5);
  corner = to_index(position);
  R floor;
  to_real(corner, floor);
  offset = position - floor;
}

template <class R, class T>
SDI_HD Cell<R> locate(const Level<T>& level, const R u[3]) {
  using I = IndexOf<R>;
  Cell<R> cell;
  I x, y, z;
  split(u[0], level.scale, x, cell.x);
  split(u[1], level.scale, y, cell.y);
  split(u[2], level.scale, z, cell.z);
  const uint32_t step_y = level.is_dense ? level.resolution : kPrimeY;
  const uint32_t step_z = level.is_dense ? level.resolution * level.resolution : kPrimeZ;
  const I y0 = y * step_y, z0 = z * step_z;
  const I xs[2] = {x, x + 1u}, ys[2] = {y0, y0 + step_y}, zs[2] = {z0, z0 + step_z};
  for (int k = 0; k < 8; ++k) {
    const I a = xs[k & 1], b = ys[(k >> 1) & 1], c = zs[k >> 2];
    if (level.is_dense) {
      const I index = a + b + c;  // < 2 size: the overhang is at most one row, plane and point
      cell.index[k] = index >= level.size ? index - level.size : index;
    } else {
      cell.index[k] = (a ^ b ^ c) & (level.size - 1u);
    }
  }
  return cell;
}

template <class R>
SDI_HD void corner_weights(const Cell<R>& cell, R weights[8]) {
  using T = ScalarOf<R>;
  const R xs[2] = {T(1) - cell.x, cell.x};
  const R ys[2] = {T(1) - cell.y, cell.y};
  const R zs[2] = {T(1) - cell.z, cell.z};
  for (int k = 0; k < 8; ++k) weights[k] = xs[k & 1] * ys[(k >> 1) & 1] * zs[k >> 2];
}

// (d weight / d u) . p, p already multiplied by the level's scale
template <class R>
SDI_HD void corner_slopes(const Cell<R>& cell, const R p[3], R slopes[8]) {
  using T = ScalarOf<R>;
  const R xs[2] = {T(1) - cell.x, cell.x};
  const R ys[2] = {T(1) - cell.y, cell.y};
  const R zs[2] = {T(1) - cell.z, cell.z};
  for (int k = 0; k < 8; ++k) {
    const R a = xs[k & 1], b = ys[(k >> 1) & 1], c = zs[k >> 2];
    const R px = (k & 1) ? p[0] : -p[0];
    const R py = (k & 2) ? p[1] : -p[1];
    const R pz = (k & 4) ? p[2] : -p[2];
    slopes[k] = px * (b * c) + py * (a * c) + pz * (a * b);
  }
}

template <class R>
SDI_HD R interpolate(const Cell<R>& cell, const R v[8]) {
  R plane[2];
  for (int z = 0; z < 2; ++z) {
    const R low = v[4 * z] + cell.x * (v[4 * z + 1] - v[4 * z]);
    const R high = v[4 * z + 2] + cell.x * (v[4 * z + 3] - v[4 * z + 2]);
    plane[z] = low + cell.y * (high - low);
  }
  return plane[0] + cell.z * (plane[1] - plane[0]);
}

// The value and its derivative by the offset.
template <class R>
SDI_HD R interpolate_with_slope(const Cell<R>& cell, const R v[8], R slope[3]) {
  R value[2], by_x[2], by_y[2];
  for (int z = 0; z < 2; ++z) {
    const R dx_low = v[4 * z + 1] - v[4 * z], dx_high = v[4 * z + 3] - v[4 * z + 2];
    const R low = v[4 * z] + cell.x * dx_low, high = v[4 * z + 2] + cell.x * dx_high;
    value[z] = low + cell.y * (high - low);
    by_x[z] = dx_low + cell.y * (dx_high - dx_low);
    by_y[z] = high - low;
  }
  slope[0] = by_x[0] + cell.z * (by_x[1] - by_x[0]);
  slope[1] = by_y[0] + cell.z * (by_y[1] - by_y[0]);
  slope[2] = value[1] - value[0];
  return value[0] + cell.z * slope[2];
}

// features[f] and, if asked for, jacobian[3 f + axis] = d feature / d u
template <bool kWithJacobian, class R, class T>
SDI_HD void encode_level(const Level<T>& level, int n_features, const R u[3], R* features,
                         R* jacobian) {
  const Cell<R> cell = locate(level, u);
  for (int f = 0; f < n_features; f += 2) {
    const bool has_pair = f + 1 < n_features;
    R v[2][8];
    for (int k = 0; k < 8; ++k) {
      if (has_pair) {
        gather_pair(level.entries, cell.index[k], n_features, f, v[0][k], v[1][k]);
      } else {
        v[0][k] = gather(level.entries, cell.index[k], n_features, f);
      }
    }
    for (int g = 0; g < 2; ++g) {  // constant bounds, so that v stays in registers
      if (f + g == n_features) break;
      if (kWithJacobian) {
        R slope[3];
        features[f + g] = interpolate_with_slope(cell, v[g], slope);
        for (int a = 0; a < 3; ++a) jacobian[3 * (f + g) + a] = slope[a] * level.scale;
      } else {
        features[f + g] = interpolate(cell, v[g]);
      }
    }
  }
}

}  // namespace SDI_ISA
}  // namespace sdi
