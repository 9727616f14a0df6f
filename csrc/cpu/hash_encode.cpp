// Hash encoding on the CPU, forward and backward (methods.md D, Geometry).
// Twin: sdi_fast/reference/hash_encode.py.
//
// Forward: one lane a sample, packs shared out between the threads; masked levels are skipped and
// their features zeroed. Backward: feature gradients are transposed a block at a time, then every
// level's slice of the table is scattered by the thread that owns the level (cpu/table_grad.h);
// grad_x recomputes the corners. Precision: T throughout.
// Numbers per sample and level: 8 F gathered, 8 F read and written by the scatter.
#include "../hash_encode.h"

#include "../math/grid.h"
#include "dispatch.h"
#include "pack.h"
#include "parallel.h"
#include "table_grad.h"

namespace sdi {
namespace SDI_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // samples a scatter block: its gradients stay in the cache

template <class T>
void encode_pack(const HashEncodeFwdArgs<T>& a, int64_t i) {
  using R = Pack<T>;
  const int n_features = a.grid.n_features, width = a.grid.n_levels * n_features;
  R u[3], e[kMaxInputs];
  load_points<R>(a.x, i, a.n, u);
  for (int l = 0; l < a.active_levels; ++l) {
    encode_level<false>(level_of(a.grid, l, a.table), n_features, u, e + l * n_features,
                        static_cast<R*>(nullptr));
  }
  for (int k = a.active_levels * n_features; k < width; ++k) e[k] = R{};
  for (int k = 0; k < width; ++k) store_strided<R>(a.features, i, a.n, width, k, e[k]);
}

template <class T>
void position_gradient(const HashEncodeBwdArgs<T>& a, int64_t i) {
  using R = Pack<T>;
  const int n_features = a.grid.n_features, width = a.grid.n_levels * n_features;
  R u[3], e[kMaxInputs], jacobian[3 * kMaxInputs], sum[3] = {};
  load_points<R>(a.x, i, a.n, u);
  for (int l = 0; l < a.active_levels; ++l) {
    const int first = l * n_features;
    encode_level<true>(level_of(a.grid, l, a.table), n_features, u, e, jacobian);
    for (int f = 0; f < n_features; ++f) {
      R g;
      load_strided<R>(a.grad_features, i, a.n, width, first + f, g);
      for (int c = 0; c < 3; ++c) sum[c] += g * jacobian[3 * f + c];
    }
  }
  for (int c = 0; c < 3; ++c) store_strided<R>(a.grad_x, i, a.n, 3, c, sum[c]);
}

// [n, 3] and [n, L * F] of one block, transposed and padded with zeros to whole packs.
template <class T>
void transpose_pack(const HashEncodeBwdArgs<T>& a, int64_t first, int64_t k, T* u, T* g) {
  using R = Pack<T>;
  const int n_features = a.grid.n_features, width = a.grid.n_levels * n_features;
  R point[3], value;
  load_points<R>(a.x, first + k, a.n, point);
  for (int c = 0; c < 3; ++c) store<R>(u + c * kBlock + k, point[c]);
  for (int j = 0; j < a.active_levels * n_features; ++j) {
    load_strided<R>(a.grad_features, first + k, a.n, width, j, value);
    store<R>(g + j * kBlock + k, value);
  }
}

}  // namespace

template <class T>
int launch_hash_encode_fwd(const HashEncodeFwdArgs<T>& a, int n_threads) {
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(static)
  for (int64_t i = 0; i < a.n; i += kWidth<T>) encode_pack(a, i);
  return kOk;
}

template <class T>
int launch_hash_encode_bwd(const HashEncodeBwdArgs<T>& a, int n_threads) {
  const int threads = at_least_one(n_threads);
  if (a.grad_x) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < a.n; i += kWidth<T>) position_gradient(a, i);
  }
  if (!a.grad_table) return kOk;
  const int n_features = a.grid.n_features;
  Buffer<T> u(3 * kBlock), g(static_cast<int64_t>(kMaxInputs) * kBlock);
  if (!u.ok() || !g.ok()) return kOutOfMemory;
#pragma omp parallel num_threads(threads)
  for (int64_t first = 0; first < a.n; first += kBlock) {
    const int64_t n = a.n - first < kBlock ? a.n - first : kBlock;
#pragma omp for schedule(static)
    for (int64_t k = 0; k < n; k += kWidth<T>) transpose_pack(a, first, k, u.get(), g.get());
#pragma omp for schedule(dynamic, 1)
    for (int l = 0; l < a.active_levels; ++l) {
      const LevelGradients<T> gradients{{u.get(), u.get() + kBlock, u.get() + 2 * kBlock},
                                        g.get() + l * n_features * kBlock,
                                        nullptr,
                                        {nullptr, nullptr, nullptr},
                                        kBlock,
                                        n};
      scatter_level(a.grid, l, gradients, a.grad_table);
    }
  }
  return kOk;
}

SDI_INSTANTIATE(hash_encode_fwd, HashEncodeFwdArgs)
SDI_INSTANTIATE(hash_encode_bwd, HashEncodeBwdArgs)

}  // namespace SDI_ISA
}  // namespace sdi
