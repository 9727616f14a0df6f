// The occupancy grid's update of one cell (methods.md D, Marching).
#pragma once

#include "../occupancy.h"
#include "scalar.h"

namespace sdi {
namespace SDI_ISA {

// The larger one, NaN where either is: as torch.maximum.
template <class T>
SDI_HD T larger(T a, T b) {
  return b > a || !(b == b) ? b : a;
}

// What occupied cells exceed: min(mean, threshold), NaN where the mean is.
template <class T>
SDI_HD T occupied_above(double sum, int64_t n_cells, double threshold) {
  const T mean = static_cast<T>(sum / static_cast<double>(n_cells));
  return static_cast<T>(threshold) < mean ? static_cast<T>(threshold) : mean;
}

}  // namespace SDI_ISA
}  // namespace sdi
