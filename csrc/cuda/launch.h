// Launching a kernel and reading back whether that worked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../status.h"

namespace sdi {
namespace cuda {

constexpr int64_t kMaxBlocks = 2147483647;  // of a grid's first dimension

// Blocks of `threads` that cover n items, one a thread; 0 where n is too large for one grid.
inline unsigned blocks_for(int64_t n, int threads) {
  const int64_t blocks = (n + threads - 1) / threads;
  return blocks > kMaxBlocks ? 0u : static_cast<unsigned>(blocks);
}

inline int status_of_last() { return cudaGetLastError() == cudaSuccess ? kOk : kCudaError; }

// Dynamic shared memory above 48 KiB has to be asked for once a kernel.
template <class Kernel>
bool allow_shared(Kernel* kernel, size_t bytes) {
  return bytes <= 48 * 1024 ||
         cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes)) == cudaSuccess;
}

// Dynamic shared memory, as `type name[]`. The emulator (tests/emulator) has its own.
#ifdef SDI_EMULATE
#define SDI_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulator::dynamic_shared())
#else
#define SDI_DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#endif

inline int clear(void* memory, size_t bytes, void* stream) {
  const cudaError_t error =
      bytes ? cudaMemsetAsync(memory, 0, bytes, static_cast<cudaStream_t>(stream)) : cudaSuccess;
  return error == cudaSuccess ? kOk : kCudaError;
}

// Blocks for a kernel whose blocks fetch their work: as many as run at once, and at most `needed`.
inline unsigned persistent_blocks(int per_multiprocessor, int64_t needed) {
  int device = 0, n = 1;
  if (cudaGetDevice(&device) == cudaSuccess) {
    cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device);
  }
  const int64_t most = static_cast<int64_t>(n) * per_multiprocessor;
  return static_cast<unsigned>(needed < most ? needed : most);
}

// Every launch goes through here.
template <class... Params, class... Args>
int launch(void (*kernel)(Params...), unsigned blocks, int threads, size_t shared, void* stream,
           Args&&... args) {
  const auto queue = static_cast<cudaStream_t>(stream);
#ifdef SDI_EMULATE
  emulator::launch(kernel, blocks, threads, shared, queue, args...);
#else
  kernel<<<blocks, threads, shared, queue>>>(args...);
#endif
  return status_of_last();
}

}  // namespace cuda
}  // namespace sdi
