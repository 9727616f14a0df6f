// The fused renderer's gradient of the hash table: first-order and normal parts in one scatter
// (render_bwd.cu has the formulas), onto f32 (float*) or fixed point (render_bwd_fixed.h).
#pragma once

#include "render_common.h"

namespace sdi {
namespace cuda {

constexpr int kMinShared = 8;  // lanes that must share a cell with another for sums over the warp
constexpr uint32_t kMaxKeyed = 1024;  // resolution up to which a cell's coordinates fit one key

// Cotangents of what the MLPs say of one sample.
struct Cotangents {
  float logit;
  float color_logits[3];
  float p[3];  // of J^T q
};

// Adds this lane's pair of values at each corner to the table's gradient.
template <class Pointer>
__device__ __forceinline__ void add_corners(Pointer entries, const uint32_t (&index)[8],
                                            const float (&v)[16]) {
#pragma unroll
  for (int k = 0; k < 8; k += 2) {
    if (index[k + 1] == index[k] + 1 && (index[k] & 1) == 0) {
      red_add_v4(entries + 2ll * index[k], v[2 * k], v[2 * k + 1], v[2 * k + 2], v[2 * k + 3]);
    } else {
      red_add_v2(entries + 2ll * index[k], v[2 * k], v[2 * k + 1]);
      red_add_v2(entries + 2ll * index[k + 1], v[2 * k + 2], v[2 * k + 3]);
    }
  }
}

// Sums over runs of lanes with the same key; afterwards the first lane of a run holds its sum.
__device__ __forceinline__ void add_runs(uint32_t heads, int lane, float (&v)[16]) {
  const uint32_t behind = lane == kWarp - 1 ? 0u : heads >> (lane + 1);
  const int end = behind ? lane + __ffs(static_cast<int>(behind)) : kWarp;  // of this lane's run
  const int longest =
      static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<unsigned>(end - lane)));
#pragma unroll 1
  for (int offset = 1; offset < longest; offset *= 2) {
    const bool is_same = lane + offset < end;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const float other = __shfl_down_sync(kAllLanes, v[k], offset);
      if (is_same) v[k] += other;
    }
  }
}

template <class Pointer>
__device__ __forceinline__ void scatter(const FusedSpec& spec, bool is_live, const float u[3],
                                        int lane, const Cotangents& c, const FloatTile& slope,
                                        const FloatTile& color_features, float unscale,
                                        Pointer grad_table) {
#pragma unroll 1
  for (int l = 0; l < spec.active_levels; ++l) {
    const FusedLevel& level = spec.levels[l];
    const Pointer entries = grad_table + 2ll * level.offset;
    float v[16] = {};
    uint32_t index[8] = {}, key = 0xffffffffu;
    if (is_live) {
      const Cell<float> cell = locate(as_level(level), u);
      float p[3], weights[8], slopes[8];
      for (int a = 0; a < 3; ++a) p[a] = c.p[a] * level.scale;
      corner_weights(cell, weights);
      corner_slopes(cell, p, slopes);
      const float2 q = pair_at(&slope[lane][2 * l]), r = pair_at(&color_features[lane][2 * l]);
      const float first = c.logit * q.x + r.x * unscale, second = c.logit * q.y + r.y * unscale;
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        index[k] = cell.index[k];
        v[2 * k] = weights[k] * first + slopes[k] * q.x;
        v[2 * k + 1] = weights[k] * second + slopes[k] * q.y;
      }
      if (level.resolution <= kMaxKeyed) {
        uint32_t corner[3];
        float unused;
        for (int a = 0; a < 3; ++a) split(u[a], level.scale, corner[a], unused);
        key = corner[0] | corner[1] << 10 | corner[2] << 20;
      }
    }
    bool is_head = is_live;
    if (level.resolution <= kMaxKeyed) {
      const uint32_t before = __shfl_up_sync(kAllLanes, key, 1);
      const uint32_t heads = __ballot_sync(kAllLanes, lane == 0 || before != key);
      if (__popc(heads) <= kWarp - kMinShared) {
        add_runs(heads, lane, v);
        is_head = is_live && (heads >> lane & 1);
      }
    }
    if (is_head) add_corners(entries, index, v);
  }
}

}  // namespace cuda
}  // namespace sdi
