// The radiance field on the GPU, backward, the normal's second-order part included (methods.md D;
// design.md, "The normal needs no second derivative").
// Twin: autograd through sdi_fast/reference/field.py. Maths: backpropagate of math/field.h.
//
// A block takes tiles of up to 32 samples in shared memory (field_tile.h), recomputes the forward,
// and leaves in the rows the cotangents of e and, with p the cotangent of J^T q, combined =
// gl e + J p. Then threads own weights and sum over the tile's samples:
//   M = sum of 1[h > 0] x combined, of which grad W1 = w2 M (by rows) and grad w2 = W1 . M;
//   grad V1 = sum of color_gate x e, grad V2 = sum of colour logits x relu(V1 e).
// A block adds its tiles up in its row of the workspace; a second kernel adds the rows in order, in
// double: no atomics, so that these gradients repeat bit by bit. The table's are added with
// atomics, in any order: per corner, cotangent * weight + q (d weight . p). Precision: T within a
// block. Bytes per sample in f32: 40 read, 32 L F gathered and as many added to; the workspace's
// rows, 4 hidden (2 L F + 3) a tile, stay in the cache.
#include "dispatch.h"
#include "field_tile.h"

namespace sdi {
namespace cuda {
namespace {

constexpr int kReduceThreads = 128;
constexpr int kCells = 4;  // rows and columns of the register tile of outer_sums

// Sums of a block: M [hidden, n_in], V1's [hidden, n_in], V2's [3, hidden].
__host__ __device__ inline int64_t sums_of(const Row& at) {
  return static_cast<int64_t>(at.hidden) * (2 * at.n_in + 3);
}

template <class T>
__device__ void load_cotangents(const FieldBwdArgs<T>& a, int64_t i, const Row& at,
                                const Worker<T>& me) {
  if (me.group != 0) return;
  const FieldValues<T> values = finish(a.spec, at, me.row);
  const bool exists = i < a.n;
  T albedo[3], normal[3], p[3];
  for (int c = 0; c < 3; ++c) {
    albedo[c] = exists ? a.grad_albedo[3 * i + c] : T(0);
    normal[c] = exists ? a.grad_normal[3 * i + c] : T(0);
  }
  normal_backward(values.normal, values.length, normal, p);
  T* out = me.row + at.cotangents;
  const T to_unit = T(1) / T(2.0 * a.spec.radius);
  for (int c = 0; c < 3; ++c) {
    out[c] = p[c] * to_unit;
    out[4 + c] = albedo[c] * values.albedo[c] * (T(1) - values.albedo[c]);
  }
  out[3] = exists ? a.grad_density[i] * softplus_slope(values.logit) : T(0);
}

template <class T>
__device__ void combine(const FieldParams<T>& params, const Row& at, const Worker<T>& me) {
  T* row = me.row;
  const T* cot = row + at.cotangents;
  for (int i = me.group; i < at.n_in; i += me.n_groups) {
    T along = cot[3] * row[at.features + i];
    for (int c = 0; c < 3; ++c) along += row[at.jacobian + 3 * i + c] * cot[c];
    row[at.combined + i] = along;
  }
  for (int h = me.group; h < at.hidden; h += me.n_groups) {
    T sum = cot[4] * params.color_w2[h];
    for (int c = 1; c < 3; ++c) sum += cot[4 + c] * params.color_w2[c * at.hidden + h];
    row[at.color_gate + h] = gate(row[at.color + h], sum);
  }
}

// Cotangents of e, over the Jacobian, which is needed no more.
template <class T>
__device__ void feature_cotangents(const FieldParams<T>& params, const Row& at,
                                   const Worker<T>& me) {
  layer<4>(
      params.color_w1, 1, at.n_in, at.width, at.hidden, me,
      [&](int h) { return me.row[at.color_gate + h]; },
      [&](int i, T sum) {
        me.row[at.jacobian + i] = sum + me.row[at.cotangents + 3] * me.row[at.slope + i];
      });
}

template <class T>
__device__ void store_sum(T* sums, int64_t k, bool is_first, T value) {
  sums[k] = is_first ? value : sums[k] + value;
}

// sums[h, i] (+)= sum over the tile's first `count` samples of left(row, h) * row[right + i]. A
// thread owns kCells rows and kCells columns, the latter spread out so that lanes are neighbours.
template <class T, class Left>
__device__ void outer_sums(const T* rows, const Row& at, int count, int right, bool is_first,
                           T* sums, Left&& left) {
  const int n_columns = (at.n_in + kCells - 1) / kCells, n_rows = (at.hidden + kCells - 1) / kCells;
  for (int cell = threadIdx.x; cell < n_rows * n_columns; cell += kTileThreads) {
    const int h0 = cell / n_columns * kCells, i0 = cell % n_columns;
    T acc[kCells][kCells] = {};
    for (int s = 0; s < count; ++s) {
      const T* row = rows + s * at.length;
      T a[kCells], b[kCells];
      for (int j = 0; j < kCells; ++j) {
        const int h = h0 + j, i = i0 + j * n_columns;
        a[j] = h < at.hidden ? left(row, h) : T(0);
        b[j] = i < at.n_in ? row[right + i] : T(0);
      }
      for (int j = 0; j < kCells; ++j) {
        for (int k = 0; k < kCells; ++k) acc[j][k] += a[j] * b[k];
      }
    }
    for (int j = 0; j < kCells; ++j) {
      for (int k = 0; k < kCells; ++k) {
        const int h = h0 + j, i = i0 + k * n_columns;
        if (h < at.hidden && i < at.n_in) {
          store_sum(sums, static_cast<int64_t>(h) * at.n_in + i, is_first, acc[j][k]);
        }
      }
    }
  }
}

// The tile's weight gradients into the block's sums. Each sum has one owner, the same in every
// tile.
template <class T>
__device__ void add_weight_sums(const T* rows, const Row& at, int count, bool is_first, T* sums) {
  const int64_t size = static_cast<int64_t>(at.hidden) * at.n_in;
  outer_sums(rows, at, count, at.combined, is_first, sums,
             [&](const T* row, int h) { return gate(row[at.hidden_in + h], T(1)); });
  outer_sums(rows, at, count, at.features, is_first, sums + size,
             [&](const T* row, int h) { return row[at.color_gate + h]; });
  for (int k = threadIdx.x; k < 3 * at.hidden; k += kTileThreads) {
    const int c = k / at.hidden, h = k % at.hidden;
    T sum = T(0);
    for (int s = 0; s < count; ++s) {
      const T* row = rows + s * at.length;
      sum += row[at.cotangents + 4 + c] * row[at.color + h];
    }
    store_sum(sums + 2 * size, k, is_first, sum);
  }
}

template <class T>
__device__ void scatter(const FieldBwdArgs<T>& a, const Row& at, const Worker<T>& me) {
  const int n_features = a.spec.grid.n_features;
  for (int l = me.group; l < a.spec.active_levels; l += me.n_groups) {
    const Level<T> level = level_of(a.spec.grid, l, a.params.table);
    const Cell<T> cell = locate(level, me.row + at.u);
    T p[3], weights[8], slopes[8];
    for (int c = 0; c < 3; ++c) p[c] = me.row[at.cotangents + c] * level.scale;
    corner_weights(cell, weights);
    corner_slopes(cell, p, slopes);
    T* entries = a.grad_table + a.spec.grid.offset[l] * n_features;
    const T* first = me.row + at.jacobian + l * n_features;  // see feature_cotangents
    const T* second = me.row + at.slope + l * n_features;
    for (int k = 0; k < 8; ++k) {
      T* entry = entries + static_cast<int64_t>(cell.index[k]) * n_features;
      for (int f = 0; f < n_features; ++f) {
        atomicAdd(entry + f, first[f] * weights[k] + second[f] * slopes[k]);
      }
    }
  }
}

template <class T>
__global__ void field_bwd_kernel(const FieldBwdArgs<T> a, const Row at) {
  T* rows = shared_rows<T>();
  const Worker<T> me(rows, at);
  T* sums = a.workspace + blockIdx.x * sums_of(at);
  const int64_t start = static_cast<int64_t>(blockIdx.x) * at.n_samples;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * at.n_samples;
  for (int64_t first = start; first < a.n; first += stride) {
    const int64_t i = first + me.sample, left = a.n - first;
    const int count = static_cast<int>(left < at.n_samples ? left : at.n_samples);
    evaluate_tile(a.x_world, a.params, i, a.n, a.spec, at, me);
    load_cotangents(a, i, at, me);
    __syncthreads();
    combine(a.params, at, me);
    __syncthreads();
    feature_cotangents(a.params, at, me);
    add_weight_sums(rows, at, count, first == start, sums);
    __syncthreads();
    if (i < a.n) scatter(a, at, me);
    __syncthreads();  // before the next tile overwrites the rows
  }
}

// One block a hidden unit: the workspace's rows added up; masked levels get zeros.
template <class T>
__global__ void field_reduce_kernel(const FieldBwdArgs<T> a, const Row at, int n_rows) {
  __shared__ double parts[kReduceThreads];  // of w2's gradient
  const int h = blockIdx.x;
  const int64_t total = sums_of(at), size = static_cast<int64_t>(at.hidden) * at.n_in;
  const auto sum_rows = [&](int64_t k) {
    double sum = 0;
    for (int row = 0; row < n_rows; ++row) sum += a.workspace[row * total + k];
    return sum;
  };
  const T w2 = a.params.density_w2[h];
  double part = 0;
  for (int i = threadIdx.x; i < at.width; i += kReduceThreads) {
    const int64_t k = static_cast<int64_t>(h) * at.n_in + i,
                  out = static_cast<int64_t>(h) * at.width + i;
    const double m = i < at.n_in ? sum_rows(k) : 0.0;
    part += i < at.n_in ? a.params.density_w1[out] * m : 0.0;
    a.grad_density_w1[out] = i < at.n_in ? static_cast<T>(w2 * m) : T(0);
    a.grad_color_w1[out] = i < at.n_in ? static_cast<T>(sum_rows(size + k)) : T(0);
  }
  parts[threadIdx.x] = part;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (int k = 0; k < kReduceThreads; ++k) sum += parts[k];
    a.grad_density_w2[h] = static_cast<T>(sum);
  }
  if (threadIdx.x < 3) {
    const int k = threadIdx.x * at.hidden + h;
    a.grad_color_w2[k] = static_cast<T>(sum_rows(2 * size + k));
  }
}

}  // namespace

template <class T>
int launch_field_bwd(const FieldBwdArgs<T>& args, void* stream) {
  const Row row(args.spec, Row::kBackward, sizeof(T));
  const int64_t tiles = tiles_of(args.n, row);
  const int blocks = static_cast<int>(tiles < kFieldMaxBlocks ? tiles : kFieldMaxBlocks);
  if (blocks > 0) {
    const size_t bytes = row.bytes(sizeof(T));
    if (!allow_shared(field_bwd_kernel<T>, bytes)) return kCudaError;
    const int status = launch(field_bwd_kernel<T>, static_cast<unsigned>(blocks), kTileThreads,
                              bytes, stream, args, row);
    if (status != kOk) return status;
  }
  return launch(field_reduce_kernel<T>, static_cast<unsigned>(row.hidden), kReduceThreads, 0,
                stream, args, row, blocks);
}

SDI_INSTANTIATE_CUDA(field_bwd, FieldBwdArgs)

}  // namespace cuda
}  // namespace sdi
