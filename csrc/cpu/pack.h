// Packs: as many floats or doubles as one vector register of this instruction set holds.
//
// GCC/Clang vector types, so that math/*.h runs on a pack as it runs on a scalar; one lane is one
// sample. Precision: exp and log1p of float packs stay within about 2 units in the last place;
// double packs call the C library lane by lane, since only tests use them.
#pragma once

#include <cstring>
#include <utility>

#include "../math/base.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace sdi {
namespace SDI_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float PackF __attribute__((vector_size(kVectorBytes)));
typedef double PackD __attribute__((vector_size(kVectorBytes)));
typedef uint32_t IndexF __attribute__((vector_size(kVectorBytes)));
typedef uint64_t IndexD __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntF __attribute__((vector_size(kVectorBytes)));
typedef int64_t IntD __attribute__((vector_size(kVectorBytes)));

template <>
struct Traits<PackF> {
  using Scalar = float;
  using Index = IndexF;
};

template <>
struct Traits<PackD> {
  using Scalar = double;
  using Index = IndexD;
};

template <class T>
struct PackOf;
template <>
struct PackOf<float> {
  using Type = PackF;
};
template <>
struct PackOf<double> {
  using Type = PackD;
};
template <class T>
using Pack = typename PackOf<T>::Type;

template <class T>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(T));

SDI_HD IndexF to_index(PackF x) { return (IndexF) __builtin_convertvector(x, IntF); }
SDI_HD IndexD to_index(PackD x) { return (IndexD) __builtin_convertvector(x, IntD); }
SDI_HD void to_real(IndexF i, PackF& out) { out = __builtin_convertvector((IntF)i, PackF); }
SDI_HD void to_real(IndexD i, PackD& out) { out = __builtin_convertvector((IntD)i, PackD); }

SDI_HD PackF sqrt_of(PackF x) {
  PackF out;
  for (int i = 0; i < kWidth<float>; ++i) out[i] = __builtin_sqrtf(x[i]);
  return out;
}

SDI_HD PackD sqrt_of(PackD x) {
  PackD out;
  for (int i = 0; i < kWidth<double>; ++i) out[i] = __builtin_sqrt(x[i]);
  return out;
}

SDI_HD PackD exp_of(PackD x) {
  PackD out;
  for (int i = 0; i < kWidth<double>; ++i) out[i] = __builtin_exp(x[i]);
  return out;
}

SDI_HD PackD log1p_of(PackD x) {
  PackD out;
  for (int i = 0; i < kWidth<double>; ++i) out[i] = __builtin_log1p(x[i]);
  return out;
}

// exp by 2^n * p(r), |r| <= ln 2 / 2 (Cephes' expf coefficients). Below -87.3 the result stays at
// the smallest normal number; NaN stays NaN.
SDI_HD PackF exp_of(PackF x) {
  const PackF lowest = PackF{} - 87.33654f, highest = PackF{} + 88.72283f;
  const PackF low = x < lowest ? lowest : x;
  const PackF clamped = low > highest ? highest : low;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const PackF shifted = clamped * 1.44269504f + magic;
  const PackF n = shifted - magic;
  const PackF r = clamped - n * 0.693359375f - n * -2.12194440e-4f;
  PackF p = PackF{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // n reaches 128, which has no float: scale by 2^(n - 1), then by 2
  const IntF exponent = ((IntF)shifted << 23) + (126 << 23);
  return p * (PackF)exponent * 2.0f;
}

// log(1 + x) for x in [0, 1]: log of u = 1 + x, plus the part of x that u lost, over u.
SDI_HD PackF log1p_of(PackF x) {
  const PackF u = x + 1.0f;
  const PackF lost = x - (u - 1.0f);
  const IntF is_large = u > 1.41421356f;
  const PackF m = (is_large ? u * 0.5f : u) - 1.0f;  // in [-.29, .41]
  PackF p = PackF{} + 7.0376836292e-2f;
  p = p * m - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  const PackF square = m * m;
  const PackF exponent = is_large ? PackF{} + 1.0f : PackF{};
  PackF log = p * m * square + exponent * -2.12194440e-4f - 0.5f * square;
  log = log + m + exponent * 0.693359375f;
  return log + lost / u;
}

template <class R>
SDI_HD R load(const ScalarOf<R>* p) {
  R out;
  std::memcpy(&out, p, sizeof(R));
  return out;
}

template <class R>
SDI_HD void store(ScalarOf<R>* p, R value) {
  std::memcpy(p, &value, sizeof(R));
}

// Lanes past the end repeat the last of n samples: valid input whose results are thrown away.
template <class R>
SDI_HD void load_points(const ScalarOf<R>* x, int64_t first, int64_t n, R out[3]) {
  constexpr int kLanes = kWidth<ScalarOf<R>>;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int64_t i = first + lane < n ? first + lane : n - 1;
    for (int a = 0; a < 3; ++a) out[a][lane] = x[3 * i + a];
  }
}

// As above, with zeros past the end: cotangents.
template <class R>
SDI_HD void load_strided(const ScalarOf<R>* x, int64_t first, int64_t n, int stride, int offset,
                         R& out) {
  using T = ScalarOf<R>;
  for (int lane = 0; lane < kWidth<T>; ++lane) {
    out[lane] = first + lane < n ? x[stride * (first + lane) + offset] : T(0);
  }
}

template <class R>
SDI_HD void store_strided(ScalarOf<R>* x, int64_t first, int64_t n, int stride, int offset,
                          R value) {
  for (int lane = 0; lane < kWidth<ScalarOf<R>> && first + lane < n; ++lane) {
    x[stride * (first + lane) + offset] = value[lane];
  }
}

template <class I>
SDI_HD void gather_lanes(const float* table, I index, int stride, int f, PackF& out) {
  for (int lane = 0; lane < kWidth<float>; ++lane) {
    out[lane] = table[static_cast<int64_t>(index[lane]) * stride + f];
  }
}

SDI_HD PackF gather(const float* table, IndexF index, int stride, int f) {
  PackF out;
  gather_lanes(table, index, stride, f, out);
  return out;
}

SDI_HD PackD gather(const double* table, IndexD index, int stride, int f) {
  PackD out;
  for (int lane = 0; lane < kWidth<double>; ++lane) {
    out[lane] = table[static_cast<int64_t>(index[lane]) * stride + f];
  }
  return out;
}

SDI_HD void gather_pair(const double* table, IndexD index, int stride, int f, PackD& a, PackD& b) {
  a = gather(table, index, stride, f);
  b = gather(table, index, stride, f + 1);
}

// Two neighbours are fetched as one 64-bit load where they are the whole entry.
SDI_HD void gather_pair(const float* table, IndexF index, int stride, int f, PackF& a, PackF& b) {
#if defined(__AVX512F__)
  if (stride == 2) {
    const __m512i all = (__m512i)index;
    const __m512 low = _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_castsi512_si256(all), table, 8));
    const __m512 high =
        _mm512_castpd_ps(_mm512_i32gather_pd(_mm512_extracti64x4_epi64(all, 1), table, 8));
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    a = (PackF)_mm512_permutex2var_ps(low, even, high);
    b = (PackF)_mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
    return;
  }
#endif
  gather_lanes(table, index, stride, f, a);
  gather_lanes(table, index, stride, f + 1, b);
}

// Sums over the lanes of kWidth packs at once: lane i of the result is the sum of acc[i]'s lanes.
template <int kDistance, class R, int... kLane>
SDI_HD R fold(R a, R b, std::integer_sequence<int, kLane...>) {
  constexpr int kLanes = sizeof...(kLane);
  const R kept =
      __builtin_shufflevector(a, b, ((kLane & kDistance) == 0 ? kLane : kLanes + kLane)...);
  const R moved = __builtin_shufflevector(
      a, b, ((kLane & kDistance) == 0 ? (kLane ^ kDistance) : kLanes + (kLane ^ kDistance))...);
  return kept + moved;
}

template <int kDistance, class R>
SDI_HD void fold_all(R* acc) {
  constexpr auto kLanes = std::make_integer_sequence<int, kWidth<ScalarOf<R>>>{};
  for (int i = 0; i < kDistance; ++i) acc[i] = fold<kDistance>(acc[i], acc[i + kDistance], kLanes);
  if constexpr (kDistance > 1) fold_all<kDistance / 2>(acc);
}

template <class R>
SDI_HD R sum_lanes(R* acc) {
  fold_all<kWidth<ScalarOf<R>> / 2>(acc);
  return acc[0];
}

}  // namespace SDI_ISA
}  // namespace sdi
