// Environment background on the CPU, forward and backward (methods.md D, Background).
// Twin: sdi_fast/reference/background.py.
//
// One lane a ray (math/background.h). The backward recomputes the forward; a chunk of rays keeps
// its weight gradients in lane sums, and the chunks are added in their order, in double: the result
// does not depend on the number of threads. Precision: T within a chunk. Numbers per ray: 3 read
// and 3 written forward, 6 read backward.
#include "../math/background.h"

#include "dispatch.h"
#include "pack.h"
#include "parallel.h"

namespace sdi {
namespace SDI_ISA {
namespace {

constexpr int64_t kChunk = 2048;  // rays; a multiple of every width
constexpr int kW1 = 0, kW2 = kBgHidden * kSh, kW3 = kW2 + kBgHidden * kBgHidden;
static_assert(kW3 + 3 * kBgHidden == kBackgroundWeights, "w1, w2, w3 one after another");

template <class T>
void add_pack(const BackgroundArgs<T>& a, int64_t i, Pack<T>* sums) {
  using R = Pack<T>;
  R d[3], grad[3], g1[kBgHidden], g2[kBgHidden], g3[3];
  BackgroundState<R> s;
  load_points<R>(a.directions, i, a.n, d);
  for (int c = 0; c < 3; ++c) load_strided<R>(a.grad_rgb, i, a.n, 3, c, grad[c]);
  background_forward(d, a.w1, a.w2, a.w3, s);
  background_backward(s, grad, a.w2, a.w3, g1, g2, g3);
  for (int h = 0; h < kBgHidden; ++h) {
    for (int k = 0; k < kSh; ++k) sums[kW1 + h * kSh + k] += g1[h] * s.sh[k];
    for (int k = 0; k < kBgHidden; ++k) sums[kW2 + h * kBgHidden + k] += g2[h] * s.h1[k];
  }
  for (int c = 0; c < 3; ++c) {
    for (int k = 0; k < kBgHidden; ++k) sums[kW3 + c * kBgHidden + k] += g3[c] * s.h2[k];
  }
}

template <class T>
void backward_chunk(const BackgroundArgs<T>& a, int64_t chunk, T* out) {
  using R = Pack<T>;
  R sums[kBackgroundWeights] = {};
  const int64_t stop = (chunk + 1) * kChunk < a.n ? (chunk + 1) * kChunk : a.n;
  for (int64_t i = chunk * kChunk; i < stop; i += kWidth<T>) add_pack(a, i, sums);
  static_assert(kBackgroundWeights % kWidth<T> == 0, "whole packs of sums");
  for (int k = 0; k < kBackgroundWeights; k += kWidth<T>) store<R>(out + k, sum_lanes(sums + k));
}

}  // namespace

template <class T>
int launch_background_fwd(const BackgroundArgs<T>& a, int n_threads) {
  using R = Pack<T>;
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(static)
  for (int64_t i = 0; i < a.n; i += kWidth<T>) {
    R d[3];
    BackgroundState<R> s;
    load_points<R>(a.directions, i, a.n, d);
    background_forward(d, a.w1, a.w2, a.w3, s);
    for (int c = 0; c < 3; ++c) store_strided<R>(a.rgb, i, a.n, 3, c, s.rgb[c]);
  }
  return kOk;
}

template <class T>
int launch_background_bwd(const BackgroundArgs<T>& a, int n_threads) {
  const int64_t n_chunks = (a.n + kChunk - 1) / kChunk;
  Buffer<T> partial(n_chunks * kBackgroundWeights);
  if (!partial.ok()) return kOutOfMemory;
#pragma omp parallel for num_threads(at_least_one(n_threads)) schedule(dynamic, 1)
  for (int64_t c = 0; c < n_chunks; ++c) {
    backward_chunk(a, c, partial.get() + c * kBackgroundWeights);
  }
  for (int k = 0; k < kBackgroundWeights; ++k) {
    double sum = 0;
    for (int64_t c = 0; c < n_chunks; ++c) sum += partial.get()[c * kBackgroundWeights + k];
    a.grad_weights[k] = static_cast<T>(sum);
  }
  return kOk;
}

SDI_INSTANTIATE(background_fwd, BackgroundArgs)
SDI_INSTANTIATE(background_bwd, BackgroundArgs)

}  // namespace SDI_ISA
}  // namespace sdi
