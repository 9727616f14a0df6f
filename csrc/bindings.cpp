// The Python module sdi_fast._C: the only file that knows Python. Torch-free: arrays come as
// addresses (integers), streams too. Every op returns a Status; the callers in sdi_fast/ops check
// shapes, types and contiguity beforehand.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <dlfcn.h>
#endif

#define SDI_ISA baseline
#include "cpu/dispatch.h"
#ifdef SDI_FAST_WITH_CUDA
#include "cuda/dispatch.h"
#include "render.h"
#endif

namespace py = pybind11;

namespace {

// An address from Python, usable wherever a pointer is expected.
struct Address {
  uintptr_t value;
  template <class T>
  operator T*() const {
    return reinterpret_cast<T*>(value);
  }
};

}  // namespace

namespace pybind11::detail {
template <>
struct type_caster<Address> {
  PYBIND11_TYPE_CASTER(Address, const_name("int"));
  bool load(handle source, bool) {
    if (!PyLong_Check(source.ptr())) return false;
    value.value = reinterpret_cast<uintptr_t>(PyLong_AsVoidPtr(source.ptr()));
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};
}  // namespace pybind11::detail

namespace {

using namespace sdi;

// Where and in what precision an op runs; sdi_fast/ops/_native.py builds it.
constexpr int kDouble = 1, kOnGpu = 2;  // bits of `mode`

#ifdef SDI_FAST_WITH_CUDA
#define SDI_ON_GPU(name) return cuda::launch_##name<T>(args, queue)
#else
#define SDI_ON_GPU(name) return static_cast<int>(kCudaError)  // never asked for
#endif

// Runs call(T()) with T = double or float, without the interpreter's lock.
template <class Call>
int with_type(int mode, Call&& call) {
  const py::gil_scoped_release unlocked;
  return mode & kDouble ? call(double()) : call(float());
}

#ifdef SDI_EMULATE  // tests/emulator: the CUDA kernels run on CPU tensors
#define SDI_ON_CPU(name) return cuda::launch_##name<T>(args, nullptr)
#else
#define SDI_ON_CPU(name) return cpu_kernels<T>().name(args, static_cast<int>(queue.value))
#endif

// `queue` is the number of threads, or the stream.
#define SDI_RUN(name, Args, ...)         \
  with_type(mode, [&](auto zero) {       \
    using T = decltype(zero);            \
    const Args<T> args{__VA_ARGS__};     \
    if (mode & kOnGpu) SDI_ON_GPU(name); \
    SDI_ON_CPU(name);                    \
  })

GridSpec make_grid(int n_features, const std::vector<double>& scales,
                   const std::vector<int64_t>& resolutions, const std::vector<int64_t>& offsets,
                   const std::vector<bool>& is_dense) {
  const size_t n = scales.size();
  if (n > kMaxLevels || resolutions.size() != n || is_dense.size() != n ||
      offsets.size() != n + 1 || n_features < 1 ||
      n * static_cast<size_t>(n_features) > kMaxInputs) {
    throw py::value_error("grid: at most 32 levels and 128 features, and lists that fit");
  }
  GridSpec grid{};
  grid.n_levels = static_cast<int32_t>(n);
  grid.n_features = n_features;
  for (size_t i = 0; i < n; ++i) {
    grid.scale[i] = scales[i];
    grid.resolution[i] = resolutions[i];
    grid.is_dense[i] = is_dense[i];
  }
  for (size_t i = 0; i <= n; ++i) grid.offset[i] = offsets[i];
  return grid;
}

FieldSpec make_field(const GridSpec& grid, double radius, double blob_scale, double blob_std,
                     int hidden, int active_levels) {
  if (hidden < 1 || hidden > kMaxHidden || active_levels < 0 || active_levels > grid.n_levels) {
    throw py::value_error("field: hidden in 1 to 256, active_levels in 0 to n_levels");
  }
  return FieldSpec{grid, radius, blob_scale, blob_std, hidden, active_levels};
}

std::string openmp_runtime() {
#if defined(_OPENMP) && defined(__linux__)
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&omp_get_max_threads), &info) && info.dli_fname) {
    return info.dli_fname;
  }
#endif
  return "";
}

py::dict build_info() {
  py::dict info;
  info["version"] = SDI_FAST_VERSION;
  info["compiler"] = SDI_FAST_COMPILER;
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  info["openmp_runtime"] = openmp_runtime();
  info["cpu_isa"] = cpu_isa();
#ifdef SDI_EMULATE
  info["is_emulated"] = true;
#endif
#ifdef SDI_FAST_WITH_CUDA
  info["cuda_archs"] = SDI_FAST_CUDA_ARCHS;
  info["nvcc"] = SDI_FAST_NVCC;
#else
  info["cuda_archs"] = "";
  info["nvcc"] = "";
#endif
  return info;
}

void bind_field(py::module_& m) {
  m.def("hash_encode_fwd", [](int mode, const GridSpec& grid, int active_levels, int64_t n,
                              Address x, Address table, Address features, Address queue) {
    return SDI_RUN(hash_encode_fwd, HashEncodeFwdArgs, x, table, features, n, active_levels, grid);
  });
  m.def("hash_encode_bwd",
        [](int mode, const GridSpec& grid, int active_levels, int64_t n, Address x, Address table,
           Address grad_features, Address grad_table, Address grad_x, Address queue) {
          return SDI_RUN(hash_encode_bwd, HashEncodeBwdArgs, x, table, grad_features, grad_table,
                         grad_x, n, active_levels, grid);
        });
  m.def("density",
        [](int mode, const FieldSpec& spec, int64_t n, Address x, Address table, Address density_w1,
           Address density_w2, Address color_w1, Address color_w2, Address density, Address queue) {
          return SDI_RUN(density, DensityArgs, x,
                         {table, density_w1, density_w2, color_w1, color_w2}, density, n, spec);
        });
  m.def("field_fwd", [](int mode, const FieldSpec& spec, int64_t n, Address x, Address table,
                        Address density_w1, Address density_w2, Address color_w1, Address color_w2,
                        Address density, Address albedo, Address normal, Address queue) {
    return SDI_RUN(field_fwd, FieldFwdArgs, x, {table, density_w1, density_w2, color_w1, color_w2},
                   density, albedo, normal, n, spec);
  });
  m.def("field_bwd", [](int mode, const FieldSpec& spec, int64_t n, Address x, Address table,
                        Address density_w1, Address density_w2, Address color_w1, Address color_w2,
                        Address grad_density, Address grad_albedo, Address grad_normal,
                        Address grad_table, Address grad_density_w1, Address grad_density_w2,
                        Address grad_color_w1, Address grad_color_w2, Address workspace,
                        Address queue) {
    return SDI_RUN(field_bwd, FieldBwdArgs, x, {table, density_w1, density_w2, color_w1, color_w2},
                   grad_density, grad_albedo, grad_normal, grad_table, grad_density_w1,
                   grad_density_w2, grad_color_w1, grad_color_w2, workspace, n, spec);
  });
}

void bind_samples(py::module_& m) {
  const auto bind_march = [&m](const char* name, bool is_fill) {
    m.def(name, [is_fill](int mode, int64_t n_rays, Address origins, Address directions,
                          Address jitter, Address occupancy, int resolution, double radius,
                          double step_size, double near, Address counts, Address first_sample,
                          Address ray_indices, Address t_starts, Address t_ends, Address queue) {
      if (is_fill)
        return SDI_RUN(march_fill, MarchArgs, origins, directions, jitter, occupancy, counts,
                       first_sample, ray_indices, t_starts, t_ends, n_rays, resolution, radius,
                       step_size, near);
      return SDI_RUN(march_count, MarchArgs, origins, directions, jitter, occupancy, counts,
                     first_sample, ray_indices, t_starts, t_ends, n_rays, resolution, radius,
                     step_size, near);
    });
  };
  bind_march("march_count", false);
  bind_march("march_fill", true);
  const auto bind_prune = [&m](const char* name, bool is_fill) {
    m.def(name, [is_fill](int mode, int64_t n, int64_t n_rays, Address density, Address t_starts,
                          Address t_ends, Address packed_info, Address keep, Address counts,
                          Address first_sample, Address ray_indices_out, Address t_starts_out,
                          Address t_ends_out, double early_stop_eps, double alpha_threshold,
                          Address queue) {
      if (is_fill)
        return SDI_RUN(prune_fill, PruneArgs, density, t_starts, t_ends, packed_info, keep, counts,
                       first_sample, ray_indices_out, t_starts_out, t_ends_out, n, n_rays,
                       early_stop_eps, alpha_threshold);
      return SDI_RUN(prune_count, PruneArgs, density, t_starts, t_ends, packed_info, keep, counts,
                     first_sample, ray_indices_out, t_starts_out, t_ends_out, n, n_rays,
                     early_stop_eps, alpha_threshold);
    });
  };
  bind_prune("prune_count", false);
  bind_prune("prune_fill", true);
  m.def("occupancy_update",
        [](int mode, int64_t n_cells, int64_t m, Address occs, Address cells, Address values,
           Address occupied, Address largest, Address partial_sums, double decay, double threshold,
           Address queue) {
          return SDI_RUN(occupancy_update, OccupancyArgs, occs, cells, values, occupied, largest,
                         partial_sums, n_cells, m, decay, threshold);
        });
}

void bind_image(py::module_& m) {
  m.def("shade_fwd",
        [](int mode, int shading, int64_t n, int64_t n_views, Address albedo, Address normal,
           Address x, Address lights, Address views, Address rgb, Address queue) {
          return SDI_RUN(shade_fwd, ShadeArgs, albedo, normal, x, lights, views, rgb, nullptr,
                         nullptr, nullptr, n, n_views, shading);
        });
  m.def("shade_bwd", [](int mode, int shading, int64_t n, int64_t n_views, Address albedo,
                        Address normal, Address x, Address lights, Address views, Address grad_rgb,
                        Address grad_albedo, Address grad_normal, Address queue) {
    return SDI_RUN(shade_bwd, ShadeArgs, albedo, normal, x, lights, views, nullptr, grad_rgb,
                   grad_albedo, grad_normal, n, n_views, shading);
  });
  m.def("composite_fwd",
        [](int mode, int64_t n, int64_t n_rays, Address density, Address rgb, Address normal,
           Address t_starts, Address t_ends, Address packed_info, Address directions,
           Address rgb_sum, Address opacity, Address depth, Address normal_sum, Address z_variance,
           Address orient, Address weights, Address queue) {
          return SDI_RUN(composite_fwd, CompositeFwdArgs, density, rgb, normal, t_starts, t_ends,
                         packed_info, directions, rgb_sum, opacity, depth, normal_sum, z_variance,
                         orient, weights, n, n_rays);
        });
  m.def("composite_bwd",
        [](int mode, int64_t n, int64_t n_rays, Address density, Address rgb, Address normal,
           Address t_starts, Address t_ends, Address packed_info, Address directions,
           Address weights, Address opacity, Address depth, Address z_variance,
           Address grad_rgb_sum, Address grad_opacity, Address grad_depth, Address grad_normal_sum,
           Address grad_z_variance, Address grad_orient, Address grad_density, Address grad_rgb,
           Address grad_normal, Address queue) {
          return SDI_RUN(composite_bwd, CompositeBwdArgs, density, rgb, normal, t_starts, t_ends,
                         packed_info, directions, weights, opacity, depth, z_variance, grad_rgb_sum,
                         grad_opacity, grad_depth, grad_normal_sum, grad_z_variance, grad_orient,
                         grad_density, grad_rgb, grad_normal, n, n_rays);
        });
  m.def("background_fwd", [](int mode, int64_t n, Address directions, Address w1, Address w2,
                             Address w3, Address rgb, Address queue) {
    return SDI_RUN(background_fwd, BackgroundArgs, directions, w1, w2, w3, rgb, nullptr, nullptr,
                   nullptr, n);
  });
  m.def("background_bwd",
        [](int mode, int64_t n, Address directions, Address w1, Address w2, Address w3,
           Address grad_rgb, Address grad_weights, Address workspace, Address queue) {
          return SDI_RUN(background_bwd, BackgroundArgs, directions, w1, w2, w3, nullptr, grad_rgb,
                         grad_weights, workspace, n);
        });
}

void bind_losses(py::module_& m) {
  m.def("convexity_fwd",
        [](int mode, int64_t batch, int64_t height, int64_t width, Address normals, Address opacity,
           Address c2w, Address loss, Address workspace, Address queue) {
          return SDI_RUN(convexity_fwd, ConvexityArgs, normals, opacity, c2w, loss, nullptr,
                         nullptr, nullptr, workspace, batch, height, width);
        });
  m.def("convexity_bwd", [](int mode, int64_t batch, int64_t height, int64_t width, Address normals,
                            Address opacity, Address c2w, Address grad_loss, Address grad_normals,
                            Address grad_opacity, Address queue) {
    return SDI_RUN(convexity_bwd, ConvexityArgs, normals, opacity, c2w, nullptr, grad_loss,
                   grad_normals, grad_opacity, nullptr, batch, height, width);
  });
  m.def("ray_losses_fwd",
        [](int mode, int64_t n, Address opacity, Address orient, Address z_variance, Address losses,
           Address counts, Address workspace, Address queue) {
          return SDI_RUN(ray_losses_fwd, RayLossesArgs, opacity, orient, z_variance, losses, counts,
                         nullptr, nullptr, nullptr, nullptr, workspace, n);
        });
  m.def("ray_losses_bwd",
        [](int mode, int64_t n, Address opacity, Address counts, Address grad_losses,
           Address grad_opacity, Address grad_orient, Address grad_z_variance, Address queue) {
          return SDI_RUN(ray_losses_bwd, RayLossesArgs, opacity, nullptr, nullptr, nullptr, counts,
                         grad_losses, grad_opacity, grad_orient, grad_z_variance, nullptr, n);
        });
}

void bind_guided_step(py::module_& m) {
  m.attr("CHANNELS_LAST") = static_cast<int>(kChannelsLast);
  m.attr("PAPER_CONVENTION") = static_cast<int>(kPaperConvention);
  m.attr("V_PREDICTION") = static_cast<int>(kVPrediction);
  m.attr("HALF_OUTPUTS") = static_cast<int>(kHalfOutputs);
  m.attr("BF16_OUTPUTS") = static_cast<int>(kBf16Outputs);
#ifdef SDI_EMULATE
  m.attr("CPU_TAKES_HALVES") = true;
#else
  m.attr("CPU_TAKES_HALVES") = false;
#endif
  m.def("guided_step",
        [](int mode, int n_conditions, int64_t batch, int64_t channels, int64_t pixels,
           int64_t n_levels, Address outputs, Address x, Address levels, Address t, Address t_next,
           Address neg_weights, Address lengths, Address noise, Address rng, Address result,
           Address eps, int64_t step, int64_t draw, double scale, double eta, int flags,
           Address queue) {
          return SDI_RUN(guided_step, GuidedStepArgs, outputs, x, levels, t, t_next, neg_weights,
                         lengths, noise, rng, result, eps, batch, channels, pixels, n_levels, step,
                         draw, scale, eta, n_conditions, flags);
        });
}

#ifdef SDI_FAST_WITH_CUDA
// Lists, since a call with 30 addresses cannot be read: their order is that of the members.
RenderViewsArgs make_render_views(const FieldSpec& spec, const std::vector<int64_t>& sizes,
                                  const std::vector<double>& lengths,
                                  const std::vector<Address>& at, Address next_tile) {
  if (sizes.size() != 6 || lengths.size() != 4 || at.size() != 20) {
    throw py::value_error("render_views: expected 6 sizes, 4 lengths and 20 addresses");
  }
  return RenderViewsArgs{at[0],
                         at[1],
                         at[2],
                         at[3],
                         at[4],
                         at[5],
                         at[6],
                         at[7],
                         at[8],
                         at[9],
                         at[10],
                         at[11],
                         at[12],
                         at[13],
                         at[14],
                         at[15],
                         at[16],
                         at[17],
                         at[18],
                         at[19],
                         next_tile,
                         sizes[0],
                         sizes[1],
                         sizes[2],
                         sizes[3],
                         static_cast<int32_t>(sizes[4]),
                         static_cast<int32_t>(sizes[5]),
                         lengths[0],
                         lengths[1],
                         lengths[2],
                         lengths[3],
                         spec};
}

RenderViewsGrads make_render_views_grads(const std::vector<Address>& at) {
  if (at.size() != 11) throw py::value_error("render_views_bwd: expected 11 addresses");
  return {at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10]};
}

// `mode` is there for _native.call: these are for the GPU and f32 alone.
void bind_render(py::module_& m) {
  m.def("render_views_words", &render_views_words);
  m.def("render_views_fwd", [](int, const FieldSpec& spec, const std::vector<int64_t>& sizes,
                               const std::vector<double>& lengths,
                               const std::vector<Address>& addresses, Address next_tile,
                               Address stream) {
    const RenderViewsArgs args = make_render_views(spec, sizes, lengths, addresses, next_tile);
    const py::gil_scoped_release unlocked;
    return cuda::launch_render_views_fwd(args, stream);
  });
  m.def("render_views_bwd", [](int, const FieldSpec& spec, const std::vector<int64_t>& sizes,
                               const std::vector<double>& lengths,
                               const std::vector<Address>& addresses, Address next_tile,
                               const std::vector<Address>& at, Address stream) {
    const RenderViewsArgs args = make_render_views(spec, sizes, lengths, addresses, next_tile);
    const RenderViewsGrads grads = make_render_views_grads(at);
    const py::gil_scoped_release unlocked;
    return cuda::launch_render_views_bwd(args, grads, stream);
  });
  m.attr("RENDER_VIEWS_WEIGHTS") = kFusedWeights;
  m.def("render_views_bwd_warps", &cuda::render_views_bwd_warps);
  m.def("render_views_bwd_deterministic",
        [](int, const FieldSpec& spec, const std::vector<int64_t>& sizes,
           const std::vector<double>& lengths, const std::vector<Address>& addresses,
           Address next_tile, const std::vector<Address>& at, Address table, Address weights,
           Address counts, Address scale, Address stream) {
          const RenderViewsArgs args =
              make_render_views(spec, sizes, lengths, addresses, next_tile);
          const RenderViewsGrads grads = make_render_views_grads(at);
          const RenderViewsSums sums{table, weights, counts, scale};
          const py::gil_scoped_release unlocked;
          return cuda::launch_render_views_bwd_deterministic(args, grads, sums, stream);
        });
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Torch-free kernels of sdi_fast; use them through sdi_fast.ops.";
  m.def("build_info", &build_info);
  py::class_<GridSpec>(m, "GridSpec").def(py::init(&make_grid));
  py::class_<FieldSpec>(m, "FieldSpec").def(py::init(&make_field));
  m.attr("BACKGROUND_WEIGHTS") = kBackgroundWeights;
  m.attr("BACKGROUND_MAX_BLOCKS") = kBackgroundMaxBlocks;
  m.attr("OCCUPANCY_MAX_BLOCKS") = kOccupancyMaxBlocks;
  m.attr("RAY_LOSSES_MAX_BLOCKS") = kRayLossesMaxBlocks;
  m.attr("RAY_SUMS") = kRaySums;
  m.attr("FIELD_MAX_BLOCKS") = kFieldMaxBlocks;
  bind_field(m);
  bind_samples(m);
  bind_image(m);
  bind_losses(m);
  bind_guided_step(m);
#ifdef SDI_FAST_WITH_CUDA
  bind_render(m);
#endif
  m.def("adam_step",
        [](int mode, int64_t n, Address param, Address grad, Address exp_avg, Address exp_avg_sq,
           Address shadow, Address step_at, Address lr_at, Address skip, int64_t step, double lr,
           double beta1, double beta2, double eps, Address queue) {
          return SDI_RUN(adam_step, AdamArgs, param, grad, exp_avg, exp_avg_sq, shadow, step_at,
                         lr_at, skip, n, step, lr, beta1, beta2, eps);
        });
}
