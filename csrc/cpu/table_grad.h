// Scatter of feature gradients into one level of the hash table's gradient.
//
// One thread owns a level and walks the samples in order: deterministic, no atomics, independent of
// the number of threads. A corner's entry gains first * weight + second * (d weight . p), the
// second part being the normal's (design.md, "The normal needs no second derivative"). Bytes per
// sample and level: 8 corners * F numbers read and written.
#pragma once

#include "../math/grid.h"
#include "pack.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
struct LevelGradients {
  const T* u[3];    // [n] each, in [0, 1]
  const T* first;   // [F, stride]: d loss / d feature
  const T* second;  // [F, stride]: factor of the slope term; null without one
  const T* p[3];    // [n] each: direction of the slope term; unused without one
  int64_t stride;   // n rounded up to whole packs
  int64_t n;
};

template <class T>
struct PairOf {
  typedef T Type __attribute__((vector_size(2 * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <class T>
SDI_HD void add_corner(T* entry, const T* values) {
  using Pair = typename PairOf<T>::Type;
  *reinterpret_cast<Pair*>(entry) += *reinterpret_cast<const Pair*>(values);
}

// The eight corners' indices and values of one pack, for two neighbouring features.
template <class T>
struct CornerBlock {
  static constexpr int kLanes = kWidth<T>;
  alignas(64) uint32_t index[kLanes][8];
  alignas(64) T value[kLanes][8][2];
};

template <class T>
SDI_HD void fill_values(const Pack<T> weights[8], const Pack<T> slopes[8],
                        const LevelGradients<T>& g, int64_t i, int f, int slot,
                        CornerBlock<T>& block) {
  using R = Pack<T>;
  const R first = load<R>(g.first + f * g.stride + i);
  const R second = g.second ? load<R>(g.second + f * g.stride + i) : R{};
  for (int k = 0; k < 8; ++k) {
    const R value = first * weights[k] + second * slopes[k];
    for (int lane = 0; lane < kWidth<T>; ++lane) block.value[lane][k][slot] = value[lane];
  }
}

// Corners and values of the pack at i, for features f and f + 1; its entries are called for.
template <class T>
SDI_HD void prepare_block(const Level<T>& level, int n_features, const LevelGradients<T>& g,
                          int64_t i, int f, CornerBlock<T>& block) {
  using R = Pack<T>;
  const R u[3] = {load<R>(g.u[0] + i), load<R>(g.u[1] + i), load<R>(g.u[2] + i)};
  const Cell<R> cell = locate(level, u);
  R weights[8], slopes[8] = {};
  for (int k = 0; k < 8; ++k) {
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      const uint32_t index = static_cast<uint32_t>(cell.index[k][lane]);
      block.index[lane][k] = index;
      if ((k & 1) == 0) {  // the neighbour along x mostly shares the line
        __builtin_prefetch(level.entries + static_cast<int64_t>(index) * n_features + f, 1);
      }
    }
  }
  corner_weights(cell, weights);
  if (g.second) {
    const R p[3] = {load<R>(g.p[0] + i) * level.scale, load<R>(g.p[1] + i) * level.scale,
                    load<R>(g.p[2] + i) * level.scale};
    corner_slopes(cell, p, slopes);
  }
  fill_values<T>(weights, slopes, g, i, f, 0, block);
  if (f + 1 < n_features) fill_values<T>(weights, slopes, g, i, f + 1, 1, block);
}

template <class T>
SDI_HD void add_block(const CornerBlock<T>& block, int lanes, int n_features, T* entries) {
  for (int lane = 0; lane < lanes; ++lane) {
    for (int k = 0; k < 8; ++k) {
      T* entry = entries + static_cast<int64_t>(block.index[lane][k]) * n_features;
      add_corner(entry, block.value[lane][k]);
    }
  }
}

template <class T>
SDI_HD void add_block_of_one(const CornerBlock<T>& block, int lanes, int n_features, T* entries) {
  for (int lane = 0; lane < lanes; ++lane) {
    for (int k = 0; k < 8; ++k) {
      entries[static_cast<int64_t>(block.index[lane][k]) * n_features] += block.value[lane][k][0];
    }
  }
}

// A pack's corners are computed while the entries of the one before it are on their way.
template <class T>
void scatter_level(const GridSpec& grid, int level, const LevelGradients<T>& g, T* grad_table) {
  const Level<T> info = level_of<T>(grid, level, grad_table);
  T* entries = grad_table + grid.offset[level] * grid.n_features;
  const int n_features = grid.n_features;
  CornerBlock<T> blocks[2];
  for (int f = 0; f < n_features; f += 2) {
    const bool has_pair = f + 1 < n_features;
    if (g.n > 0) prepare_block(info, n_features, g, 0, f, blocks[0]);
    for (int64_t i = 0, turn = 0; i < g.n; i += kWidth<T>, turn ^= 1) {
      if (i + kWidth<T> < g.n) {
        prepare_block(info, n_features, g, i + kWidth<T>, f, blocks[turn ^ 1]);
      }
      const int lanes = static_cast<int>(g.n - i < kWidth<T> ? g.n - i : kWidth<T>);
      if (has_pair) {
        add_block(blocks[turn], lanes, n_features, entries + f);
      } else {
        add_block_of_one(blocks[turn], lanes, n_features, entries + f);
      }
    }
  }
}

}  // namespace SDI_ISA
}  // namespace sdi
