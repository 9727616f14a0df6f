// A tile of samples in one block: what the kernels of field_fwd.cu and field_bwd.cu share.
//
// Every sample has a row of numbers in shared memory, an odd number of them long, so that lanes
// that are samples reach different banks. A thread serves one sample for the whole kernel, together
// with the threads of the same sample in other groups: each group takes some levels, some outputs
// of a layer, and so on. Weights come straight from torch.nn.Linear's layout in global memory, the
// same number for all samples of a group: one read a warp, from the cache. The formulas are those
// of math/field.h, on the same building blocks (math/grid.h, math/normal.h, math/scalar.h).
#pragma once

#include "../field.h"
#include "../math/grid.h"
#include "../math/mlp.h"
#include "../math/normal.h"
#include "launch.h"

namespace sdi {
namespace cuda {

using namespace SDI_ISA;

constexpr int kTileThreads = 256;
constexpr int kTileSamples = 32;          // fewer where their rows would not fit
constexpr size_t kTileBytes = 96 * 1024;  // of shared memory: every GPU from sm_80 on has them
constexpr int64_t kMaxTileBlocks = 1 << 14;

// Where the numbers of a sample are in its row.
struct Row {
  enum Parts { kDensity, kForward, kBackward };

  int n_in;   // active_levels * F
  int width;  // L * F: columns of W1 and V1
  int hidden;
  int x = 0, u = 3;  // [3] each
  int features;      // [n_in]
  int hidden_in;     // [hidden]: density MLP, before ReLU
  int jacobian;      // [3 n_in]: d feature / d u; later, in the backward, [n_in] cotangents of e
  int slope;         // [n_in]: q = d logit / d feature
  int color;         // [hidden]: colour MLP, after ReLU
  int heads;         // [7]: logit without the blob, three colour logits, J^T q
  int cotangents;    // [7]: p, logit, colour logits; see FieldCotangent of math/field.h
  int combined;      // [n_in]: logit * e + J p
  int color_gate;    // [hidden]: cotangent of V1 e
  int length;        // odd
  int n_samples;     // a tile, a power of two

  Row(const FieldSpec& spec, Parts parts, size_t size_of_number)
      : n_in(spec.active_levels * spec.grid.n_features),
        width(spec.grid.n_levels * spec.grid.n_features),
        hidden(spec.hidden) {
    features = 6;
    hidden_in = features + n_in;
    jacobian = hidden_in + hidden;
    slope = jacobian + 3 * n_in;
    color = slope + n_in;
    heads = color + hidden;
    cotangents = heads + 7;
    combined = cotangents + 7;
    color_gate = combined + n_in;
    const int ends[] = {jacobian, cotangents, color_gate + hidden};
    length = ends[parts] | 1;
    n_samples = kTileSamples;
    while (n_samples > 1 && bytes(size_of_number) > kTileBytes) n_samples /= 2;
  }

  size_t bytes(size_t size_of_number) const { return size_of_number * n_samples * length; }
};

inline int64_t tiles_of(int64_t n, const Row& row) {
  return (n + row.n_samples - 1) / row.n_samples;
}

// The sample of the tile that a thread serves, and its part in that.
template <class T>
struct Worker {
  T* row;
  int sample;  // in the tile
  int group, n_groups;

  __device__ Worker(T* rows, const Row& at)
      : sample(threadIdx.x % at.n_samples),
        group(threadIdx.x / at.n_samples),
        n_groups(kTileThreads / at.n_samples) {
    row = rows + sample * at.length;
  }
};

template <class T>
__device__ T* shared_rows() {
  SDI_DYNAMIC_SHARED(double, field_rows);
  return reinterpret_cast<T*>(field_rows);
}

// Samples past the end repeat the last one; their results are thrown away.
template <class T>
__device__ void load_point(const T* x_world, int64_t i, int64_t n, const FieldSpec& spec,
                           const Row& at, const Worker<T>& me) {
  if (me.group != 0) return;
  const T* x = x_world + 3 * (i < n ? i : n - 1);
  const T side = T(2.0 * spec.radius);
  for (int a = 0; a < 3; ++a) {
    me.row[at.x + a] = x[a];
    me.row[at.u + a] = (x[a] + T(spec.radius)) / side;
  }
}

template <bool kWithJacobian, class T>
__device__ void encode(const FieldSpec& spec, const T* table, const Row& at, const Worker<T>& me) {
  const int n_features = spec.grid.n_features;
  for (int l = me.group; l < spec.active_levels; l += me.n_groups) {
    const int first = l * n_features;
    encode_level<kWithJacobian>(level_of(spec.grid, l, table), n_features, me.row + at.u,
                                me.row + at.features + first, me.row + at.jacobian + 3 * first);
  }
}

// emit(o, sum_k w[o * out_step + k * in_step] input(k)) for all o < n_out, kOut of them at a time
template <int kOut, class T, class Input, class Emit>
__device__ void layer(const T* w, int out_step, int n_out, int in_step, int n_in,
                      const Worker<T>& me, Input&& input, Emit&& emit) {
  for (int first = me.group * kOut; first < n_out; first += me.n_groups * kOut) {
    const T* rows[kOut];
    T sums[kOut] = {};
    for (int j = 0; j < kOut; ++j) {
      rows[j] = w + (first + j < n_out ? first + j : n_out - 1) * out_step;
    }
    for (int k = 0; k < n_in; ++k) {
      const T value = input(k);
      for (int j = 0; j < kOut; ++j) sums[j] += value * rows[j][k * in_step];
    }
    for (int j = 0; j < kOut; ++j) {
      if (first + j < n_out) emit(first + j, sums[j]);
    }
  }
}

// h = W1 e
template <class T>
__device__ void density_layer(const FieldParams<T>& params, const Row& at, const Worker<T>& me) {
  layer<8>(
      params.density_w1, at.width, at.hidden, 1, at.n_in, me,
      [&](int i) { return me.row[at.features + i]; },
      [&](int h, T sum) { me.row[at.hidden_in + h] = sum; });
}

// relu(V1 e)
template <class T>
__device__ void color_layer(const FieldParams<T>& params, const Row& at, const Worker<T>& me) {
  layer<8>(
      params.color_w1, at.width, at.hidden, 1, at.n_in, me,
      [&](int i) { return me.row[at.features + i]; },
      [&](int h, T sum) { me.row[at.color + h] = relu(sum); });
}

// q = W1^T (1[h > 0] * w2)
template <class T>
__device__ void slope_layer(const FieldParams<T>& params, const Row& at, const Worker<T>& me) {
  layer<4>(
      params.density_w1, 1, at.n_in, at.width, at.hidden, me,
      [&](int h) { return gate(me.row[at.hidden_in + h], params.density_w2[h]); },
      [&](int i, T sum) { me.row[at.slope + i] = sum; });
}

template <class T>
__device__ T density_head(const FieldParams<T>& params, const Row& at, const T* row) {
  T sum = T(0);
  for (int h = 0; h < at.hidden; ++h) sum += relu(row[at.hidden_in + h]) * params.density_w2[h];
  return sum;
}

template <class T>
__device__ T color_head(const FieldParams<T>& params, int c, const Row& at, const T* row) {
  T sum = T(0);
  const T* w = params.color_w2 + c * at.hidden;
  for (int h = 0; h < at.hidden; ++h) sum += row[at.color + h] * w[h];
  return sum;
}

template <class T>
__device__ T gradient_head(int axis, const Row& at, const T* row) {
  T sum = T(0);
  for (int i = 0; i < at.n_in; ++i) sum += row[at.slope + i] * row[at.jacobian + 3 * i + axis];
  return sum;
}

template <class T>
__device__ void all_heads(const FieldParams<T>& params, const Row& at, const Worker<T>& me) {
  for (int j = me.group; j < 7; j += me.n_groups) {
    me.row[at.heads + j] = j == 0  ? density_head(params, at, me.row)
                           : j < 4 ? color_head(params, j - 1, at, me.row)
                                   : gradient_head(j - 4, at, me.row);
  }
}

// Everything up to the heads, for the samples from i on (i: this thread's). Ends at a barrier.
template <class T>
__device__ void evaluate_tile(const T* x_world, const FieldParams<T>& params, int64_t i, int64_t n,
                              const FieldSpec& spec, const Row& at, const Worker<T>& me) {
  load_point(x_world, i, n, spec, at, me);
  __syncthreads();
  encode<true>(spec, params.table, at, me);
  __syncthreads();
  density_layer(params, at, me);
  color_layer(params, at, me);
  __syncthreads();
  slope_layer(params, at, me);
  __syncthreads();
  all_heads(params, at, me);
  __syncthreads();
}

template <class T>
struct FieldValues {
  T logit;  // with the blob in it
  T albedo[3];
  T normal[3];
  T length;  // of the logit's gradient, floored
};

template <class T>
__device__ FieldValues<T> finish(const FieldSpec& spec, const Row& at, const T* row) {
  FieldValues<T> out;
  const T to_world = T(1) / T(2.0 * spec.radius);
  T g[3];
  for (int a = 0; a < 3; ++a) g[a] = row[at.heads + 4 + a] * to_world;
  out.logit = row[at.heads] + add_blob(row + at.x, spec.blob_scale, spec.blob_std, g);
  out.length = normal_from_gradient(g, out.normal);
  for (int c = 0; c < 3; ++c) out.albedo[c] = sigmoid(row[at.heads + 1 + c]);
  return out;
}

}  // namespace cuda
}  // namespace sdi
