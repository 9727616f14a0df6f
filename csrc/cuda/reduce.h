// Sums over a block, always in the same order.
#pragma once

#include <cuda_runtime.h>

namespace sdi {
namespace cuda {

// values[k] summed over the block's kThreads threads (a power of two), in every thread. `shared`
// has room for kThreads * kValues numbers; all threads of the block have to take part. Whoever
// writes to `shared` afterwards needs a barrier first, since slower threads may still read it.
template <int kThreads, int kValues>
__device__ void block_sum(double (&values)[kValues], double* shared) {
  const int t = threadIdx.x;
  for (int k = 0; k < kValues; ++k) shared[k * kThreads + t] = values[k];
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) {
      for (int k = 0; k < kValues; ++k) shared[k * kThreads + t] += shared[k * kThreads + t + half];
    }
    __syncthreads();
  }
  for (int k = 0; k < kValues; ++k) values[k] = shared[k * kThreads];
}

}  // namespace cuda
}  // namespace sdi
