// Tests of the emulator itself. `selftest` runs all and returns 0 when they hold; `selftest NAME`
// runs one of the kernels that have to fail and returns the status of its launch.
//
// All but the failing ones hold on a GPU too, where they test csrc/cuda/warp.h:
//   nvcc -std=c++17 -arch=sm_90 -x cu tests/emulator/selftest.cpp -o selftest && ./selftest
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <vector>

#include "../../csrc/cuda/launch.h"
#ifdef SDI_EMULATE
#include "emulated_warp.h"
#else
#include "../../csrc/cuda/warp.h"
#endif

using namespace sdi::cuda;

namespace {

int n_failed = 0;
__device__ int n_failed_there = 0;

#ifdef __CUDA_ARCH__
#define SDI_COUNT_FAILURE atomicAdd(&n_failed_there, 1)
#else
#define SDI_COUNT_FAILURE ++n_failed
#endif
#define CHECK(condition)                             \
  do {                                               \
    if (!(condition)) {                              \
      SDI_COUNT_FAILURE;                             \
      printf("line %d: %s\n", __LINE__, #condition); \
    }                                                \
  } while (0)

// n values in the device's memory.
template <class T>
class Array {
 public:
  explicit Array(int n) : n_(n) {
    CHECK(cudaMalloc(&values_, n * sizeof(T)) == cudaSuccess);
    CHECK(cudaMemset(values_, 0, n * sizeof(T)) == cudaSuccess);
  }
  Array(const Array&) = delete;
  ~Array() { cudaFree(values_); }
  T* there() { return values_; }
  std::vector<T> here() const {
    std::vector<T> copy(n_);
    CHECK(cudaMemcpy(copy.data(), values_, n_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess);
    return copy;
  }

 private:
  int n_;
  T* values_ = nullptr;
};

constexpr unsigned kAll = 0xffffffffu;

// --- warp primitives ------------------------------------------------------------------------------

__global__ void shuffle_kernel() {
  const int lane = threadIdx.x % 32;
  CHECK(__shfl_sync(kAll, lane * 1.5f, 7) == 7 * 1.5f);
  CHECK(__shfl_sync(kAll, lane, lane + 1, 8) == (lane & ~7) + ((lane + 1) & 7));
  CHECK(__shfl_up_sync(kAll, lane, 3) == (lane < 3 ? lane : lane - 3));
  CHECK(__shfl_up_sync(kAll, lane, 1, 16) == (lane % 16 == 0 ? lane : lane - 1));
  CHECK(__shfl_down_sync(kAll, 1.0 * lane, 5) == (lane > 26 ? lane : lane + 5));
  CHECK(__shfl_down_sync(kAll, int64_t{1} << lane, 1, 4) ==
        int64_t{1} << (lane % 4 == 3 ? lane : lane + 1));
  CHECK(__shfl_xor_sync(kAll, lane, 16) == (lane ^ 16));
  // hardware lets a segment read lower ones, but not higher ones
  CHECK(__shfl_xor_sync(kAll, lane, 8, 8) == (lane & 8 ? lane ^ 8 : lane));
  const half2 pair = __floats2half2_rn(lane, -lane);
  CHECK(__low2float(__shfl_xor_sync(kAll, pair, 1)) == (lane ^ 1));
  CHECK(__high2float(__shfl_xor_sync(kAll, pair, 1)) == -(lane ^ 1));
}

__global__ void vote_kernel() {
  const int lane = threadIdx.x % 32;
  CHECK(__ballot_sync(kAll, lane % 3 == 0) == 0x49249249u);
  CHECK(__any_sync(kAll, lane == 31) && !__any_sync(kAll, 0));
  CHECK(__all_sync(kAll, 1) && !__all_sync(kAll, lane != 5));
  const unsigned same = __match_any_sync(kAll, lane / 10);
  CHECK(same == (lane < 10   ? 0x3ffu
                 : lane < 20 ? 0xffc00u
                 : lane < 30 ? 0x3ff00000u
                             : 0xc0000000u));
  CHECK(__reduce_add_sync(same, 1) == __popc(same));
  CHECK(__reduce_max_sync(kAll, lane - 40) == -9);
  CHECK(__reduce_min_sync(kAll, static_cast<unsigned>(lane) + 2) == 2);
  CHECK(__reduce_or_sync(kAll, 1u << lane) == kAll);
  if (lane < 16) {  // both halves at once, each among themselves
    CHECK(__ballot_sync(0xffffu, lane % 2) == 0xaaaau);
  } else {
    CHECK(__ballot_sync(0xffff0000u, lane % 2) == 0xaaaa0000u);
    __syncwarp(0xffff0000u);
  }
  CHECK(__activemask() >> lane & 1);
}

// --- barriers and memory --------------------------------------------------------------------------

// Threads take different numbers of turns and leave early; the others' barriers do not wait.
__global__ void uneven_kernel(int* sums) {
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  if (threadIdx.x >= 48) return;
  const int turns = threadIdx.x < 16 ? 5 : 2;
  for (int i = 0; i < turns; ++i) {
    if (threadIdx.x % 16 == 0) atomicAdd(&total, 1);
    if (threadIdx.x >= 16 && i == 1) return;
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}

template <class T>
__global__ void poison_kernel(unsigned n, float* seen) {
  SDI_DYNAMIC_SHARED(float, memory);
  __shared__ T fixed[4];
  CHECK(reinterpret_cast<uintptr_t>(memory) % 16 == 0);
#ifdef SDI_EMULATE
  CHECK(std::isnan(memory[threadIdx.x]) && std::isnan(memory[n - 1]));
#ifndef __SANITIZE_ADDRESS__
  CHECK(std::isnan(fixed[threadIdx.x % 4]));
#endif
#endif
  __syncthreads();
  memory[threadIdx.x] = threadIdx.x + 100.0f * blockIdx.x;
  fixed[threadIdx.x % 4] = 1;
  __syncthreads();
  CHECK(fixed[(threadIdx.x + 1) % 4] == 1);
  if (threadIdx.x < n)
    seen[blockIdx.x * blockDim.x + threadIdx.x] = memory[blockDim.x - 1 - threadIdx.x];
}

__global__ void count_kernel(int* counts) {
  counts[threadIdx.x] = __syncthreads_count(threadIdx.x % 3 == 0);
  CHECK(__syncthreads_or(threadIdx.x == 63) && !__syncthreads_or(0));
  CHECK(__syncthreads_and(1) && !__syncthreads_and(threadIdx.x != 40));
}

void test_barriers() {
  Array<int> sums(3);
  CHECK(launch(uneven_kernel, 3, 64, 0, nullptr, sums.there()) == sdi::kOk);
  for (const int sum : sums.here()) CHECK(sum == 5 + 2 + 2);
  Array<float> seen(2 * 96);
  CHECK(launch(poison_kernel<double>, 2, 96, 96 * sizeof(float), nullptr, 96u, seen.there()) ==
        sdi::kOk);
  const std::vector<float> values = seen.here();
  for (int i = 0; i < 96; ++i) CHECK(values[i] == 95 - i && values[96 + i] == 195 - i);
  Array<int> counts(64);
  CHECK(launch(count_kernel, 1, 64, 0, nullptr, counts.there()) == sdi::kOk);
  for (const int count : counts.here()) CHECK(count == 22);
}

void test_launch_limits() {
  Array<float> seen(32);
  const auto try_shared = [&](size_t bytes) {
    return launch(poison_kernel<double>, 1, 32, bytes, nullptr, 32u, seen.there());
  };
  CHECK(try_shared(48 * 1024 + 4) == sdi::kCudaError);  // not asked for
  CHECK(allow_shared(poison_kernel<double>, 100 * 1024));
  CHECK(try_shared(100 * 1024) == sdi::kOk);
  CHECK(try_shared(100 * 1024 + 4) == sdi::kCudaError);
  CHECK(!allow_shared(poison_kernel<double>, 228 * 1024));
  cudaGetLastError();
  CHECK(launch(shuffle_kernel, 0, 32, 0, nullptr) == sdi::kCudaError);
  CHECK(launch(shuffle_kernel, 1, 1056, 0, nullptr) == sdi::kCudaError);
}

// --- halves and fragments -------------------------------------------------------------------------

__global__ void halves_kernel() {
  CHECK(__half_as_ushort(__float2half_rn(1.0f + 1.0f / 2048)) == 0x3c00);  // ties to even
  CHECK(__half_as_ushort(__float2half_rn(1.0f + 3.0f / 2048)) == 0x3c02);
  CHECK(__half_as_ushort(__float2half_rn(65520.0f)) == 0x7c00);
  CHECK(__half2float(__ushort_as_half(0x0001)) == ldexpf(1, -24));
  const half2 a = __floats2half2_rn(0.1f, 3.0f), b = __floats2half2_rn(0.2f, -1.0f);
  CHECK(__low2float(__hadd2(a, b)) == float(half(float(half(0.1f)) + float(half(0.2f)))));
  CHECK(__high2float(__hfma2(a, b, a)) == 0.0f);
  CHECK(__half22float2(__hmul2(a, b)).y == -3.0f);
}

__host__ __device__ uint32_t pack(float low, float high) {
  const half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

__host__ __device__ float a_at(int row, int k) { return ((row * 37 + k * 11) % 64 - 31) / 16.0f; }
__host__ __device__ float b_at(int k, int n) { return ((k * 23 + n * 7) % 32 - 13) / 8.0f; }

__global__ void mma_kernel(float* product) {  // [16, 8]
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const int row = g + (i % 2) * 8, k = 2 * t + (i / 2) * 8;
    a[i] = pack(a_at(row, k), a_at(row, k + 1));
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = pack(b_at(2 * t + 8 * i, g), b_at(2 * t + 8 * i + 1, g));
  }
  float c[4] = {1, 2, 3, 4};
  mma_16816(c, a, b);
  float d[4] = {1, 2, 3, 4};
  mma_16816(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) CHECK(c[i] == d[i]);
  product[g * 8 + 2 * t] = c[0] - 1;
  product[g * 8 + 2 * t + 1] = c[1] - 2;
  product[(g + 8) * 8 + 2 * t] = c[2] - 3;
  product[(g + 8) * 8 + 2 * t + 1] = c[3] - 4;
}

void test_mma() {
  Array<float> there(16 * 8);
  CHECK(launch(mma_kernel, 1, 32, 0, nullptr, there.there()) == sdi::kOk);
  const std::vector<float> product = there.here();
  for (int row = 0; row < 16; ++row) {
    for (int n = 0; n < 8; ++n) {
      float sum = 0;  // exact: small multiples of 1/128
      for (int k = 0; k < 16; ++k) sum += a_at(row, k) * b_at(k, n);
      CHECK(product[row * 8 + n] == sum);
    }
  }
}

// ldmatrix gives A's fragments of a row-major A, its .trans those of B from a row-major B.
__global__ void ldmatrix_kernel(float* product) {
  __shared__ __align__(16) half a_tile[16][24];  // padded
  __shared__ __align__(16) half b_tile[16][8];   // [k, n]
  for (int i = threadIdx.x; i < 256; i += 32) a_tile[i / 16][i % 16] = a_at(i / 16, i % 16);
  for (int i = threadIdx.x; i < 128; i += 32) b_tile[i / 8][i % 8] = b_at(i / 8, i % 8);
  __syncwarp();
  const int lane = threadIdx.x;
  uint32_t a[4], b[2];
  ldmatrix_x4(a, &a_tile[lane % 16][8 * (lane / 16)]);
  ldmatrix_x2_trans(b, lane < 16 ? &b_tile[lane][0] : nullptr);
  float c[4] = {};
  mma_16816(c, a, b);
  const int g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) product[(g + 8 * (i / 2)) * 8 + 2 * t + i % 2] = c[i];
  // transposing fragment by fragment is what .trans does on the way in
  uint32_t plain[2], transposed[4];
  ldmatrix_x2(plain, &b_tile[lane % 16][0]);
  CHECK(movmatrix_trans(plain[0]) == b[0] && movmatrix_trans(plain[1]) == b[1]);
  ldmatrix_x4_trans(transposed, &a_tile[lane % 16][8 * (lane / 16)]);
  for (int i = 0; i < 4; ++i) CHECK(movmatrix_trans(a[i]) == transposed[i]);
}

void test_ldmatrix() {
  Array<float> product(16 * 8), expected(16 * 8);
  CHECK(launch(mma_kernel, 1, 32, 0, nullptr, expected.there()) == sdi::kOk);
  CHECK(launch(ldmatrix_kernel, 1, 32, 0, nullptr, product.there()) == sdi::kOk);
  CHECK(product.here() == expected.here());
}

__global__ void atomics_kernel(float* sums, unsigned* words) {
  red_add_v2(sums, 1, 2);
  red_add_v4(sums + 4, 1, 2, 3, 4);
  atomicMax(words, threadIdx.x);
  atomicOr(words + 1, 1u << threadIdx.x);
  if (atomicCAS(words + 2, 0u, threadIdx.x + 1) == 0) atomicExch(words + 3, 9u);
}

void test_atomics() {
  Array<float> sums(8);
  Array<unsigned> words(4);
  CHECK(launch(atomics_kernel, 1, 32, 0, nullptr, sums.there(), words.there()) == sdi::kOk);
  CHECK(sums.here() == (std::vector<float>{32, 64, 0, 0, 32, 64, 96, 128}));
  const std::vector<unsigned> w = words.here();
  CHECK(w[0] == 31 && w[1] == kAll && w[2] != 0 && w[3] == 9);
}

#ifdef SDI_EMULATE
// --- kernels that have to fail ----------------------------------------------------------------------

__global__ void deadlock_kernel() {
  if (blockIdx.x == 0) return;
  if (threadIdx.x < 40) {
    __syncthreads();
  } else {
    __syncwarp(0xffffff01u);
  }
}
__global__ void exited_kernel() {
  if (threadIdx.x == 9) return;
  __shfl_xor_sync(kAll, 1.0f, 1);
}
__global__ void absent_kernel() { __ballot_sync(kAll, 1); }
__global__ void mixed_kernel() {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __ballot_sync(kAll, 1);
  }
}
__global__ void mask_kernel() { __syncwarp(0xfffffffeu); }
__global__ void misaligned_row_kernel() {
  __shared__ __align__(16) half tile[16][12];
  uint32_t r[4];
  ldmatrix_x4(r, &tile[threadIdx.x % 16][0]);
}
__global__ void misaligned_sum_kernel(float* sums) { red_add_v4(sums + 2, 1, 1, 1, 1); }

__global__ void overrun_dynamic_kernel(int i) {
  SDI_DYNAMIC_SHARED(float, memory);
  if (threadIdx.x == 5) memory[i] = 1;
}
__global__ void overrun_static_kernel(int i) {
  __shared__ float memory[32];
  if (threadIdx.x == 5) memory[i] = 1;
  __syncthreads();
  CHECK(memory[threadIdx.x] != 2);
}
__global__ void overrun_global_kernel(float* p) {
  if (threadIdx.x == 5) p[32] = 1;
}

int run_failing(const char* name) {
  alignas(16) float sums[8] = {};
  const std::vector<float> numbers(32);
  const auto is = [name](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("deadlock")) return launch(deadlock_kernel, 2, 64, 0, nullptr);
  if (is("exited")) return launch(exited_kernel, 1, 32, 0, nullptr);
  if (is("absent")) return launch(absent_kernel, 1, 20, 0, nullptr);
  if (is("mixed")) return launch(mixed_kernel, 1, 32, 0, nullptr);
  if (is("mask")) return launch(mask_kernel, 1, 32, 0, nullptr);
  if (is("misaligned_row")) return launch(misaligned_row_kernel, 1, 32, 0, nullptr);
  if (is("misaligned_sum")) return launch(misaligned_sum_kernel, 1, 32, 0, nullptr, &sums[0]);
  if (is("overrun_dynamic")) return launch(overrun_dynamic_kernel, 1, 32, 128, nullptr, 32);
  if (is("overrun_static")) return launch(overrun_static_kernel, 1, 32, 0, nullptr, 32);
  if (is("overrun_global")) {
    return launch(overrun_global_kernel, 1, 32, 0, nullptr, const_cast<float*>(numbers.data()));
  }
  return -1;
}
#else
int run_failing(const char*) { return -1; }  // they would hang or do harm
#endif

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) {
    const int status = run_failing(argv[1]);
    test_barriers();  // the next launch is none the worse
    return n_failed ? 100 : status;
  }
  CHECK(launch(shuffle_kernel, 2, 64, 0, nullptr) == sdi::kOk);
  CHECK(launch(vote_kernel, 1, 64, 0, nullptr) == sdi::kOk);
  test_barriers();
  test_launch_limits();
  CHECK(launch(halves_kernel, 1, 1, 0, nullptr) == sdi::kOk);
  test_mma();
  test_ldmatrix();
  test_atomics();
  int there = 0;
  CHECK(cudaDeviceSynchronize() == cudaSuccess);
  CHECK(cudaMemcpyFromSymbol(&there, n_failed_there, sizeof there) == cudaSuccess);
  return n_failed + there ? 1 : 0;
}
