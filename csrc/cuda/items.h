// Kernels whose threads take independent items: a grid of bounded size walks any number of them.
#pragma once

#include "launch.h"

namespace sdi {
namespace cuda {

constexpr int64_t kMaxItemBlocks = 65536;  // enough to fill any GPU many times over
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Blocks for n > 0 items, `items_a_block` of them at once.
inline unsigned item_blocks(int64_t n, int items_a_block) {
  const int64_t blocks = (n - 1) / items_a_block + 1;
  return static_cast<unsigned>(blocks < kMaxItemBlocks ? blocks : kMaxItemBlocks);
}

// `items_a_block` of the n items at once; nothing where there are none.
template <class Kernel, class Args>
int launch_items(Kernel* kernel, int64_t n, int items_a_block, int threads, void* stream,
                 const Args& args) {
  if (n == 0) return kOk;
  return launch(kernel, item_blocks(n, items_a_block), threads, 0, stream, args);
}

// Item k = first_item(), then k += item_stride().
__device__ inline int64_t first_item() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t item_stride() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// A ray's samples. A row of packed_info [n_rays, 2] that leaves [0, n) is taken as empty.
struct Range {
  int64_t first, count;
};

__device__ inline Range range_of(const int64_t* packed_info, int64_t ray, int64_t n) {
  const int64_t first = packed_info[2 * ray], count = packed_info[2 * ray + 1];
  const bool fits = first >= 0 && count >= 0 && first <= n && count <= n - first;
  return {fits ? first : 0, fits ? count : 0};
}

}  // namespace cuda
}  // namespace sdi
