// The fused renderer, backward (methods.md D; design.md, "The normal needs no second derivative").
// Twin: autograd through sdi_fast/reference/render_views.py.
//
// A ray's kept samples are walked front to back once more; everything of them is recomputed. With
// G_k = d loss / d w_k: d loss / d sigma_k = dt (T_{k+1} G_k - sum_{j>k} w_j G_j), and since G is
// linear in what the forward summed up, sum_j w_j G_j is known beforehand: <grad, ray sums>. So the
// sum behind k is that total less what has passed.
// Of a sample, with gl, ga the cotangents of logit and colour logits, p that of J^T q:
//   combined = gl e + J p                  W1 += (1[h>0] w2) x combined, w2 += 1[h>0] W1 combined
//   gate = 1[hc>0] V2^T ga                 V1 += gate x e, V2 += ga x relu(hc)
//   table entry of corner k += weight_k (gl q + V1^T gate) + (d weight_k . p) q
//
// Mapping: as the forward: a warp takes 8 x 4 pixels, one ray a lane, 32 samples at a time. All
// products of 32 samples run on tensor cores; sums over samples are products too, with A transposed
// by movmatrix. A warp keeps its sums for W1 in registers, for V1 in shared memory, and adds them
// to the gradients once, at its end. Table: neighbouring lanes in the same cell are added up first
// (segmented sums over the warp) where at least kMinShared lanes in all share one; then 8- and
// 16-byte atomics.
//
// Precision: operands of products f16, sums f32. Cotangents are scaled by a power of two a warp and
// step, so that the largest of the 32 samples is about 2^4; sums are unscaled in f32. The rest
// f32. Atomics: the order of additions, hence the last bits, differ between runs; there is a
// deterministic variant, in which they do not (render_bwd_fixed.h).
// Bytes: per kept sample as many gathered as forward, and up to 16 x 8 x 8 added to the gradients;
// nothing is stored per sample.
#include <cuda_runtime.h>

#include "launch.h"
#include "render_bwd_fixed.h"
#include "render_bwd_mlps.h"
#include "render_bwd_table.h"
#include "render_common.h"

namespace sdi {
namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kEncodeUnroll = 1;
constexpr int kBlocks = 2;  // a multiprocessor
struct BlockMemory {
  Weights weights;
  WarpMemory warps[kWarps];
};

// ---- per ray -----------------------------------------------------------------------------------

struct RayGrads {
  float rgb[3], normal[3];
  float depth, orient;
  float constant, square, centre;  // opacity and z_variance: constant + square (t - centre)^2
  float behind;                    // sum of w G over the samples not yet passed
  float optical;                   // of those passed
};

__device__ __forceinline__ void load_grads(const RenderViewsArgs& a, const RenderViewsGrads& g,
                                           int64_t ray, RayGrads& r) {
  const float opacity = a.opacity[ray];
  const bool is_thick = opacity > static_cast<float>(kMinOpacity);
  r.depth = g.grad_depth[ray];
  r.orient = g.grad_orient[ray];
  r.square = is_thick ? g.grad_z_variance[ray] / opacity : 0.0f;
  r.centre = is_thick ? a.depth[ray] / opacity : 0.0f;
  r.constant = g.grad_opacity[ray] - r.square * a.z_variance[ray];
  r.behind = r.depth * a.depth[ray] + g.grad_opacity[ray] * opacity;
  for (int c = 0; c < 3; ++c) {
    r.rgb[c] = g.grad_rgb_sum[3 * ray + c];
    r.normal[c] = g.grad_normal_sum[3 * ray + c];
    r.behind += r.rgb[c] * a.rgb_sum[3 * ray + c] + r.normal[c] * a.normal_sum[3 * ray + c];
  }
  r.optical = 0.0f;
}

// Reads a lane's kept steps in order.
struct KeptWalker {
  const uint32_t* words;
  uint32_t bits;
  int first, word, n_words;

  __device__ __forceinline__ void begin(const RenderViewsArgs& a, const TileRay& at, int lane) {
    words = a.kept + static_cast<int64_t>(at.tile) * a.n_words * kWarp + lane;
    n_words = at.ray < 0 ? 0 : static_cast<int>(a.n_words);
    first = static_cast<int>(words[0]);
    word = 0;
    bits = 0;
  }

  __device__ __forceinline__ int next() {
    while (bits == 0) {
      if (++word >= n_words) return -1;
      bits = words[static_cast<int64_t>(word) * kWarp];
    }
    const int bit = __ffs(static_cast<int>(bits)) - 1;
    bits &= bits - 1;
    return first + (word - 1) * 32 + bit;
  }
};

// ---- per sample --------------------------------------------------------------------------------

__device__ __forceinline__ void sample_cotangents(const RenderViewsArgs& a, const FusedSpec& spec,
                                                  const TileRay& at, const RayWalk<float>& ray,
                                                  const float x[3], int step, const SampleState& s,
                                                  RayGrads& r, Cotangents& c) {
  const float begin = begin_of(ray, static_cast<float>(step));
  const float end = begin_of(ray, static_cast<float>(step) + 1.0f);
  const float middle = 0.5f * (begin + end), dt = end - begin;
  const float optical = s.density * dt;
  const float weight = exp_of(-r.optical) * -expm1_of(-optical);
  r.optical += optical;
  float light[3], rgb[3];
  for (int k = 0; k < 3; ++k) light[k] = a.light_positions[3 * at.view + k];
  shade_forward(a.shading, s.albedo, s.normal, x, light, rgb);
  const float off = middle - r.centre;
  float g = r.constant + r.depth * middle + r.square * off * off;
  float facing = 0.0f;
  for (int k = 0; k < 3; ++k) {
    g += r.rgb[k] * rgb[k] + r.normal[k] * s.normal[k];
    facing += s.normal[k] * ray.direction[k];
  }
  r.behind -= weight * g;
  const float grad_density = dt * (exp_of(-r.optical) * g - r.behind);
  c.logit = grad_density * softplus_slope(s.logit);

  float grad_rgb[3], grad_albedo[3], grad_normal[3], grad_gradient[3];
  for (int k = 0; k < 3; ++k) grad_rgb[k] = weight * r.rgb[k];
  shade_backward(a.shading, s.albedo, s.normal, x, light, grad_rgb, grad_albedo, grad_normal);
  const float tilt = facing > 0.0f ? 2.0f * r.orient * weight * facing : 0.0f;
  for (int k = 0; k < 3; ++k) {
    grad_normal[k] += weight * r.normal[k] + tilt * ray.direction[k];
    c.color_logits[k] = grad_albedo[k] * s.albedo[k] * (1.0f - s.albedo[k]);
  }
  normal_backward(s.normal, s.length, grad_normal, grad_gradient);
  for (int k = 0; k < 3; ++k) c.p[k] = grad_gradient[k] * spec.to_unit;
}

// Small, since colour gates are up to 3 |V2| times that and have to fit f16 too.
constexpr int kLargest = 4;

// The power of two that brings the warp's largest magnitude to 2^kLargest, and its inverse.
struct Scale {
  float up, down;
};

__device__ __forceinline__ Scale warp_scale(float magnitude) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    magnitude = fmaxf(magnitude, __shfl_xor_sync(kAllLanes, magnitude, offset));
  }
  int exponent = __float_as_int(magnitude) >> 23 & 255;  // NaN is lost here, but not in the values
  if (exponent == 0 || exponent == 255) exponent = 127 + kLargest;
  exponent = exponent < 20 ? 20 : exponent;
  return {__int_as_float((254 + kLargest - exponent) << 23),
          __int_as_float((exponent - kLargest) << 23)};
}

// gl e + J p of this lane's sample, scaled, into `combined`.
__device__ __forceinline__ Scale combine(const FusedSpec& spec, const Cotangents& c, int lane,
                                         const HalfTile& features, const JacobianTile& jacobian,
                                         HalfTile& combined) {
  float values[kInputs], largest = 0.0f;
#pragma unroll
  for (int l = 0; l < kFusedLevels; ++l) {
    const float2 e = to_float2(reinterpret_cast<const uint32_t*>(features[lane])[l]);
    float first = c.logit * e.x, second = c.logit * e.y;
    for (int a = 0; a < 3; ++a) {
      const float2 slope = to_float2(jacobian[l][a][lane]);
      const float p = c.p[a] * spec.levels[l].scale;
      first += slope.x * p;
      second += slope.y * p;
    }
    values[2 * l] = first;
    values[2 * l + 1] = second;
    largest = fmaxf(largest, fmaxf(fabsf(first), fabsf(second)));
  }
  const Scale scale = warp_scale(largest);
#pragma unroll
  for (int l = 0; l < kFusedLevels; ++l) {
    reinterpret_cast<uint32_t*>(combined[lane])[l] =
        to_half2(values[2 * l] * scale.up, values[2 * l + 1] * scale.up);
  }
  return scale;
}

// The colour logits' cotangents of this lane's sample, scaled, in f32 and f16.
__device__ __forceinline__ Scale store_color_logits(const Cotangents& c, int lane,
                                                    OutputTile& outputs,
                                                    __half (&color_logits)[kWarp][8]) {
  const float* g = c.color_logits;
  const Scale scale = warp_scale(fmaxf(fabsf(g[0]), fmaxf(fabsf(g[1]), fabsf(g[2]))));
  const float r = g[0] * scale.up, s = g[1] * scale.up, t = g[2] * scale.up;
  *reinterpret_cast<float4*>(outputs[lane]) = make_float4(r, s, t, 0.0f);
  *reinterpret_cast<uint4*>(color_logits[lane]) =
      make_uint4(to_half2(r, s), to_half2(t, 0.0f), 0, 0);
  return scale;
}

// ---- kernels -----------------------------------------------------------------------------------

// What becomes of the samples' gradients.
enum class Pass {
  kAdd,    // added up in f32, in any order
  kBound,  // only bounded (render_bwd_fixed.h)
  kFixed,  // added up in fixed point
};

// The next tile of a warp; n_tiles or more: none is left. `own` counts the warp's own tiles, where
// its sums may not depend on which warp came first.
template <Pass kPass>
__device__ __forceinline__ uint32_t next_tile(const RenderViewsArgs& a, int lane, uint32_t& own) {
  if constexpr (kPass != Pass::kFixed) return fetch_tile(a.next_tile, lane);
  const uint32_t tile = own;
  own += gridDim.x * kWarps;
  return tile;
}

template <Pass kPass>
__device__ __forceinline__ void walk(const RenderViewsArgs& a, const RenderViewsGrads& grads,
                                     const RenderViewsSums& sums, const FusedSpec& spec) {
  SDI_DYNAMIC_SHARED(unsigned char, bytes);
  BlockMemory& block = *reinterpret_cast<BlockMemory*>(bytes);
  [[maybe_unused]] uint32_t* counts = nullptr;
  if constexpr (kPass == Pass::kBound) counts = clear_counts();
  load_weights(a, spec, block.weights);
  const Weights& weights = block.weights;
  const int lane = threadIdx.x % kWarp;
  WarpMemory& memory = block.warps[threadIdx.x / kWarp];
  for (int j = 0; j < kGroups; ++j) {
    for (int n = 0; n < 4; ++n) {
      for (int e = 0; e < 4; ++e) memory.color_w1[j][n][lane][e] = 0.0f;
    }
  }
  DensitySums density{};
  ColorSums color{};
  const uint32_t warp = blockIdx.x * kWarps + threadIdx.x / kWarp;
  uint32_t own = warp;
  [[maybe_unused]] float scale = 0.0f;
  if constexpr (kPass == Pass::kFixed) scale = sums.scale[0];
  const uint32_t n_tiles = static_cast<uint32_t>(n_tiles_of(a));
  for (uint32_t tile; (tile = next_tile<kPass>(a, lane, own)) < n_tiles;) {
    const TileRay at = ray_of(a, static_cast<int>(tile), lane);
    KeptWalker walker;
    walker.begin(a, at, lane);
    RayWalk<float> ray{};
    RayGrads r{};
    if (at.ray >= 0) {
      ray = make_ray(a, at);
      load_grads(a, grads, at.ray, r);
    }
    while (true) {
      const int step = walker.next();
      const bool has = step >= 0;
      if (!__any_sync(kAllLanes, has)) break;
      float x[3], u[3];
      if (has) {
        const float k = static_cast<float>(step);
        place_sample(spec, ray, 0.5f * (begin_of(ray, k) + begin_of(ray, k + 1.0f)), x, u);
      }
      __syncwarp();  // the last samples' memory is read
      encode<kEncodeUnroll>(spec, a.table, has, u, lane, memory.features, memory.jacobian);
      uint32_t mask[2];
      evaluate_mlps(weights, lane, memory.features, memory.slope, memory.outputs, mask);
      Cotangents c{};
      if (has) {
        SampleState s;
        read_sample(spec, x, lane, memory.slope, memory.jacobian, memory.outputs, s);
        sample_cotangents(a, spec, at, ray, x, step, s, r, c);
      }
      [[maybe_unused]] Scale combined_scale{};
      if constexpr (kPass != Pass::kBound) {
        combined_scale = combine(spec, c, lane, memory.features, memory.jacobian, memory.combined);
      }
      const Scale color_scale = store_color_logits(c, lane, memory.outputs, memory.color_logits);
      __syncwarp();
      if constexpr (kPass != Pass::kBound) {
        density_backward(weights, lane, memory.combined, mask, combined_scale.down, density);
      }
      color_backward<kPass != Pass::kBound>(weights, lane, memory, color_scale.down, color);
      __syncwarp();
      if constexpr (kPass == Pass::kAdd) {
        scatter(spec, has, u, lane, c, memory.slope, memory.color_features, color_scale.down,
                grads.grad_table);
      } else if constexpr (kPass == Pass::kFixed) {
        scatter(spec, has, u, lane, c, memory.slope, memory.color_features, color_scale.down,
                FixedPointer{sums.table, scale});
      } else if (has) {
        count_sample(spec, lane, c, memory.slope, memory.color_features, color_scale.down, counts);
      }
    }
  }
  __syncwarp();
  if constexpr (kPass == Pass::kAdd) add_weights(grads, spec.width, lane, memory, density, color);
  if constexpr (kPass == Pass::kFixed) {
    store_weights(sums.weights + static_cast<int64_t>(warp) * kFusedWeights, lane, memory, density,
                  color);
  }
  if constexpr (kPass == Pass::kBound) store_counts(counts, sums.counts);
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    render_views_bwd_kernel(const RenderViewsArgs a, const RenderViewsGrads grads,
                            const FusedSpec spec) {
  walk<Pass::kAdd>(a, grads, {}, spec);
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    render_views_bwd_bound_kernel(const RenderViewsArgs a, const RenderViewsGrads grads,
                                  const RenderViewsSums sums, const FusedSpec spec) {
  walk<Pass::kBound>(a, grads, sums, spec);
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    render_views_bwd_fixed_kernel(const RenderViewsArgs a, const RenderViewsGrads grads,
                                  const RenderViewsSums sums, const FusedSpec spec) {
  walk<Pass::kFixed>(a, grads, sums, spec);
}

}  // namespace

int launch_render_views_bwd(const RenderViewsArgs& a, const RenderViewsGrads& grads, void* stream) {
  if (!is_fusable(a)) return kBadArgument;
  const int64_t n_tiles = n_tiles_of(a);
  if (n_tiles == 0) return kOk;
  if (!a.kept || a.n_words < 2) return kBadArgument;
  const int status = clear(a.next_tile, sizeof(uint32_t), stream);
  if (status != kOk) return status;
  if (!allow_shared(render_views_bwd_kernel, sizeof(BlockMemory))) return kCudaError;
  const unsigned blocks = persistent_blocks(kBlocks, (n_tiles + kWarps - 1) / kWarps);
  return launch(render_views_bwd_kernel, blocks, kThreads, sizeof(BlockMemory), stream, a, grads,
                fused_spec(a.spec));
}

int64_t render_views_bwd_warps() {
  return persistent_blocks(kBlocks, kMaxBlocks) * int64_t{kWarps};
}

int launch_render_views_bwd_deterministic(const RenderViewsArgs& a, const RenderViewsGrads& grads,
                                          const RenderViewsSums& sums, void* stream) {
  if (!is_fusable(a)) return kBadArgument;
  const int64_t n_tiles = n_tiles_of(a);
  if (n_tiles == 0) return kOk;
  if (!a.kept || a.n_words < 2) return kBadArgument;
  const int64_t n_active = a.spec.grid.offset[a.spec.active_levels] * kFusedFeatures;
  for (const int status : {clear(a.next_tile, sizeof(uint32_t), stream),
                           clear(sums.counts, kExponents * sizeof(uint64_t), stream),
                           clear(sums.table, n_active * sizeof(uint64_t), stream)}) {
    if (status != kOk) return status;
  }
  constexpr size_t kShared = sizeof(BlockMemory);
  if (!allow_shared(render_views_bwd_bound_kernel, kShared)) return kCudaError;
  if (!allow_shared(render_views_bwd_fixed_kernel, kShared)) return kCudaError;
  const FusedSpec spec = fused_spec(a.spec);
  const unsigned blocks = persistent_blocks(kBlocks, (n_tiles + kWarps - 1) / kWarps);
  int status = launch(render_views_bwd_bound_kernel, blocks, kThreads, kShared, stream, a, grads,
                      sums, spec);
  if (status != kOk) return status;
  status = launch(fixed_scale_kernel, 1, kExponents, 0, stream, sums);
  if (status != kOk) return status;
  status = launch(render_views_bwd_fixed_kernel, blocks, kThreads, kShared, stream, a, grads, sums,
                  spec);
  if (status != kOk) return status;
  return launch_fixed_to_float(sums, n_active, static_cast<int>(blocks) * kWarps, spec.width, grads,
                               stream);
}

}  // namespace cuda
}  // namespace sdi
