// The fused renderer's backward through both MLPs, 32 samples of a warp at a time (render_bwd.cu
// has the formulas). Sums over samples are products too, with A transposed by movmatrix.
#pragma once

#include "render_common.h"

namespace sdi {
namespace cuda {

constexpr int kGroups = kFusedHidden / 16;
constexpr float kLargestHalf = 65504.0f;

struct alignas(16) WarpMemory {
  HalfTile features;
  HalfTile combined;
  FloatTile slope;
  union {
    JacobianTile jacobian;
    FloatTile color_features;  // V1^T gate, scaled
  };
  OutputTile outputs;                    // later the colour logits' cotangents, scaled
  __half color_logits[kWarp][8];         // these in f16, padded
  float color_w1[kGroups][4][kWarp][4];  // sums for V1 as C fragments
};

// ---- MLPs --------------------------------------------------------------------------------------

struct DensitySums {
  float w1[kGroups][4][4];  // C fragments of groups of 16 units by tiles of 8 inputs
  float w2[kGroups][2][2];  // unit 16 j + 8 i + 2 t + e, over this lane's rows
};

struct ColorSums {
  float v2[kGroups][4];  // C fragments: 16 units by 8 outputs, of which 3 count
};

// B fragments of a tile with samples as rows: [m][tile of 8 inputs]
__device__ __forceinline__ void load_samples_as_rows(const HalfTile& tile, int lane,
                                                     uint32_t (&b)[2][4][2]) {
  for (int m = 0; m < 2; ++m) {
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t r[4];
      ldmatrix_x4_trans(r, &tile[16 * m + (lane & 15)][(2 * pair + (lane >> 4)) * 8]);
      b[m][2 * pair][0] = r[0], b[m][2 * pair][1] = r[1];
      b[m][2 * pair + 1][0] = r[2], b[m][2 * pair + 1][1] = r[3];
    }
  }
}

// [16 samples, 16 units] as an A fragment, transposed to [16 units, 16 samples]
__device__ __forceinline__ void transpose(const uint32_t (&a)[4], uint32_t (&out)[4]) {
  out[0] = movmatrix_trans(a[0]);
  out[1] = movmatrix_trans(a[2]);
  out[2] = movmatrix_trans(a[1]);
  out[3] = movmatrix_trans(a[3]);
}

__device__ __forceinline__ void density_backward(const Weights& w, int lane,
                                                 const HalfTile& combined,
                                                 const uint32_t (&mask)[2], float unscale,
                                                 DensitySums& sums) {
  uint32_t samples[2][2][4], rows[2][4][2];
  load_samples(combined, lane, samples);
  load_samples_as_rows(combined, lane, rows);
  const int t = lane & 3;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    uint32_t gated[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int unit = 16 * j + 8 * i;
      uint32_t units[4];
      load_units(w.density_w1, unit, lane, units);
      const float2 w2 = pair_at(&w.density_w2[unit + 2 * t]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float through[4];
        hidden_units(samples[m], units, through);
        bool on[4];
        for (int e = 0; e < 4; ++e) {
          on[e] = mask[m] >> mask_bit(j, i, e) & 1;
          if (on[e]) sums.w2[j][i][e & 1] += through[e] * unscale;
        }
        gated[m][2 * i] = to_half2(on[0] ? w2.x : 0.0f, on[1] ? w2.y : 0.0f);
        gated[m][2 * i + 1] = to_half2(on[2] ? w2.x : 0.0f, on[3] ? w2.y : 0.0f);
      }
    }
    uint32_t turned[2][4];
    for (int m = 0; m < 2; ++m) transpose(gated[m], turned[m]);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int m = 0; m < 2; ++m) mma_16816(c, turned[m], rows[m][n][0], rows[m][n][1]);
      for (int e = 0; e < 4; ++e) sums.w1[j][n][e] += c[e] * unscale;
    }
  }
}

// Leaves V1^T gate in `color_features`, scaled as the cotangents in `outputs` are. Without sums
// that is all.
template <bool kWithSums>
__device__ __forceinline__ void color_backward(const Weights& w, int lane, WarpMemory& memory,
                                               float unscale, ColorSums& sums) {
  uint32_t samples[2][2][4], rows[2][4][2], logits[4];
  load_samples(memory.features, lane, samples);
  load_samples_as_rows(memory.features, lane, rows);
  ldmatrix_x4_trans(logits, memory.color_logits[lane]);
  const int g = lane >> 2, t = lane & 3;
  float cotangents[2][2][3];  // [m][row g or g + 8]
  for (int m = 0; m < 2; ++m) {
    for (int half = 0; half < 2; ++half) {
      const float* row = memory.outputs[16 * m + 8 * half + g];
      for (int c = 0; c < 3; ++c) cotangents[m][half][c] = row[c];
    }
  }
  float q[2][4][4] = {};
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    uint32_t active[2][4], gated[2][4], back[4][2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int unit = 16 * j + 8 * i;
      uint32_t units[4];
      load_units(w.color_w1, unit, lane, units);
      float2 v2[3];
      for (int c = 0; c < 3; ++c) v2[c] = pair_at(&w.color_w2[c][unit + 2 * t]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float h[4], gates[4];
        hidden_units(samples[m], units, h);
        for (int e = 0; e < 4; ++e) {
          float sum = 0.0f;
          for (int c = 0; c < 3; ++c) {
            sum += cotangents[m][e >> 1][c] * (e & 1 ? v2[c].y : v2[c].x);
          }
          gates[e] = gate(h[e], sum);
          h[e] = relu(h[e]);
          h[e] = h[e] > kLargestHalf ? kLargestHalf : h[e];  // NaN stays
        }
        for (int half = 0; half < 2; ++half) {
          active[m][2 * i + half] = to_half2(h[2 * half], h[2 * half + 1]);
          gated[m][2 * i + half] = to_half2(gates[2 * half], gates[2 * half + 1]);
        }
      }
    }
    load_units_back(w.color_w1, 16 * j, lane, back);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      for (int n = 0; n < 4; ++n) mma_16816(q[m][n], gated[m], back[n][0], back[n][1]);
    }
    if constexpr (!kWithSums) continue;
    uint32_t turned[2][4];
    float v2_sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int m = 0; m < 2; ++m) {
      transpose(active[m], turned[m]);
      mma_16816(v2_sum, turned[m], logits[2 * m], logits[2 * m + 1]);
    }
    for (int e = 0; e < 4; ++e) sums.v2[j][e] += v2_sum[e] * unscale;
    for (int m = 0; m < 2; ++m) transpose(gated[m], turned[m]);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      float c[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      for (int m = 0; m < 2; ++m) mma_16816(c, turned[m], rows[m][n][0], rows[m][n][1]);
      float4* sum = reinterpret_cast<float4*>(memory.color_w1[j][n][lane]);
      const float4 old = *sum;
      *sum = make_float4(old.x + c[0] * unscale, old.y + c[1] * unscale, old.z + c[2] * unscale,
                         old.w + c[3] * unscale);
    }
  }
  store_samples(q, lane, memory.color_features);
}

// ---- what a warp has summed ---------------------------------------------------------------------

// Over a fragment's rows, i.e. the lanes of the same t.
__device__ __forceinline__ float sum_over_rows(float sum) {
  for (int offset = 4; offset < kWarp; offset *= 2) {
    sum += __shfl_xor_sync(kAllLanes, sum, offset);
  }
  return sum;
}

// A C fragment of 16 units by 8 inputs onto W's gradient.
__device__ __forceinline__ void add_fragment(float* grad, int width, int unit, int input, int lane,
                                             const float (&c)[4]) {
  const int row = unit + (lane >> 2), column = input + 2 * (lane & 3);
  if (column >= width) return;
  atomicAdd(grad + row * width + column, c[0]);
  atomicAdd(grad + row * width + column + 1, c[1]);
  atomicAdd(grad + (row + 8) * width + column, c[2]);
  atomicAdd(grad + (row + 8) * width + column + 1, c[3]);
}

__device__ __forceinline__ void add_weights(const RenderViewsGrads& grads, int width, int lane,
                                            const WarpMemory& memory, const DensitySums& density,
                                            const ColorSums& color) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int j = 0; j < kGroups; ++j) {
    for (int n = 0; n < 4; ++n) {
      add_fragment(grads.grad_density_w1, width, 16 * j, 8 * n, lane, density.w1[j][n]);
      add_fragment(grads.grad_color_w1, width, 16 * j, 8 * n, lane, memory.color_w1[j][n][lane]);
    }
    for (int i = 0; i < 2; ++i) {
      for (int e = 0; e < 2; ++e) {
        const float sum = sum_over_rows(density.w2[j][i][e]);
        if (g == 0) atomicAdd(grads.grad_density_w2 + 16 * j + 8 * i + 2 * t + e, sum);
      }
    }
    for (int e = 0; e < 4; ++e) {
      const int unit = 16 * j + g + 8 * (e >> 1), output = 2 * t + (e & 1);
      if (output < 3) atomicAdd(grads.grad_color_w2 + output * kFusedHidden + unit, color.v2[j][e]);
    }
  }
}

}  // namespace cuda
}  // namespace sdi
