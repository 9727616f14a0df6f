// Launch API of the losses on single rays. Twin: sdi_fast/reference/ray_losses.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

constexpr int kRayLosses = 4;  // orient, sparsity, opaque, z_variance
constexpr int kRaySums = 6;    // these four's, and the counts of rays with O > 0 and O > .5
constexpr int kRayLossesMaxBlocks = 512;  // of the CUDA forward: rows of its workspace

template <class T>
struct RayLossesArgs {
  const T* opacity;      // [n]
  const T* orient;       // [n]; forward only
  const T* z_variance;   // [n]; forward only
  T* losses;             // [kRayLosses]; forward only
  double* counts;        // [2], at least 1: rays with O > 0 and with O > .5; backward reads them
  const T* grad_losses;  // [kRayLosses]; backward only
  T* grad_opacity;       // [n]; backward only
  T* grad_orient;        // [n]; backward only
  T* grad_z_variance;    // [n]; backward only
  double* workspace;     // [kRayLossesMaxBlocks, kRaySums]; CUDA forward only
  int64_t n;
};

}  // namespace sdi
