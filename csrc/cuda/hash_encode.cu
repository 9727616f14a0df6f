// Hash encoding on the GPU, forward and backward (methods.md D, Geometry).
// Twin: sdi_fast/reference/hash_encode.py. Maths: math/grid.h, as on the CPU.
//
// Features are trilinear in the eight corners' entries, level by level. One thread takes a sample
// at one level; neighbouring threads are neighbouring samples of that level, so that a level's
// entries meet in the cache. Backward: the same mapping adds corner weight * gradient to the table,
// with atomics (sums in any order); grad_x has one thread a sample, which walks the levels in
// order. Both recompute the corners. Masked levels: zero features, no gradient. Precision: T
// throughout. Bytes per sample and level in f32: 32 F gathered, 4 F written; backward 32 F added
// to, and for grad_x 32 F gathered.
#include "dispatch.h"
#include "items.h"

#include "../math/grid.h"

namespace sdi {
namespace cuda {
namespace {

using namespace SDI_ISA;

constexpr int kThreads = 256;

template <class T>
__global__ void hash_encode_fwd_kernel(const HashEncodeFwdArgs<T> a) {
  const int n_features = a.grid.n_features, width = a.grid.n_levels * n_features;
  for (int64_t k = first_item(); k < a.n * a.grid.n_levels; k += item_stride()) {
    const int level = static_cast<int>(k / a.n);
    const int64_t i = k - level * a.n;
    T* out = a.features + i * width + level * n_features;
    if (level < a.active_levels) {
      encode_level<false>(level_of(a.grid, level, a.table), n_features, a.x + 3 * i, out,
                          static_cast<T*>(nullptr));
    } else {
      for (int f = 0; f < n_features; ++f) out[f] = T(0);
    }
  }
}

template <class T>
__global__ void table_gradient_kernel(const HashEncodeBwdArgs<T> a) {
  const int n_features = a.grid.n_features, width = a.grid.n_levels * n_features;
  for (int64_t k = first_item(); k < a.n * a.active_levels; k += item_stride()) {
    const int level = static_cast<int>(k / a.n);
    const int64_t i = k - level * a.n;
    const T* grad = a.grad_features + i * width + level * n_features;
    const Cell<T> cell = locate(level_of(a.grid, level, a.table), a.x + 3 * i);
    T weights[8];
    corner_weights(cell, weights);
    T* entries = a.grad_table + a.grid.offset[level] * n_features;
    for (int c = 0; c < 8; ++c) {
      T* entry = entries + static_cast<int64_t>(cell.index[c]) * n_features;
      for (int f = 0; f < n_features; ++f) atomicAdd(entry + f, grad[f] * weights[c]);
    }
  }
}

template <class T>
__global__ void position_gradient_kernel(const HashEncodeBwdArgs<T> a) {
  const int n_features = a.grid.n_features, width = a.grid.n_levels * n_features;
  for (int64_t i = first_item(); i < a.n; i += item_stride()) {
    T sum[3] = {};
    for (int l = 0; l < a.active_levels; ++l) {
      const Level<T> level = level_of(a.grid, l, a.table);
      const Cell<T> cell = locate(level, a.x + 3 * i);
      for (int f = 0; f < n_features; ++f) {
        T v[8], slope[3];
        for (int c = 0; c < 8; ++c) v[c] = gather(level.entries, cell.index[c], n_features, f);
        interpolate_with_slope(cell, v, slope);
        const T g = a.grad_features[i * width + l * n_features + f];
        for (int c = 0; c < 3; ++c) sum[c] += g * (slope[c] * level.scale);
      }
    }
    for (int c = 0; c < 3; ++c) a.grad_x[3 * i + c] = sum[c];
  }
}

}  // namespace

template <class T>
int launch_hash_encode_fwd(const HashEncodeFwdArgs<T>& args, void* stream) {
  return launch_items(hash_encode_fwd_kernel<T>, args.n * args.grid.n_levels, kThreads, kThreads,
                      stream, args);
}

template <class T>
int launch_hash_encode_bwd(const HashEncodeBwdArgs<T>& args, void* stream) {
  if (args.grad_x) {
    const int status =
        launch_items(position_gradient_kernel<T>, args.n, kThreads, kThreads, stream, args);
    if (status != kOk) return status;
  }
  if (!args.grad_table) return kOk;
  return launch_items(table_gradient_kernel<T>, args.n * args.active_levels, kThreads, kThreads,
                      stream, args);
}

SDI_INSTANTIATE_CUDA(hash_encode_fwd, HashEncodeFwdArgs)
SDI_INSTANTIATE_CUDA(hash_encode_bwd, HashEncodeBwdArgs)

}  // namespace cuda
}  // namespace sdi
