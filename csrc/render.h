// Launch API of the fused renderer: from cameras to per-ray sums, and back to the field's
// gradients. Twin: sdi_fast/reference/render_views.py.
//
// Rays are view-major, then row-major: ray = (view * height + row) * width + column.
#pragma once

#include <cstdint>

#include "field.h"
#include "status.h"

namespace sdi {

constexpr int kFusedLevels = 16;   // at most
constexpr int kFusedFeatures = 2;  // numbers an entry
constexpr int kFusedHidden = 64;
constexpr int kTileWidth = 8, kTileHeight = 4;  // pixels of a warp

struct RenderViewsArgs {
  const float* c2w;              // [n_views, 3, 4], columns right, up, -look, position
  const float* fovy;             // [n_views], rad
  const float* light_positions;  // [n_views, 3], scene units
  const float* jitter;           // [n_rays], scene units; may be null
  const uint8_t* occupancy;      // [G^3], index (x, y, z); forward only
  const float* occupancy_mean;   // [1], density * dt; may be null; forward only
  const uint16_t* table;         // [n_params] f16
  const float* density_w1;       // [64, 2 L]
  const float* density_w2;       // [1, 64]
  const float* color_w1;         // [64, 2 L]
  const float* color_w2;         // [3, 64]
  float* rgb_sum;                // [n_rays, 3], sum w c
  float* opacity;                // [n_rays], sum w
  float* depth;                  // [n_rays], scene units, sum w t
  float* normal_sum;             // [n_rays, 3], sum w n
  float* z_variance;             // [n_rays], scene units^2
  float* orient;                 // [n_rays]
  int64_t* counts;               // [2]: samples kept, samples tried; forward only
  uint32_t* kept;            // [n_tiles, n_words, 32]: word 0 the ray's first step, then a bit a
                             // step; the forward writes it, the backward reads it; may be null
  uint32_t* occupancy_bits;  // [ceil(G^3 / 32)], workspace of the forward
  uint32_t* next_tile;       // [1], workspace
  int64_t n_views;
  int64_t height;
  int64_t width;
  int64_t n_words;
  int32_t occupancy_resolution;
  int32_t shading;         // Shading
  double step_size;        // scene units
  double near;             // scene units
  double early_stop_eps;   // transmittance
  double alpha_threshold;  // the mean occupancy where that is lower
  FieldSpec spec;
};

struct RenderViewsGrads {
  const float* grad_rgb_sum;     // [n_rays, 3]
  const float* grad_opacity;     // [n_rays]
  const float* grad_depth;       // [n_rays]
  const float* grad_normal_sum;  // [n_rays, 3]
  const float* grad_z_variance;  // [n_rays]
  const float* grad_orient;      // [n_rays]
  float* grad_table;             // [n_params]; these five are zeroed by the caller
  float* grad_density_w1;        // [64, 2 L]
  float* grad_density_w2;        // [1, 64]
  float* grad_color_w1;          // [64, 2 L]
  float* grad_color_w2;          // [3, 64]
};

constexpr int kFusedWeights =  // both MLPs', with all levels
    2 * kFusedHidden * kFusedLevels * kFusedFeatures + 4 * kFusedHidden;

// Workspace of the deterministic backward.
struct RenderViewsSums {
  uint64_t* table;   // [n_params], fixed point
  float* weights;    // [render_views_bwd_warps(), kFusedWeights]
  uint64_t* counts;  // [256], samples by the exponent of what they add to the table at most
  float* scale;      // [2], of fixed point: units a number, and the inverse
};

// Words a ray of `kept`: enough for every step through the box's diagonal.
int64_t render_views_words(double radius, double step_size);

namespace cuda {

int launch_render_views_fwd(const RenderViewsArgs& args, void* stream);
int launch_render_views_bwd(const RenderViewsArgs& args, const RenderViewsGrads& grads,
                            void* stream);

// The same gradients; two calls on GPUs of one kind give the same bits (cuda/render_bwd_fixed.h).
int launch_render_views_bwd_deterministic(const RenderViewsArgs& args,
                                          const RenderViewsGrads& grads,
                                          const RenderViewsSums& sums, void* stream);

// Rows of RenderViewsSums.weights that it may write on the current device.
int64_t render_views_bwd_warps();

}  // namespace cuda
}  // namespace sdi
