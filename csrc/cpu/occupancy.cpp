// The occupancy grid's update on the CPU (methods.md D, Marching).
// Twin: sdi_fast/reference/occupancy.py. Maths: math/occupancy.h.
//
// Serial: 32768 cells. A cell given more than once decays once and takes its largest value, NaN
// above all, so that the order of `cells` does not matter.
// Precision: T, the mean's sum in double. Per cell: 1 number read and written, a byte written.
#include "../math/occupancy.h"

#include "dispatch.h"
#include "parallel.h"
#include "ranges.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
int launch_occupancy_update(const OccupancyArgs<T>& a, int) {
  if (!indices_fit(a.cells, a.m, a.n_cells)) return kBadArgument;
  Buffer<uint8_t> touched(a.n_cells);
  if (!touched.ok()) return kOutOfMemory;
  for (int64_t i = 0; i < a.n_cells; ++i) touched.get()[i] = 0;
  const T decay = static_cast<T>(a.decay);
  for (int64_t j = 0; j < a.m; ++j) {
    T& cell = a.occs[a.cells[j]];
    if (!touched.get()[a.cells[j]]) cell *= decay;
    touched.get()[a.cells[j]] = 1;
    cell = larger(cell, a.values[j]);
  }
  double sum = 0;
  for (int64_t i = 0; i < a.n_cells; ++i) sum += a.occs[i];
  const T limit = occupied_above<T>(sum, a.n_cells, a.threshold);
  for (int64_t i = 0; i < a.n_cells; ++i) a.occupied[i] = a.occs[i] > limit;
  return kOk;
}

SDI_INSTANTIATE(occupancy_update, OccupancyArgs)

}  // namespace SDI_ISA
}  // namespace sdi
