// What our kernels use of the CUDA runtime and of the device's built-ins, on the CPU (emulator.h).
#pragma once

#include <math.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __grid_constant__
#define __shared__ SDI_EMULATED_SHARED
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

#include "emulated_types.h"

// Set by the scheduler whenever another thread goes on.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace emulator {
inline void set_indices(int thread) { threadIdx.x = static_cast<unsigned>(thread); }
inline void set_dims(int64_t blocks, int64_t block, int threads) {
  gridDim.x = static_cast<unsigned>(blocks);
  blockIdx.x = static_cast<unsigned>(block);
  blockDim.x = static_cast<unsigned>(threads);
}
inline void* dynamic_shared() { return machine.shared; }
}  // namespace emulator

#include "emulated_atomics.h"
#include "emulated_host.h"
#include "emulated_math.h"
#include "emulated_sync.h"
