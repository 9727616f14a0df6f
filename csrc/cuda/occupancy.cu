// The occupancy grid's update on the GPU (methods.md D, Marching).
// Twin: sdi_fast/reference/occupancy.py. Maths: math/occupancy.h, as on the CPU.
//
// Three kernels. One thread a given cell leaves its value, as an integer of the same order, in
// `largest` by an atomic maximum: 0 stands for a cell that is not given, NaN for the largest of
// all, and cells outside the grid are passed over. Then one thread a cell decays it and takes that
// value; blocks add up their cells in a tree, into partial sums. Then every block adds up all
// partial sums, again in a tree, and thresholds its cells. Deterministic, no synchronisation.
// Precision: T, the mean's sum in double. Bytes (f32): 12 read and 8 changed per given cell; 12
// read and 4 written, then 4 read and 1 written per cell.
#include "../math/occupancy.h"

#include <cstring>

#include "dispatch.h"
#include "launch.h"
#include "reduce.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kThreads = 256;
static_assert(kOccupancyMaxBlocks <= kThreads, "a partial sum a thread");

constexpr unsigned long long kNaNKey = ~0ull;

// Doubles above zero are ordered as their bits are; 1 is added, since 0 is taken.
__device__ unsigned long long key_of(double value) {
  if (!(value == value)) return kNaNKey;
  unsigned long long bits = 0;
  if (value > 0) memcpy(&bits, &value, sizeof(bits));
  return bits + 1;
}

__device__ double value_of(unsigned long long key) {
  if (key == kNaNKey) return NAN;
  const unsigned long long bits = key - 1;
  double value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

template <class T>
__global__ void occupancy_collect_kernel(const OccupancyArgs<T> a) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= a.m) return;
  const int64_t cell = a.cells[j];
  if (cell < 0 || cell >= a.n_cells) return;
  static_assert(sizeof(unsigned long long) == sizeof(uint64_t), "one atomic");
  atomicMax(reinterpret_cast<unsigned long long*>(a.largest + cell), key_of(a.values[j]));
}

template <class T>
__global__ void occupancy_decay_kernel(const OccupancyArgs<T> a) {
  __shared__ double shared[kThreads];
  double sum[1] = {0};
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < a.n_cells;
       i += stride) {
    T value = a.occs[i];
    if (const unsigned long long key = a.largest[i]) {
      value = larger(value * static_cast<T>(a.decay), static_cast<T>(value_of(key)));
      a.occs[i] = value;
    }
    sum[0] += value;
  }
  block_sum<kThreads>(sum, shared);
  if (threadIdx.x == 0) a.partial_sums[blockIdx.x] = sum[0];
}

template <class T>
__global__ void occupancy_threshold_kernel(const OccupancyArgs<T> a, int n_sums) {
  __shared__ double shared[kThreads];
  const int t = threadIdx.x;
  double sum[1] = {t < n_sums ? a.partial_sums[t] : 0.0};
  block_sum<kThreads>(sum, shared);
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + t;
  if (i >= a.n_cells) return;
  a.occupied[i] = a.occs[i] > occupied_above<T>(sum[0], a.n_cells, a.threshold);
}

}  // namespace

template <class T>
int launch_occupancy_update(const OccupancyArgs<T>& args, void* stream) {
  if (args.n_cells == 0) return kOk;
  const unsigned cell_blocks = blocks_for(args.n_cells, kThreads);
  const unsigned given_blocks = blocks_for(args.m, kThreads);
  if (cell_blocks == 0 || (args.m > 0 && given_blocks == 0)) return kBadArgument;
  const unsigned sum_blocks = cell_blocks < kOccupancyMaxBlocks ? cell_blocks : kOccupancyMaxBlocks;
  int status = kOk;
  if (args.m > 0) {
    status = launch(occupancy_collect_kernel<T>, given_blocks, kThreads, 0, stream, args);
  }
  if (status != kOk) return status;
  status = launch(occupancy_decay_kernel<T>, sum_blocks, kThreads, 0, stream, args);
  if (status != kOk) return status;
  return launch(occupancy_threshold_kernel<T>, cell_blocks, kThreads, 0, stream, args,
                static_cast<int>(sum_blocks));
}

SDI_INSTANTIATE_CUDA(occupancy_update, OccupancyArgs)

}  // namespace cuda
}  // namespace sdi
