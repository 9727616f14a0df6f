// The sums of the fused renderer's deterministic backward (render_bwd.cu has the formulas): whatever
// order warps come in, the same bits. Twin: as the other variant's, which this one agrees with.
//
// Weights: a warp takes every n-th tile, n the number of warps, which depends on the GPU and on the
// number of tiles alone; so its sums repeat. It leaves them in a row of a workspace, and a second
// kernel adds up the rows, always in the same order, in double.
//
// Table: entries are sums in fixed point, 64-bit integers, whose additions may come in any order.
// Their unit is a power of two that a pass beforehand finds, since cotangents bound nothing: that of
// the normal is divided by the length of the density's gradient, as small as 1e-12. That pass
// evaluates all samples too. With B the largest of a sample's
//   |gl q| + |V1^T gate| + |p|_1 |q|
// over levels and features, rounded up to a power of two, it counts the samples of each B, which
// gives L, the sum of all B, in whatever order they come. A sample's weights at a level's corners
// add up to 1, its slopes' magnitudes to at most 2 |p|_1: however corners and samples collide, the
// magnitudes in an entry add up to at most 2 L. With 2^(b - 1) <= L < 2^b and a unit of 2^(b - 60)
// that is at most 2^61 units, plus half a unit for each of 8 additions a sample: no sum overflows,
// for 2^57 samples. (One bit more than it takes: compilers may contract the passes differently.)
// Resolution: the unit is at most 2^-59 L. In terms of the mean of B it is 2^-32 for 2^27 samples,
// 2^-35 for 2^24 and 2^-39 for 2^20, and an addition costs half of it. f16 inside (render_bwd.cu)
// costs 2^-11 of what is added: fixed point costs less, down to 2^-22 (2^-25, 2^-29) of the mean;
// what is smaller fades, and vanishes below 2^-33 (2^-36, 2^-40). The unit is at least 2^-126.
// A sample with B of 2^120 or more, infinite or NaN: every active entry becomes NaN.
//
// Bytes: 8 an active entry's number, zeroed, added to (two 8-byte atomics where the other variant
// has one of 8) and read once; 17 KiB a warp for the weights, 18 MB on 132 multiprocessors.
#pragma once

#include "items.h"
#include "launch.h"
#include "reduce.h"
#include "render_bwd_mlps.h"
#include "render_bwd_table.h"

namespace sdi {
namespace cuda {

constexpr int kExponents = 256;  // of f32, biased
constexpr int kTooLarge = 247;   // those of 2^120 and above: 32 lanes' sum may overflow f32
constexpr int kUnits = 60;       // log2 of what L has at most
constexpr int kSumColumns = 32;  // weights a block of the last kernel
constexpr int kSumSlices = 8;    // in which it takes the rows
constexpr int kFloatThreads = 256;
static_assert(kFusedWeights % kSumColumns == 0, "no guard");

// ---- table -------------------------------------------------------------------------------------

// Clears a block's counts of samples by the exponent of B; the caller's barrier follows.
__device__ inline uint32_t* clear_counts() {
  __shared__ uint32_t counts[kExponents];
  for (int k = threadIdx.x; k < kExponents; k += blockDim.x) counts[k] = 0;
  return counts;
}

// Counts this lane's sample. Magnitudes are added up one by one, so that nothing cancels, and
// compared as bits, where NaN is above infinity and that above all numbers.
__device__ __forceinline__ void count_sample(const FusedSpec& spec, int lane, const Cotangents& c,
                                             const FloatTile& slope,
                                             const FloatTile& color_features, float unscale,
                                             uint32_t* counts) {
  const float logit = fabsf(c.logit), p = fabsf(c.p[0]) + fabsf(c.p[1]) + fabsf(c.p[2]);
  uint32_t largest = 0;
#pragma unroll 1
  for (int l = 0; l < spec.active_levels; ++l) {
    const float2 q = pair_at(&slope[lane][2 * l]), r = pair_at(&color_features[lane][2 * l]);
    const float along = logit + p * spec.levels[l].scale;
    const uint32_t x = __float_as_uint(along * fabsf(q.x) + fabsf(r.x * unscale));
    const uint32_t y = __float_as_uint(along * fabsf(q.y) + fabsf(r.y * unscale));
    largest = max(largest, max(x, y));
  }
  atomicAdd(counts + (largest >> 23 & 255), 1u);
}

__device__ inline void store_counts(const uint32_t* counts, uint64_t* sums) {
  using Word = unsigned long long;
  __syncthreads();
  for (int k = threadIdx.x; k < kExponents; k += blockDim.x) {
    if (counts[k]) atomicAdd(reinterpret_cast<Word*>(sums + k), static_cast<Word>(counts[k]));
  }
}

// From counts to the scale, units a number, and its inverse, both powers of two; the inverse is NaN
// where a sample is not to be bounded. One block.
static __global__ void __launch_bounds__(kExponents)
    fixed_scale_kernel(const RenderViewsSums sums) {
  __shared__ double shared[2 * kExponents];
  const int k = threadIdx.x;
  const double n = static_cast<double>(sums.counts[k]);
  double total[2] = {ldexp(n, k - 126), k < kTooLarge ? 0.0 : n};  // L, samples too large
  block_sum<kExponents>(total, shared);
  if (k > 0) return;
  int b;
  frexp(total[0], &b);
  const int shift = min(kUnits - b, 126);
  const bool is_bounded = total[1] == 0.0;
  sums.scale[0] = is_bounded ? __int_as_float((127 + shift) << 23) : 0.0f;
  sums.scale[1] = __int_as_float(is_bounded ? (127 - shift) << 23 : 0x7fc00000);
}

// Points into the gradient in fixed point, as float* does into the other one.
struct FixedPointer {
  uint64_t* at;
  float up;

  __device__ __forceinline__ FixedPointer operator+(int64_t n) const { return {at + n, up}; }
};

// Signed numbers, added as unsigned ones.
__device__ __forceinline__ void add_fixed(FixedPointer p, float x) {
  using Word = unsigned long long;
  atomicAdd(reinterpret_cast<Word*>(p.at), static_cast<Word>(__float2ll_rn(x * p.up)));
}
__device__ __forceinline__ void red_add_v2(FixedPointer p, float x, float y) {
  add_fixed(p, x);
  add_fixed(p + 1, y);
}
__device__ __forceinline__ void red_add_v4(FixedPointer p, float x, float y, float z, float w) {
  red_add_v2(p, x, y);
  red_add_v2(p + 2, z, w);
}

static __global__ void __launch_bounds__(kFloatThreads)
    fixed_to_float_kernel(const RenderViewsSums sums, float* grad_table, int64_t n) {
  const float down = sums.scale[1];
  for (int64_t i = first_item(); i < n; i += item_stride()) {
    grad_table[i] = __ll2float_rn(static_cast<long long>(sums.table[i])) * down;
  }
}

// ---- weights -----------------------------------------------------------------------------------

// Where a row of the workspace has which gradient; all of kFusedHidden rows of kInputs columns
constexpr int kRowDensityW1 = 0, kRowColorW1 = kFusedHidden * kInputs;
constexpr int kRowDensityW2 = 2 * kRowColorW1, kRowColorW2 = kRowDensityW2 + kFusedHidden;
static_assert(kRowColorW2 + 3 * kFusedHidden == kFusedWeights, "the row's length");

__device__ __forceinline__ void store_fragment(float* rows, int unit, int input, int lane,
                                               const float (&c)[4]) {
  float* at = rows + (unit + (lane >> 2)) * kInputs + input + 2 * (lane & 3);
  *reinterpret_cast<float2*>(at) = make_float2(c[0], c[1]);
  *reinterpret_cast<float2*>(at + 8 * kInputs) = make_float2(c[2], c[3]);
}

// What a warp has summed, into its row.
__device__ __forceinline__ void store_weights(float* row, int lane, const WarpMemory& memory,
                                              const DensitySums& density, const ColorSums& color) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    for (int n = 0; n < 4; ++n) {
      store_fragment(row + kRowDensityW1, 16 * j, 8 * n, lane, density.w1[j][n]);
      store_fragment(row + kRowColorW1, 16 * j, 8 * n, lane, memory.color_w1[j][n][lane]);
    }
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < 2; ++e) {
        const float sum = sum_over_rows(density.w2[j][i][e]);
        if (g == 0) row[kRowDensityW2 + 16 * j + 8 * i + 2 * t + e] = sum;
      }
    }
    for (int e = 0; e < 4; ++e) {
      const int unit = 16 * j + g + 8 * (e >> 1), output = 2 * t + (e & 1);
      if (output < 3) row[kRowColorW2 + output * kFusedHidden + unit] = color.v2[j][e];
    }
  }
}

// Where a number of a row belongs; null: to an input that the field does not have.
__device__ __forceinline__ float* weight_at(const RenderViewsGrads& grads, int k, int width) {
  if (k >= kRowColorW2) return grads.grad_color_w2 + (k - kRowColorW2);
  if (k >= kRowDensityW2) return grads.grad_density_w2 + (k - kRowDensityW2);
  const int unit = k % kRowColorW1 / kInputs, input = k % kInputs;
  if (input >= width) return nullptr;
  return (k < kRowColorW1 ? grads.grad_density_w1 : grads.grad_color_w1) + unit * width + input;
}

static __global__ void __launch_bounds__(kSumColumns* kSumSlices)
    sum_rows_kernel(const float* rows, int n_rows, int width, const RenderViewsGrads grads) {
  __shared__ double sums[kSumSlices][kSumColumns];
  const int column = threadIdx.x % kSumColumns, slice = threadIdx.x / kSumColumns;
  const int k = blockIdx.x * kSumColumns + column;
  double sum = 0.0;
  for (int row = slice; row < n_rows; row += kSumSlices) {
    sum += rows[static_cast<int64_t>(row) * kFusedWeights + k];
  }
  sums[slice][column] = sum;
  __syncthreads();
  if (slice > 0) return;
  for (int s = 1; s < kSumSlices; ++s) sum += sums[s][column];
  float* const grad = weight_at(grads, k, width);
  if (grad) *grad = static_cast<float>(sum);
}

// ---- launcher ----------------------------------------------------------------------------------

// Both sums into the gradients: `n` numbers of the table, `n_rows` rows of weights.
inline int launch_fixed_to_float(const RenderViewsSums& sums, int64_t n, int n_rows, int width,
                                 const RenderViewsGrads& grads, void* stream) {
  if (n > 0) {
    const int status = launch(fixed_to_float_kernel, item_blocks(n, kFloatThreads), kFloatThreads,
                              0, stream, sums, grads.grad_table, n);
    if (status != kOk) return status;
  }
  return launch(sum_rows_kernel, kFusedWeights / kSumColumns, kSumColumns * kSumSlices, 0, stream,
                sums.weights, n_rows, width, grads);
}

}  // namespace cuda
}  // namespace sdi
