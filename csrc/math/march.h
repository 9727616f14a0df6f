// Marching one ray through the occupancy grid (methods.md D, Marching).
//
// Sample k is [t0 + k dt, t0 + (k + 1) dt], k >= 0, kept if its midpoint's cell is inside and
// occupied. The arithmetic is the twin's, operation for operation (no fused multiply-add), so that
// both keep the same samples; runs of samples inside one cell are found from the cell's far face
// and stop a sample short of it, where the exact test takes over.
#pragma once

#include "../march.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
struct RayWalk {
  const MarchArgs<T>* args;
  T origin[3];
  T direction[3];
  T start;  // near + jitter
  T step;

  SDI_HD T begin_of(int64_t k) const { return start + static_cast<T>(k) * step; }
  SDI_HD T end_of(int64_t k) const { return start + (static_cast<T>(k) + T(1)) * step; }

  // Whether sample k is kept; `run` further samples after it share its cell, hence its answer.
  SDI_HD bool test(int64_t k, int64_t& run) const {
    const T radius = static_cast<T>(args->radius), side = static_cast<T>(2.0 * args->radius);
    const int n = args->resolution;
    const T middle = T(0.5) * (begin_of(k) + end_of(k));
    T until = T(1e30);
    int64_t index = 0;
    bool is_inside = true;
    run = 0;
    for (int a = 0; a < 3; ++a) {
      const T point = origin[a] + direction[a] * middle;
      const T cell = floor_of((point + radius) / side * static_cast<T>(n));
      is_inside = is_inside && cell >= T(0) && cell < static_cast<T>(n);
      if (!is_inside) return false;
      index = index * n + static_cast<int64_t>(cell);
      if (direction[a] != T(0)) {
        const T face = (cell + (direction[a] > T(0) ? T(1) : T(0))) / static_cast<T>(n) * side;
        until = min_of(until, (face - radius - point) / direction[a]);
      }
    }
    const T steps = floor_of(until / step) - T(1);
    run = steps > T(0) ? static_cast<int64_t>(min_of(steps, T(1e9))) : 0;
    return args->occupancy[index] != 0;
  }
};

template <class T>
SDI_HD RayWalk<T> make_walk(const MarchArgs<T>& a, int64_t ray) {
  RayWalk<T> walk;
  walk.args = &a;
  for (int c = 0; c < 3; ++c) {
    walk.origin[c] = a.origins[3 * ray + c];
    walk.direction[c] = a.directions[3 * ray + c];
  }
  walk.start = static_cast<T>(a.near);
  if (a.jitter) walk.start = walk.start + a.jitter[ray];
  walk.step = static_cast<T>(a.step_size);
  return walk;
}

// Steps [first, last) that cover the ray's way through the box, generous by a step at both ends.
template <class T>
SDI_HD void step_range(const RayWalk<T>& walk, int64_t& first, int64_t& last) {
  const T radius = static_cast<T>(walk.args->radius);
  T enter = T(-1e30), leave = T(1e30);
  for (int a = 0; a < 3; ++a) {
    const T low = (-radius - walk.origin[a]) / walk.direction[a];
    const T high = (radius - walk.origin[a]) / walk.direction[a];
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

// Calls emit(k) for every kept sample, in order.
template <class T, class Emit>
SDI_HD void walk_ray(const RayWalk<T>& walk, Emit&& emit) {
  int64_t k, last;
  step_range(walk, k, last);
  while (k < last) {
    int64_t run;
    const bool kept = walk.test(k, run);
    const int64_t stop = min_of(k + 1 + run, last);
    if (kept) {
      for (int64_t j = k; j < stop; ++j) emit(j);
    }
    k = stop;
  }
}

}  // namespace SDI_ISA
}  // namespace sdi
