// Launch API of marching and pruning. Twins: sdi_fast/reference/march.py and prune.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

// Two passes: count fills counts; fill writes the samples at first_sample.
template <class T>
struct MarchArgs {
  const T* origins;             // [n_rays, 3], scene units
  const T* directions;          // [n_rays, 3], unit length
  const T* jitter;              // [n_rays], scene units; may be null
  const uint8_t* occupancy;     // [resolution^3], index (x, y, z)
  int64_t* counts;              // [n_rays]; written by count
  const int64_t* first_sample;  // [n_rays]; read by fill
  int64_t* ray_indices;         // [n]; written by fill
  T* t_starts;                  // [n]
  T* t_ends;                    // [n]
  int64_t n_rays;
  int32_t resolution;
  double radius;     // scene units
  double step_size;  // scene units
  double near;       // scene units
};

// Two passes, as above: count also marks what is kept. A row of packed_info that leaves [0, n) is
// refused on the CPU; on the GPU it counts as empty.
template <class T>
struct PruneArgs {
  const T* density;             // [n], 1/scene unit
  const T* t_starts;            // [n]
  const T* t_ends;              // [n]
  const int64_t* packed_info;   // [n_rays, 2]
  uint8_t* keep;                // [n], zeroed by the caller; written by count, read by fill
  int64_t* counts;              // [n_rays]; written by count, read by fill
  const int64_t* first_sample;  // [n_rays]; read by fill
  int64_t* ray_indices_out;     // [kept]; written by fill
  T* t_starts_out;              // [kept]
  T* t_ends_out;                // [kept]
  int64_t n;
  int64_t n_rays;
  double early_stop_eps;  // transmittance
  double alpha_threshold;
};

}  // namespace sdi
