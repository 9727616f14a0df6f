// Launch API of the occupancy update. Twin: sdi_fast/reference/occupancy.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

template <class T>
struct OccupancyArgs {
  T* occs;               // [n_cells], density * dt; in place
  const int64_t* cells;  // [m], in [0, n_cells), repeats allowed
  const T* values;       // [m], density * dt
  uint8_t* occupied;     // [n_cells], out
  int64_t n_cells;
  int64_t m;
  double decay;
  double threshold;
};

}  // namespace sdi
