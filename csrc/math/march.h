// Marching one ray through the occupancy grid (methods.md D, Marching).
//
// Sample k is [t0 + k dt, t0 + (k + 1) dt], k >= 0, kept if its midpoint's cell is inside and
// occupied. The arithmetic is the twin's, operation for operation (no fused multiply-add:
// mul_exact, add_exact), so that both keep the same samples. The single ops test every step through
// the box: a whole pack (or warp) of steps at a time costs less than finding where the ray leaves
// each cell.
#pragma once

#include "../march.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
struct RayWalk {
  T origin[3];     // scene units
  T direction[3];  // unit length
  T start;         // near + jitter
  T step;
  T radius;
  T side;  // 2 radius
  T resolution;
};

template <class T>
SDI_HD RayWalk<T> make_walk(const MarchArgs<T>& a, int64_t ray) {
  RayWalk<T> walk;
  for (int c = 0; c < 3; ++c) {
    walk.origin[c] = a.origins[3 * ray + c];
    walk.direction[c] = a.directions[3 * ray + c];
  }
  walk.start = static_cast<T>(a.near);
  if (a.jitter) walk.start = add_exact(walk.start, a.jitter[ray]);
  walk.step = static_cast<T>(a.step_size);
  walk.radius = static_cast<T>(a.radius);
  walk.side = static_cast<T>(2.0 * a.radius);
  walk.resolution = static_cast<T>(a.resolution);
  return walk;
}

// Step k begins here and ends where step k + 1 begins.
template <class R, class T>
SDI_HD R begin_of(const RayWalk<T>& walk, R k) {
  return add_exact(walk.start, mul_exact(k, walk.step));
}

// Cells [3] of the midpoints of steps k, and whether they are inside the box (else they are 0).
template <class R, class T>
SDI_HD auto cells_of(const RayWalk<T>& walk, R k, IndexOf<R> cell[3]) {
  const R middle = mul_exact(T(0.5), add_exact(begin_of(walk, k), begin_of(walk, k + T(1))));
  R position[3];
  for (int a = 0; a < 3; ++a) {
    const R point = add_exact(walk.origin[a], mul_exact(walk.direction[a], middle));
    position[a] = mul_exact(add_exact(point, walk.radius) / walk.side, walk.resolution);
  }
  const auto inside = (position[0] >= T(0)) & (position[0] < walk.resolution) &
                      (position[1] >= T(0)) & (position[1] < walk.resolution) &
                      (position[2] >= T(0)) & (position[2] < walk.resolution);
  for (int a = 0; a < 3; ++a) cell[a] = to_index(inside ? position[a] : R{});
  return inside;
}

// Steps [first, last) that cover the ray's way through the box, generous by a step at both ends.
template <class T>
SDI_HD void step_range(const RayWalk<T>& walk, int64_t& first, int64_t& last) {
  T enter = T(-1e30), leave = T(1e30);
  for (int a = 0; a < 3; ++a) {
    const T low = (-walk.radius - walk.origin[a]) / walk.direction[a];
    const T high = (walk.radius - walk.origin[a]) / walk.direction[a];
    if (!(low == low) || !(high == high)) continue;  // 0 / 0: on a face, along the face
    enter = max_of(enter, min_of(low, high));
    leave = min_of(leave, max_of(low, high));
  }
  const T from = max_of(floor_of((enter - walk.start) / walk.step - T(0.5)), T(1)) - T(1);
  const T to = ceil_of((leave - walk.start) / walk.step - T(0.5)) + T(1);
  const bool hit = leave >= enter && to > from && to < T(1e9);
  first = hit ? static_cast<int64_t>(from) : 0;
  last = hit ? static_cast<int64_t>(to) : 0;
}

}  // namespace SDI_ISA
}  // namespace sdi
