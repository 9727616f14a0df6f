// What the fused renderer's forward and backward share: a warp's rays, its steps through the
// occupancy grid, the hash encoding with its derivatives, and both MLPs on tensor cores.
//
// A warp takes a tile of 8 x 4 pixels, one ray a lane in Morton order, so that its 32 samples lie
// close together: their table entries share cache lines, and on coarse levels cells.
#pragma once

#include "../math/compositing.h"
#include "../math/field.h"
#include "../math/march.h"
#include "../math/shade.h"
#include "../render.h"
#include "items.h"
#include "warp.h"

namespace sdi {
namespace cuda {

using namespace SDI_ISA;

constexpr int kInputs = kFusedLevels * kFusedFeatures;
constexpr int kHalfRow = kInputs + 8;   // halves a row: ldmatrix then meets every bank once
constexpr int kFloatRow = kInputs + 4;  // floats a row, for the same reason with 16-byte reads

// ---- constants of a launch ---------------------------------------------------------------------

struct FusedLevel {
  uint32_t offset;  // entries
  uint32_t size;    // entries
  uint32_t resolution;
  float scale;
  bool is_dense;
};

struct FusedSpec {
  FusedLevel levels[kFusedLevels];
  int active_levels;
  int width;  // 2 L: columns of the first layers' weights
  float radius;
  float to_unit;  // 1 / (2 radius)
  float blob_scale, blob_slope, blob_inverse_std;
};

inline FusedSpec fused_spec(const FieldSpec& spec) {
  FusedSpec s{};
  for (int l = 0; l < spec.grid.n_levels; ++l) {
    s.levels[l] = {static_cast<uint32_t>(spec.grid.offset[l]),
                   static_cast<uint32_t>(spec.grid.offset[l + 1] - spec.grid.offset[l]),
                   static_cast<uint32_t>(spec.grid.resolution[l]),
                   static_cast<float>(spec.grid.scale[l]), spec.grid.is_dense[l] != 0};
  }
  s.active_levels = spec.active_levels;
  s.width = spec.grid.n_levels * spec.grid.n_features;
  s.radius = static_cast<float>(spec.radius);
  s.to_unit = static_cast<float>(1.0 / (2.0 * spec.radius));
  s.blob_scale = static_cast<float>(spec.blob_scale);
  s.blob_slope = static_cast<float>(-spec.blob_scale / spec.blob_std);
  s.blob_inverse_std = static_cast<float>(1.0 / spec.blob_std);
  return s;
}

// Tiles of 8 x 4 pixels, some of them hanging over the image's edge.
__host__ __device__ inline int64_t n_tiles_of(const RenderViewsArgs& a) {
  return a.n_views * ((a.width + kTileWidth - 1) / kTileWidth) *
         ((a.height + kTileHeight - 1) / kTileHeight);
}

inline int64_t n_cells_of(const RenderViewsArgs& a) {
  return static_cast<int64_t>(a.occupancy_resolution) * a.occupancy_resolution *
         a.occupancy_resolution;
}

// What the fused kernels can take; sdi_fast/ops/render_views.py asks the same before.
inline bool is_fusable(const RenderViewsArgs& a) {
  constexpr int64_t kLimit = 1ll << 31;
  return a.spec.grid.n_features == kFusedFeatures && a.spec.grid.n_levels <= kFusedLevels &&
         a.spec.hidden == kFusedHidden && a.spec.grid.offset[a.spec.grid.n_levels] < kLimit &&
         n_tiles_of(a) < kLimit && n_cells_of(a) < kLimit;
}

// ---- shared memory -----------------------------------------------------------------------------

struct alignas(16) Weights {  // of a block
  __half density_w1[kFusedHidden][kHalfRow];
  __half color_w1[kFusedHidden][kHalfRow];
  float density_w2[kFusedHidden];
  float color_w2[3][kFusedHidden];
};

__device__ inline void load_weights(const RenderViewsArgs& a, const FusedSpec& spec, Weights& w) {
  const int n_in = spec.active_levels * kFusedFeatures;
  for (int k = threadIdx.x; k < kFusedHidden * kInputs; k += blockDim.x) {
    const int h = k / kInputs, i = k % kInputs;
    const bool is_active = i < n_in;  // masked levels do not enter
    w.density_w1[h][i] = __float2half_rn(is_active ? a.density_w1[h * spec.width + i] : 0.0f);
    w.color_w1[h][i] = __float2half_rn(is_active ? a.color_w1[h * spec.width + i] : 0.0f);
  }
  for (int k = threadIdx.x; k < kFusedHidden; k += blockDim.x) {
    w.density_w2[k] = a.density_w2[k];
    for (int c = 0; c < 3; ++c) w.color_w2[c][k] = a.color_w2[c * kFusedHidden + k];
  }
  __syncthreads();
}

using HalfTile = __half[kWarp][kHalfRow];               // [sample, feature]
using FloatTile = float[kWarp][kFloatRow];              // [sample, feature]
using JacobianTile = uint32_t[kFusedLevels][3][kWarp];  // half2 of both features' slopes in a cell
using OutputTile = float[kWarp][4];                     // [sample, logit and colour logits]

// ---- rays --------------------------------------------------------------------------------------

struct TileRay {
  int64_t ray;  // -1: outside the image
  int view;
  int tile;
};

__device__ __forceinline__ TileRay ray_of(const RenderViewsArgs& a, int tile, int lane) {
  const int tiles_x = static_cast<int>((a.width + kTileWidth - 1) / kTileWidth);
  const int tiles_y = static_cast<int>((a.height + kTileHeight - 1) / kTileHeight);
  const int view = tile / (tiles_x * tiles_y), rest = tile % (tiles_x * tiles_y);
  const int x = rest % tiles_x * kTileWidth + ((lane & 1) | (lane >> 1 & 2) | (lane >> 2 & 4));
  const int y = rest / tiles_x * kTileHeight + ((lane >> 1 & 1) | (lane >> 2 & 2));
  const bool is_inside = x < a.width && y < a.height;
  return {is_inside ? (static_cast<int64_t>(view) * a.height + y) * a.width + x : -1, view, tile};
}

// The next tile of a warp; n_tiles or more: none is left.
__device__ __forceinline__ uint32_t fetch_tile(uint32_t* next_tile, int lane) {
  uint32_t tile = 0;
  if (lane == 0) tile = atomicAdd(next_tile, 1u);
  return __shfl_sync(kAllLanes, tile, 0);
}

// The ray through a pixel's centre (methods.md D, Rays), as the twin computes it.
__device__ __forceinline__ RayWalk<float> make_ray(const RenderViewsArgs& a, const TileRay& at) {
  RayWalk<float> walk;
  const float* m = a.c2w + 12 * at.view;
  const float focal = 0.5f * static_cast<float>(a.height) / tanf(0.5f * a.fovy[at.view]);
  const int64_t pixel = at.ray - static_cast<int64_t>(at.view) * a.height * a.width;
  const float column = static_cast<float>(pixel % a.width),
              row = static_cast<float>(pixel / a.width);
  const float x = (column + 0.5f - 0.5f * static_cast<float>(a.width)) / focal;
  const float y = -(row + 0.5f - 0.5f * static_cast<float>(a.height)) / focal;
  float d[3], length = 0.0f;
  for (int c = 0; c < 3; ++c) {
    d[c] = m[4 * c] * x + m[4 * c + 1] * y - m[4 * c + 2];
    length += d[c] * d[c];
  }
  length = fmaxf(sqrtf(length), static_cast<float>(kNormalizeEps));
  for (int c = 0; c < 3; ++c) {
    walk.direction[c] = d[c] / length;
    walk.origin[c] = m[4 * c + 3];
  }
  walk.start = static_cast<float>(a.near) + (a.jitter ? a.jitter[at.ray] : 0.0f);
  walk.step = static_cast<float>(a.step_size);
  walk.radius = static_cast<float>(a.spec.radius);
  walk.side = static_cast<float>(2.0 * a.spec.radius);
  walk.resolution = static_cast<float>(a.occupancy_resolution);
  return walk;
}

// ---- hash encoding -----------------------------------------------------------------------------

__device__ __forceinline__ Level<float> as_level(const FusedLevel& level) {
  return {nullptr, level.scale, level.size, level.resolution, level.is_dense};
}

__device__ __forceinline__ float2 to_float2(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ __forceinline__ uint32_t to_half2(float x, float y) {
  const __half2 pair = __floats2half2_rn(x, y);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Features and their slopes inside the cell (d feature / d u divided by the level's scale) of this
// lane's sample. Lanes without one write zeros. kUnroll: levels at once; more of them hide each
// other's latency, fewer leave the instruction cache to the rest of the kernel.
template <int kUnroll>
__device__ __forceinline__ void encode(const FusedSpec& spec, const uint16_t* table, bool is_live,
                                       const float u[3], int lane, HalfTile& features,
                                       JacobianTile& jacobian) {
  uint32_t* row = reinterpret_cast<uint32_t*>(features[lane]);
#pragma unroll kUnroll
  for (int l = 0; l < kFusedLevels; ++l) {
    uint32_t value = 0, slopes[3] = {0, 0, 0};
    if (is_live && l < spec.active_levels) {
      const uint32_t* entries = reinterpret_cast<const uint32_t*>(table) + spec.levels[l].offset;
      const Cell<float> cell = locate(as_level(spec.levels[l]), u);
      uint32_t pairs[8];
      for (int k = 0; k < 8; ++k) pairs[k] = __ldg(entries + cell.index[k]);
      float v[2][8], slope[2][3];
      for (int k = 0; k < 8; ++k) {
        const float2 pair = to_float2(pairs[k]);
        v[0][k] = pair.x;
        v[1][k] = pair.y;
      }
      const float first = interpolate_with_slope(cell, v[0], slope[0]);
      const float second = interpolate_with_slope(cell, v[1], slope[1]);
      value = to_half2(first, second);
      for (int a = 0; a < 3; ++a) slopes[a] = to_half2(slope[0][a], slope[1][a]);
    }
    row[l] = value;
    for (int a = 0; a < 3; ++a) jacobian[l][a][lane] = slopes[a];
  }
}

// ---- MLPs --------------------------------------------------------------------------------------

// A fragments [tile of 16 samples][16 features of it] of a tile of samples.
__device__ __forceinline__ void load_samples(const HalfTile& tile, int lane,
                                             uint32_t (&a)[2][2][4]) {
  for (int m = 0; m < 2; ++m) {
    for (int k = 0; k < 2; ++k) {
      ldmatrix_x4(a[m][k], &tile[16 * m + (lane & 15)][16 * k + (lane >> 4) * 8]);
    }
  }
}

// The C fragments [tile of 16 samples][8 features of it], stored as rows of samples.
__device__ __forceinline__ void store_samples(const float (&c)[2][4][4], int lane,
                                              FloatTile& tile) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    for (int n = 0; n < 4; ++n) {
      for (int half = 0; half < 2; ++half) {
        *reinterpret_cast<float2*>(&tile[16 * m + 8 * half + g][8 * n + 2 * t]) =
            make_float2(c[m][n][2 * half], c[m][n][2 * half + 1]);
      }
    }
  }
}

// B fragments of W^T for 8 hidden units: [32 inputs, 8 units]
__device__ __forceinline__ void load_units(const __half (&w)[kFusedHidden][kHalfRow], int unit,
                                           int lane, uint32_t (&b)[4]) {
  ldmatrix_x4(b, &w[unit + (lane & 7)][(lane >> 3) * 8]);
}

// B fragments of W for 16 hidden units: [16 units, 32 inputs], two registers an 8-column tile
__device__ __forceinline__ void load_units_back(const __half (&w)[kFusedHidden][kHalfRow], int unit,
                                                int lane, uint32_t (&b)[4][2]) {
  for (int pair = 0; pair < 2; ++pair) {
    uint32_t r[4];
    ldmatrix_x4_trans(r, &w[unit + (lane & 15)][(2 * pair + (lane >> 4)) * 8]);
    b[2 * pair][0] = r[0], b[2 * pair][1] = r[1];
    b[2 * pair + 1][0] = r[2], b[2 * pair + 1][1] = r[3];
  }
}

// 8 hidden units of 16 samples before the activation.
__device__ __forceinline__ void hidden_units(const uint32_t (&samples)[2][4],
                                             const uint32_t (&units)[4], float (&c)[4]) {
  c[0] = c[1] = c[2] = c[3] = 0.0f;
  mma_16816(c, samples[0], units[0], units[1]);
  mma_16816(c, samples[1], units[2], units[3]);
}

__device__ __forceinline__ float2 pair_at(const float* values) {  // 8-byte aligned
  return *reinterpret_cast<const float2*>(values);
}

// Bit of a hidden unit's activity: element e of tile i of group j (16 units a group).
__device__ __forceinline__ constexpr int mask_bit(int j, int i, int e) { return 8 * j + 4 * i + e; }

// Both MLPs forward and the density MLP's input gradient. Reads `features`; leaves logit and colour
// logits in `outputs` and q = W1^T (1[h > 0] * w2) in `slope`, which may share memory with
// `features`. mask[m]: which units of the density MLP are active, for the 16 samples m.
__device__ __forceinline__ void evaluate_mlps(const Weights& w, int lane, const HalfTile& features,
                                              FloatTile& slope, OutputTile& outputs,
                                              uint32_t (&mask)[2]) {
  uint32_t samples[2][2][4];
  __syncwarp();
  load_samples(features, lane, samples);
  __syncwarp();
  const int g = lane >> 2, t = lane & 3;
  float q[2][4][4] = {};
  float sums[2][2][4] = {};  // [m][row g or g + 8][logit, colour logits]
  mask[0] = mask[1] = 0;
#pragma unroll 1
  for (int j = 0; j < kFusedHidden / 16; ++j) {
    uint32_t back[4][2], gated[2][4];
    load_units_back(w.density_w1, 16 * j, lane, back);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int unit = 16 * j + 8 * i;
      uint32_t units[4];
      load_units(w.density_w1, unit, lane, units);
      const float2 w2 = pair_at(&w.density_w2[unit + 2 * t]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float h[4];
        hidden_units(samples[m], units, h);
        for (int e = 0; e < 4; ++e) {
          sums[m][e >> 1][0] += relu(h[e]) * (e & 1 ? w2.y : w2.x);
          mask[m] |= (h[e] > 0.0f ? 1u : 0u) << mask_bit(j, i, e);
        }
        gated[m][2 * i] = to_half2(gate(h[0], w2.x), gate(h[1], w2.y));
        gated[m][2 * i + 1] = to_half2(gate(h[2], w2.x), gate(h[3], w2.y));
      }
      load_units(w.color_w1, unit, lane, units);
      float2 v2[3];
      for (int c = 0; c < 3; ++c) v2[c] = pair_at(&w.color_w2[c][unit + 2 * t]);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        float h[4];
        hidden_units(samples[m], units, h);
        for (int e = 0; e < 4; ++e) {
          const float active = relu(h[e]);
          for (int c = 0; c < 3; ++c) {
            sums[m][e >> 1][1 + c] += active * (e & 1 ? v2[c].y : v2[c].x);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      for (int n = 0; n < 4; ++n) mma_16816(q[m][n], gated[m], back[n][0], back[n][1]);
    }
  }
  store_samples(q, lane, slope);
#pragma unroll
  for (int m = 0; m < 2; ++m) {
    for (int half = 0; half < 2; ++half) {
      float mine = 0.0f;  // lane t of a quad keeps output t
      for (int o = 0; o < 4; ++o) {
        float sum = sums[m][half][o];
        sum += __shfl_xor_sync(kAllLanes, sum, 1);
        sum += __shfl_xor_sync(kAllLanes, sum, 2);
        if (o == t) mine = sum;
      }
      outputs[16 * m + 8 * half + g][t] = mine;
    }
  }
  __syncwarp();
}

// ---- one sample --------------------------------------------------------------------------------

struct SampleState {
  float logit, density;
  float albedo[3];
  float normal[3];
  float length;  // of the density's gradient, floored
};

// What the MLPs' results mean for this lane's sample at x.
__device__ __forceinline__ void read_sample(const FusedSpec& spec, const float x[3], int lane,
                                            const FloatTile& slope, const JacobianTile& jacobian,
                                            const OutputTile& outputs, SampleState& s) {
  float gradient[3] = {0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int l = 0; l < kFusedLevels; l += 2) {
    if (l >= spec.active_levels) break;
    const float4 q = *reinterpret_cast<const float4*>(&slope[lane][2 * l]);
    const float low = spec.levels[l].scale, high = spec.levels[l + 1].scale;
    for (int a = 0; a < 3; ++a) {
      const float2 first = to_float2(jacobian[l][a][lane]);
      const float2 second = to_float2(jacobian[l + 1][a][lane]);  // zeros where masked
      gradient[a] += low * (q.x * first.x + q.y * first.y);
      gradient[a] += high * (q.z * second.x + q.w * second.y);
    }
  }
  const float distance = sqrtf(x[0] * x[0] + x[1] * x[1] + x[2] * x[2]);
  const float blob = spec.blob_slope / fmaxf(distance, static_cast<float>(kCentreEps));
  for (int a = 0; a < 3; ++a) gradient[a] = gradient[a] * spec.to_unit + blob * x[a];
  s.logit = outputs[lane][0] + spec.blob_scale * (1.0f - distance * spec.blob_inverse_std);
  s.density = softplus(s.logit);
  s.length = normal_from_gradient(gradient, s.normal);
  for (int c = 0; c < 3; ++c) s.albedo[c] = sigmoid(outputs[lane][1 + c]);
}

__device__ __forceinline__ void place_sample(const FusedSpec& spec, const RayWalk<float>& walk,
                                             float middle, float x[3], float u[3]) {
  for (int a = 0; a < 3; ++a) {
    x[a] = walk.origin[a] + walk.direction[a] * middle;
    u[a] = (x[a] + spec.radius) / walk.side;
  }
}

}  // namespace cuda
}  // namespace sdi
