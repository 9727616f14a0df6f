// The radiance field on the CPU, backward, the normal's second-order part included (methods.md D;
// design.md, "The normal needs no second derivative").
// Twin: autograd through sdi_fast/reference/field.py.
//
// Samples go in chunks of kChunk. A chunk recomputes the forward pack by pack and leaves
//   - its own sums for the MLP weights: W1 += (1[h>0] w2) x (gl e + J p), V1 += gate x e, and so
//     on,
//   - per sample and feature, what the scatter needs: first = cotangent of e, second = q, and p.
// A batch of chunks is then reduced in the order of the chunks, in double, and scattered level by
// level (cpu/table_grad.h). Chunks do not depend on the number of threads, so neither do the
// results. Recomputed: everything. Precision: T within a chunk. Numbers per sample: 8 L F gathered,
// 8 L F read and written by the scatter, 2 L F + 6 written and read in between.
#include "dispatch.h"
#include "field_weights.h"
#include "pack.h"
#include "table_grad.h"

namespace sdi {
namespace SDI_ISA {
namespace {

constexpr int kChunk = 256;                        // samples; a multiple of every width
constexpr int kRows = kVectorBytes == 64 ? 4 : 2;  // register tile of outer_sum
constexpr int kColumns = 4;

// out[r * n_columns + c] = sum_s a[r, s] b[c, s]; rows and columns are multiples of kPad
template <class T>
void outer_sum(const T* a, int n_rows, const T* b, int n_columns, T* out) {
  using R = Pack<T>;
  constexpr int kCells = kRows * kColumns;
  for (int r = 0; r < n_rows; r += kRows) {
    for (int c = 0; c < n_columns; c += kColumns) {
      R acc[kCells] = {};
      for (int s = 0; s < kChunk; s += kWidth<T>) {
        R column[kColumns];
        for (int j = 0; j < kColumns; ++j) column[j] = load<R>(b + (c + j) * kChunk + s);
        for (int i = 0; i < kRows; ++i) {
          const R row = load<R>(a + (r + i) * kChunk + s);
          for (int j = 0; j < kColumns; ++j) acc[i * kColumns + j] += row * column[j];
        }
      }
      T sums[kCells];
      for (int k = 0; k < kCells; k += kWidth<T>) store<R>(sums + k, sum_lanes(acc + k));
      for (int k = 0; k < kCells; ++k) {
        out[(r + k / kColumns) * n_columns + c + k % kColumns] = sums[k];
      }
    }
  }
}

// Sizes and offsets of the sums of one chunk.
struct Layout {
  int n_in, n_in_padded, hidden, hidden_padded;
  int density_w1, color_w1, density_w2, color_w2, total;

  explicit Layout(const FieldSpec& spec)
      : n_in(spec.active_levels * spec.grid.n_features),
        n_in_padded(padded(n_in)),
        hidden(spec.hidden),
        hidden_padded(padded(hidden)) {
    density_w1 = 0;
    color_w1 = hidden_padded * n_in_padded;
    density_w2 = 2 * color_w1;
    color_w2 = density_w2 + hidden_padded;
    total = color_w2 + 3 * hidden_padded;
  }
};

// Per-sample results of a batch of chunks, feature-major: what the scatter reads.
template <class T>
struct ScatterBuffers {
  T* u;       // [3, stride]
  T* p;       // [3, stride]
  T* first;   // [n_in, stride]
  T* second;  // [n_in, stride]
  int64_t stride;
};

// A thread's scratch for one chunk, rows of kChunk samples.
template <class T>
struct ChunkRows {
  T* gated;     // [hidden_padded]
  T* gate;      // [hidden_padded], colour
  T* combined;  // [n_in_padded]
  T* features;  // [n_in_padded]
};

template <class T>
struct OutputSums {  // lane sums for the two last layers
  Pack<T> density[kMaxHidden];
  Pack<T> color[3][kMaxHidden];
};

template <class T>
void backward_pack(const FieldBwdArgs<T>& a, const PackedWeights<T>& w, int64_t sample,
                   const ScatterBuffers<T>& buffers, int64_t slot, const ChunkRows<T>& rows, int s,
                   OutputSums<T>& sums) {
  using R = Pack<T>;
  FieldState<R> state;
  FieldCotangent<R> cot;
  load_points<R>(a.x_world, sample, a.n, state.x);
  evaluate_field(a.spec, a.params.table, w, state);
  load_strided<R>(a.grad_density, sample, a.n, 1, 0, cot.density);
  for (int c = 0; c < 3; ++c) {
    load_strided<R>(a.grad_albedo, sample, a.n, 3, c, cot.albedo[c]);
    load_strided<R>(a.grad_normal, sample, a.n, 3, c, cot.normal[c]);
  }
  backpropagate(a.spec, w, state, cot);
  for (int c = 0; c < 3; ++c) {
    store<R>(buffers.u + c * buffers.stride + slot, state.u[c]);
    store<R>(buffers.p + c * buffers.stride + slot, cot.p[c]);
  }
  for (int i = 0; i < w.n_in; ++i) {
    store<R>(buffers.first + i * buffers.stride + slot, cot.features[i]);
    store<R>(buffers.second + i * buffers.stride + slot, state.slope[i]);
    store<R>(rows.combined + i * kChunk + s, cot.combined[i]);
    store<R>(rows.features + i * kChunk + s, state.features[i]);
  }
  // W1 (gl e + J p): gated, it is the gradient of w2
  R through[kMaxHidden];
  dense(w.density_in, w.n_in, w.hidden_padded, cot.combined, through);
  for (int h = 0; h < w.hidden_padded; ++h) {
    store<R>(rows.gated + h * kChunk + s, state.gated[h]);
    store<R>(rows.gate + h * kChunk + s, cot.color_gate[h]);
    sums.density[h] += gate(state.hidden[h], through[h]);
    for (int k = 0; k < 3; ++k) sums.color[k][h] += cot.color_logits[k] * state.color_hidden[h];
  }
}

template <class T>
void store_output_sums(OutputSums<T>& sums, const Layout& layout, T* out) {
  using R = Pack<T>;
  for (int h = 0; h < layout.hidden_padded; h += kWidth<T>) {
    store<R>(out + layout.density_w2 + h, sum_lanes(sums.density + h));
    for (int k = 0; k < 3; ++k) {
      store<R>(out + layout.color_w2 + k * layout.hidden_padded + h, sum_lanes(sums.color[k] + h));
    }
  }
}

// One chunk: `first` is its first sample, `slot` its place in the batch's buffers.
template <class T>
void backward_chunk(const FieldBwdArgs<T>& a, const PackedWeights<T>& w, const Layout& layout,
                    int64_t first, const ScatterBuffers<T>& buffers, int64_t slot,
                    const ChunkRows<T>& rows, T* out) {
  using R = Pack<T>;
  OutputSums<T> sums;
  for (int h = 0; h < layout.hidden_padded; ++h) {
    sums.density[h] = R{};
    for (int k = 0; k < 3; ++k) sums.color[k][h] = R{};
  }
  for (int s = 0; s < kChunk; s += kWidth<T>) {
    if (first + s < a.n) {
      backward_pack(a, w, first + s, buffers, slot + s, rows, s, sums);
      continue;
    }
    for (int i = 0; i < w.n_in; ++i) {  // past the end: nothing to add
      store<R>(rows.combined + i * kChunk + s, R{});
      store<R>(rows.features + i * kChunk + s, R{});
    }
    for (int h = 0; h < w.hidden_padded; ++h) {
      store<R>(rows.gated + h * kChunk + s, R{});
      store<R>(rows.gate + h * kChunk + s, R{});
    }
  }
  outer_sum(rows.gated, w.hidden_padded, rows.combined, w.n_in_padded, out + layout.density_w1);
  outer_sum(rows.gate, w.hidden_padded, rows.features, w.n_in_padded, out + layout.color_w1);
  store_output_sums(sums, layout, out);
}

// The sums without their padding, into the caller's arrays; masked levels get zeros.
template <class T>
void write_weight_gradients(const FieldBwdArgs<T>& a, const Layout& layout, const double* sums) {
  const int width = a.spec.grid.n_levels * a.spec.grid.n_features;
  for (int h = 0; h < layout.hidden; ++h) {
    for (int i = 0; i < width; ++i) {
      const bool is_active = i < layout.n_in;
      const int at = h * layout.n_in_padded + i;
      a.grad_density_w1[h * width + i] = is_active ? T(sums[layout.density_w1 + at]) : T(0);
      a.grad_color_w1[h * width + i] = is_active ? T(sums[layout.color_w1 + at]) : T(0);
    }
    a.grad_density_w2[h] = T(sums[layout.density_w2 + h]);
    for (int k = 0; k < 3; ++k) {
      a.grad_color_w2[k * layout.hidden + h] =
          T(sums[layout.color_w2 + k * layout.hidden_padded + h]);
    }
  }
}

template <class T>
ChunkRows<T> split_rows(T* memory, const Layout& layout) {
  const int64_t n_rows = 2 * (layout.hidden_padded + layout.n_in_padded);
  for (int64_t i = 0; i < n_rows * kChunk; ++i) memory[i] = T(0);  // the padding rows stay zero
  T* gate = memory + layout.hidden_padded * kChunk;
  T* combined = gate + layout.hidden_padded * kChunk;
  return {memory, gate, combined, combined + layout.n_in_padded * kChunk};
}

}  // namespace

template <class T>
int launch_field_bwd(const FieldBwdArgs<T>& a, int n_threads) {
  const int threads = at_least_one(n_threads);
  const int n_features = a.spec.grid.n_features;
  const Layout layout(a.spec);
  const WeightStore<T> weight_store(a.spec);
  const int64_t batch = 2 * threads < 16 ? 16 : 2 * threads;  // chunks between two scatters
  const int64_t stride = batch * kChunk;
  const int64_t rows_size = 2 * (layout.hidden_padded + layout.n_in_padded) * kChunk;
  Buffer<T> scatter_memory((6 + 2 * layout.n_in) * stride), partial(batch * layout.total);
  Buffer<T> rows_memory(threads * rows_size);
  Buffer<double> sums(layout.total);
  if (!weight_store.ok() || !scatter_memory.ok() || !partial.ok() || !rows_memory.ok() ||
      !sums.ok()) {
    return kOutOfMemory;
  }
  const PackedWeights<T> weights = weight_store.pack(a.spec, a.params);
  T* u = scatter_memory.get();
  const ScatterBuffers<T> buffers{u, u + 3 * stride, u + 6 * stride, u + (6 + layout.n_in) * stride,
                                  stride};
  for (int i = 0; i < layout.total; ++i) sums.get()[i] = 0;

#pragma omp parallel num_threads(threads)
  {
    const ChunkRows<T> rows = split_rows(rows_memory.get() + thread_index() * rows_size, layout);
    for (int64_t start = 0; start < a.n; start += stride) {
      const int64_t n = a.n - start < stride ? a.n - start : stride;
      const int64_t n_chunks = (n + kChunk - 1) / kChunk;
#pragma omp for schedule(dynamic, 1)
      for (int64_t c = 0; c < n_chunks; ++c) {
        backward_chunk(a, weights, layout, start + c * kChunk, buffers, c * kChunk, rows,
                       partial.get() + c * layout.total);
      }
#pragma omp for schedule(static) nowait
      for (int i = 0; i < layout.total; ++i) {
        for (int64_t c = 0; c < n_chunks; ++c) sums.get()[i] += partial.get()[c * layout.total + i];
      }
#pragma omp for schedule(dynamic, 1)
      for (int l = 0; l < a.spec.active_levels; ++l) {
        const int64_t skip = static_cast<int64_t>(l) * n_features * stride;
        const LevelGradients<T> gradients{{u, u + stride, u + 2 * stride},
                                          buffers.first + skip,
                                          buffers.second + skip,
                                          {buffers.p, buffers.p + stride, buffers.p + 2 * stride},
                                          stride,
                                          n};
        scatter_level(a.spec.grid, l, gradients, a.grad_table);
      }
    }
  }
  write_weight_gradients(a, layout, sums.get());
  return kOk;
}

SDI_INSTANTIATE(field_bwd, FieldBwdArgs)

}  // namespace SDI_ISA
}  // namespace sdi
