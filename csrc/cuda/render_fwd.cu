// The fused renderer, forward (methods.md D: rays, marching, field, shading, compositing).
// Twin: sdi_fast/reference/render_views.py.
//
// Per sample: alpha = 1 - exp(-sigma dt), w = T alpha; per ray: sum w c, O = sum w, sum w t,
// sum w n, z_variance = [O > .5] sum w (t - zbar)^2 / O, orient = sum w max(0, n . d)^2. A step is
// kept if T (over all steps tried) >= early_stop_eps and alpha >= the threshold; T in w is over the
// kept ones. Kept steps are one bit each in `kept`, so that no buffer can overflow and nothing is
// stored per sample.
//
// Mapping: a warp takes a tile of 8 x 4 pixels, one ray a lane, and fetches the next tile when all
// are done. Every lane walks on to its next occupied step by itself; then the warp evaluates its 32
// samples together: gathers from the f16 table one lane a sample, MLPs by tensor cores over the
// tile. Only what a lane sums up stays in its registers.
//
// Precision: table, features, slopes and first-layer weights f16; products accumulate in f32;
// second layers, activations, compositing f32. z_variance by West's update.
// Bytes: per step tried 16 x 8 table entries of 4 (from L1 and L2); per ray 56 written, and n_words
// * 4 of `kept`, which is zeroed first.
#include <cuda_runtime.h>

#include "launch.h"
#include "render_common.h"

namespace sdi {

int64_t render_views_words(double radius, double step_size) {
  const double steps = 2.0 * 1.7320508075688772 * radius / step_size + 8.0;  // with march.h's slack
  return steps < 1e9 ? 1 + (static_cast<int64_t>(steps) + 31) / 32 : 0;
}

namespace cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kEncodeUnroll = 2;
constexpr int kBlocks = 3;  // a multiprocessor
constexpr int kPackThreads = 256;

struct alignas(16) WarpMemory {
  union {
    HalfTile features;
    FloatTile slope;
  };
  JacobianTile jacobian;
  OutputTile outputs;
};

struct BlockMemory {
  Weights weights;
  WarpMemory warps[kWarps];
};

// One bit a cell; also clears the counters.
__global__ void pack_occupancy_kernel(const RenderViewsArgs a) {
  const int n = a.occupancy_resolution * a.occupancy_resolution * a.occupancy_resolution;
  const int word = blockIdx.x * blockDim.x + threadIdx.x;
  if (word == 0) {
    a.counts[0] = a.counts[1] = 0;
    *a.next_tile = 0;
  }
  if (word >= (n + 31) / 32) return;
  uint32_t bits = 0;
  for (int k = 0; k < 32; ++k) {
    if (32 * word + k < n && a.occupancy[32 * word + k]) bits |= 1u << k;
  }
  a.occupancy_bits[word] = bits;
}

// Walks a lane along its ray from one occupied step to the next.
struct Walker {
  RayWalk<float> ray;
  float steps_per_cell[3];  // signed
  int next, last;
  int resolution;

  __device__ __forceinline__ void begin(const RenderViewsArgs& a, const TileRay& at, int& first) {
    resolution = a.occupancy_resolution;
    first = next = last = 0;
    if (at.ray < 0) return;
    ray = make_ray(a, at);
    int64_t from, to;
    step_range(ray, from, to);
    first = next = static_cast<int>(from);
    last = static_cast<int>(to);
    if (a.kept) {  // far from the box, f32 sees more steps inside than its diagonal has
      const int64_t most = from + 32 * (a.n_words - 1);
      last = static_cast<int>(to < most ? to : most);
    }
    for (int c = 0; c < 3; ++c) {
      steps_per_cell[c] = ray.side / (ray.resolution * ray.direction[c] * ray.step);
    }
  }

  // Steps that surely stay in this empty cell.
  __device__ __forceinline__ int empty_steps(float k) const {
    const float middle = 0.5f * (begin_of(ray, k) + begin_of(ray, k + 1.0f));
    float least = 1e6f;
    for (int c = 0; c < 3; ++c) {
      if (ray.direction[c] == 0.0f) continue;
      const float position =
          (ray.origin[c] + ray.direction[c] * middle + ray.radius) / ray.side * ray.resolution;
      const float inside = position - floorf(position);
      const float steps = (ray.direction[c] > 0.0f ? 1.0f - inside : -inside) * steps_per_cell[c];
      if (steps < least) least = steps;  // not for NaN: along a face
    }
    return least > 0.02f ? static_cast<int>(least - 0.02f) : 0;  // slack for rounding
  }

  // The next occupied step, or -1.
  __device__ __forceinline__ int advance(const uint32_t* bits) {
    while (next < last) {
      const float k = static_cast<float>(next);
      uint32_t cell[3];
      const bool is_inside = cells_of(ray, k, cell);
      ++next;
      if (!is_inside) continue;
      const uint32_t at = (cell[0] * resolution + cell[1]) * resolution + cell[2];
      if (__ldg(bits + (at >> 5)) >> (at & 31) & 1) return next - 1;
      next += empty_steps(k);
    }
    return -1;
  }
};

// A ray's sums over its kept samples.
struct RaySums {
  float optical_tried, optical_kept;
  float rgb[3], normal[3];
  float opacity, depth, mean, spread, orient;

  __device__ __forceinline__ void add(float weight, float middle, const float c[3],
                                      const float n[3], const float d[3]) {
    opacity += weight;
    depth += weight * middle;
    const float off = middle - mean;
    if (opacity > 0.0f) mean += off * (weight / opacity);
    spread += weight * off * (middle - mean);
    const float facing = n[0] * d[0] + n[1] * d[1] + n[2] * d[2];
    const float away = facing < 0.0f ? 0.0f : facing;
    orient += weight * (away * away);
    for (int k = 0; k < 3; ++k) {
      rgb[k] += weight * c[k];
      normal[k] += weight * n[k];
    }
  }

  __device__ __forceinline__ void store(const RenderViewsArgs& a, int64_t ray) const {
    for (int k = 0; k < 3; ++k) {
      a.rgb_sum[3 * ray + k] = rgb[k];
      a.normal_sum[3 * ray + k] = normal[k];
    }
    a.opacity[ray] = opacity;
    a.depth[ray] = depth;
    a.orient[ray] = orient;
    a.z_variance[ray] = opacity > static_cast<float>(kMinOpacity) ? spread / opacity : 0.0f;
  }
};

// A lane's bits of `kept`; a word is written when the walk has left it.
struct KeptBits {
  uint32_t* words;  // this lane's word 0; null: nothing to write
  int first, word;
  uint32_t bits;

  __device__ __forceinline__ void begin(const RenderViewsArgs& a, const TileRay& at, int lane,
                                        int first_step) {
    words = a.kept ? a.kept + (static_cast<int64_t>(at.tile) * a.n_words) * kWarp + lane : nullptr;
    first = first_step;
    word = 0;
    bits = 0;
    if (words) words[0] = static_cast<uint32_t>(first_step);
  }

  __device__ __forceinline__ void mark(int step) {
    const int at = step - first;
    if (at / 32 != word) {
      flush();
      word = at / 32;
    }
    bits |= 1u << (at & 31);
  }

  __device__ __forceinline__ void flush() {
    if (words && bits) words[static_cast<int64_t>(1 + word) * kWarp] = bits;
    bits = 0;
  }
};

// The samples that the warp found, evaluated, judged and added up. Returns whether this lane's was
// kept; clears `is_on` where nothing behind can be seen.
__device__ __forceinline__ bool take_samples(const RenderViewsArgs& a, const FusedSpec& spec,
                                             const Weights& weights, WarpMemory& memory, int lane,
                                             const TileRay& at, const RayWalk<float>& ray, int step,
                                             float threshold, bool& is_on, RaySums& sums) {
  const bool has = step >= 0;
  const float begin = begin_of(ray, static_cast<float>(step));
  const float end = begin_of(ray, static_cast<float>(step) + 1.0f);
  const float middle = 0.5f * (begin + end);
  float x[3], u[3];
  if (has) place_sample(spec, ray, middle, x, u);
  __syncwarp();  // the last samples' slopes are read
  encode<kEncodeUnroll>(spec, a.table, has, u, lane, memory.features, memory.jacobian);
  uint32_t mask[2];
  evaluate_mlps(weights, lane, memory.features, memory.slope, memory.outputs, mask);
  if (!has) return false;
  SampleState s;
  read_sample(spec, x, lane, memory.slope, memory.jacobian, memory.outputs, s);
  const float optical = s.density * (end - begin);
  const float alpha = -expm1_of(-optical);
  const bool is_seen = exp_of(-sums.optical_tried) >= static_cast<float>(a.early_stop_eps);
  sums.optical_tried += optical;
  is_on = is_seen;
  if (!is_seen || !(alpha >= threshold)) return false;
  float light[3], rgb[3];
  for (int c = 0; c < 3; ++c) light[c] = a.light_positions[3 * at.view + c];
  shade_forward(a.shading, s.albedo, s.normal, x, light, rgb);
  sums.add(exp_of(-sums.optical_kept) * alpha, middle, rgb, s.normal, ray.direction);
  sums.optical_kept += optical;
  return true;
}

__global__ void __launch_bounds__(kThreads, kBlocks)
    render_views_fwd_kernel(const RenderViewsArgs a, const FusedSpec spec) {
  SDI_DYNAMIC_SHARED(unsigned char, bytes);
  BlockMemory& block = *reinterpret_cast<BlockMemory*>(bytes);
  load_weights(a, spec, block.weights);
  const int lane = threadIdx.x % kWarp;
  WarpMemory& memory = block.warps[threadIdx.x / kWarp];
  const uint32_t n_tiles = static_cast<uint32_t>(n_tiles_of(a));
  float threshold = static_cast<float>(a.alpha_threshold);
  if (a.occupancy_mean) threshold = fminf(threshold, *a.occupancy_mean);
  uint32_t n_tried = 0, n_kept = 0;
  for (uint32_t tile; (tile = fetch_tile(a.next_tile, lane)) < n_tiles;) {
    const TileRay at = ray_of(a, static_cast<int>(tile), lane);
    Walker walker;
    int first;
    walker.begin(a, at, first);
    KeptBits kept;
    kept.begin(a, at, lane, first);
    RaySums sums{};
    bool is_on = at.ray >= 0;
    while (true) {
      const int step = is_on ? walker.advance(a.occupancy_bits) : -1;
      is_on = step >= 0;
      if (!__any_sync(kAllLanes, is_on)) break;
      n_tried += step >= 0;
      if (take_samples(a, spec, block.weights, memory, lane, at, walker.ray, step, threshold, is_on,
                       sums)) {
        kept.mark(step);
        ++n_kept;
      }
    }
    kept.flush();
    if (at.ray >= 0) sums.store(a, at.ray);
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    n_tried += __shfl_xor_sync(kAllLanes, n_tried, offset);
    n_kept += __shfl_xor_sync(kAllLanes, n_kept, offset);
  }
  if (lane == 0) {
    using Count = unsigned long long;
    atomicAdd(reinterpret_cast<Count*>(a.counts), static_cast<Count>(n_kept));
    atomicAdd(reinterpret_cast<Count*>(a.counts + 1), static_cast<Count>(n_tried));
  }
}

}  // namespace

int launch_render_views_fwd(const RenderViewsArgs& a, void* stream) {
  if (!is_fusable(a)) return kBadArgument;
  const FusedSpec spec = fused_spec(a.spec);
  const int64_t n_tiles = n_tiles_of(a);
  if (a.kept) {
    const int status = clear(a.kept, n_tiles * a.n_words * kWarp * sizeof(uint32_t), stream);
    if (status != kOk) return status;
  }
  const int status =
      launch(pack_occupancy_kernel, blocks_for((n_cells_of(a) + 31) / 32, kPackThreads),
             kPackThreads, 0, stream, a);
  if (status != kOk || n_tiles == 0) return status;
  if (!allow_shared(render_views_fwd_kernel, sizeof(BlockMemory))) return kCudaError;
  const unsigned blocks = persistent_blocks(kBlocks, (n_tiles + kWarps - 1) / kWarps);
  return launch(render_views_fwd_kernel, blocks, kThreads, sizeof(BlockMemory), stream, a, spec);
}

}  // namespace cuda
}  // namespace sdi
