// Scalar building blocks of the per-sample maths, for host and device.
//
// The maths is templated on R, the type of one value: float or double on a GPU, a pack of them on a
// CPU (cpu/pack.h), with T the type of one number in memory. What differs between the two has
// overloads here and there: Scalar, Index, to_index, to_real, exp_of, log1p_of, sqrt_of, gather.
//
// Every instruction set has a namespace of its own (SDI_ISA), so that the linker never merges a
// function compiled for AVX-512 with its baseline twin.
#pragma once

#include <cmath>
#include <cstdint>

#ifndef SDI_ISA
#define SDI_ISA device
#endif

#ifdef __CUDACC__
#define SDI_HD __host__ __device__ __forceinline__
#else
#define SDI_HD inline __attribute__((always_inline))
#endif

namespace sdi {
namespace SDI_ISA {

template <class R>
struct Traits;

template <>
struct Traits<float> {
  using Scalar = float;
  using Index = uint32_t;
};

template <>
struct Traits<double> {
  using Scalar = double;
  using Index = uint32_t;
};

template <class R>
using ScalarOf = typename Traits<R>::Scalar;
template <class R>
using IndexOf = typename Traits<R>::Index;

SDI_HD uint32_t to_index(float x) { return static_cast<uint32_t>(x); }
SDI_HD uint32_t to_index(double x) { return static_cast<uint32_t>(x); }
SDI_HD void to_real(uint32_t i, float& out) { out = static_cast<float>(i); }
SDI_HD void to_real(uint32_t i, double& out) { out = static_cast<double>(i); }

SDI_HD float exp_of(float x) { return expf(x); }
SDI_HD double exp_of(double x) { return exp(x); }
SDI_HD float expm1_of(float x) { return expm1f(x); }
SDI_HD double expm1_of(double x) { return expm1(x); }
SDI_HD float log1p_of(float x) { return log1pf(x); }
SDI_HD double log1p_of(double x) { return log1p(x); }
SDI_HD float floor_of(float x) { return floorf(x); }
SDI_HD double floor_of(double x) { return floor(x); }
SDI_HD float ceil_of(float x) { return ceilf(x); }
SDI_HD double ceil_of(double x) { return ceil(x); }
SDI_HD float sqrt_of(float x) { return sqrtf(x); }
SDI_HD double sqrt_of(double x) { return sqrt(x); }

// a * b and a + b, each rounded by itself: nvcc would fuse them into one operation. For the CPU the
// build sees to it (CMakeLists.txt, march.cpp and prune.cpp), for packs too.
#ifdef __CUDA_ARCH__
SDI_HD float mul_exact(float a, float b) { return __fmul_rn(a, b); }
SDI_HD double mul_exact(double a, double b) { return __dmul_rn(a, b); }
SDI_HD float add_exact(float a, float b) { return __fadd_rn(a, b); }
SDI_HD double add_exact(double a, double b) { return __dadd_rn(a, b); }
#else
template <class A, class B>
SDI_HD auto mul_exact(A a, B b) {
  return a * b;
}
template <class A, class B>
SDI_HD auto add_exact(A a, B b) {
  return a + b;
}
#endif

template <class R>
SDI_HD R max_of(R a, R b) {
  return a > b ? a : b;
}

template <class R>
SDI_HD R min_of(R a, R b) {
  return a < b ? a : b;
}

// table[index * stride + f], and its right neighbour
template <class T>
SDI_HD T gather(const T* table, uint32_t index, int stride, int f) {
  return table[static_cast<int64_t>(index) * stride + f];
}

template <class T>
SDI_HD void gather_pair(const T* table, uint32_t index, int stride, int f, T& a, T& b) {
  const T* entry = table + static_cast<int64_t>(index) * stride + f;
  a = entry[0];
  b = entry[1];
}

}  // namespace SDI_ISA
}  // namespace sdi
