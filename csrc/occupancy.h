// Launch API of the occupancy update. Twin: sdi_fast/reference/occupancy.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

constexpr int kOccupancyMaxBlocks = 256;  // of the CUDA update: numbers of its partial sums

template <class T>
struct OccupancyArgs {
  T* occs;               // [n_cells], density * dt; in place
  const int64_t* cells;  // [m], in [0, n_cells), repeats allowed; the GPU passes over one outside
  const T* values;       // [m], density * dt, >= 0
  uint8_t* occupied;     // [n_cells], out
  uint64_t* largest;     // [n_cells], zeros; CUDA only
  double* partial_sums;  // [kOccupancyMaxBlocks]; CUDA only
  int64_t n_cells;
  int64_t m;
  double decay;
  double threshold;
};

}  // namespace sdi
