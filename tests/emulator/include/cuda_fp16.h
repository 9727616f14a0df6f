// half and half2 on the CPU: the compiler's half-precision type, rounded to nearest even after every operation.
#pragma once

#include "cuda_runtime.h"

#if defined(__aarch64__)
using SdiHalfBits = __fp16;
#else
using SdiHalfBits = _Float16;
#endif

struct alignas(2) __half {
  SdiHalfBits bits;
  __half() = default;
  __half(float x) : bits(static_cast<SdiHalfBits>(x)) {}
  __half(double x) : bits(static_cast<SdiHalfBits>(x)) {}
  __half(int x) : bits(static_cast<SdiHalfBits>(static_cast<float>(x))) {}
  operator float() const { return static_cast<float>(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half a, __half b) : x(a), y(b) {}
};
using half = __half;
using half2 = __half2;

namespace emulator {
template <>
struct is_shuffled<__half> : std::true_type {};
template <>
struct is_shuffled<__half2> : std::true_type {};

// Products of two halves are exact in float, sums of such in double but for far exponents.
inline __half half_of(double x) { return __half(x); }
template <class F>
__half2 each(__half2 a, F f) {
  return {f(a.x), f(a.y)};
}
template <class F>
__half2 each(__half2 a, __half2 b, F f) {
  return {f(a.x, b.x), f(a.y, b.y)};
}
}  // namespace emulator

inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __double2half(double x) { return __half(x); }
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __int2half_rn(int x) { return __half(x); }
inline __half __ushort_as_half(unsigned short x) { return emulator::bit_cast<__half>(x); }
inline __half __short_as_half(short x) { return emulator::bit_cast<__half>(x); }
inline unsigned short __half_as_ushort(__half x) { return emulator::bit_cast<unsigned short>(x); }
inline short __half_as_short(__half x) { return emulator::bit_cast<short>(x); }

inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
inline __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
inline float2 __half22float2(__half2 a) { return make_float2(a.x, a.y); }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline float __low2float(__half2 a) { return a.x; }
inline float __high2float(__half2 a) { return a.y; }
inline __half2 __low2half2(__half2 a) { return {a.x, a.x}; }
inline __half2 __high2half2(__half2 a) { return {a.y, a.y}; }
inline __half2 __lows2half2(__half2 a, __half2 b) { return {a.x, b.x}; }
inline __half2 __highs2half2(__half2 a, __half2 b) { return {a.y, b.y}; }
inline __half2 __lowhigh2highlow(__half2 a) { return {a.y, a.x}; }

#define SDI_HALF_2(name, expression)                                                 \
  inline __half __h##name(__half a_, __half b_) {                                    \
    const float a = a_, b = b_;                                                      \
    return __half(expression);                                                       \
  }                                                                                  \
  inline __half2 __h##name##2(__half2 a, __half2 b) {                                \
    return emulator::each(a, b, [](__half x, __half y) { return __h##name(x, y); }); \
  }
SDI_HALF_2(add, a + b)
SDI_HALF_2(sub, a - b)
SDI_HALF_2(mul, a* b)
SDI_HALF_2(max, fmaxf(a, b))
SDI_HALF_2(min, fminf(a, b))
#undef SDI_HALF_2
inline __half2 __h2div(__half2 a, __half2 b) {
  return {__half(float(a.x) / float(b.x)), __half(float(a.y) / float(b.y))};
}
inline __half __hdiv(__half a, __half b) { return __half(float(a) / float(b)); }
inline __half __hneg(__half a) {
  return __ushort_as_half(static_cast<unsigned short>(__half_as_ushort(a) ^ 0x8000));
}
inline __half __habs(__half a) {
  return __ushort_as_half(static_cast<unsigned short>(__half_as_ushort(a) & 0x7fff));
}
inline __half2 __hneg2(__half2 a) { return emulator::each(a, __hneg); }
inline __half2 __habs2(__half2 a) { return emulator::each(a, __habs); }
inline __half __hfma(__half a, __half b, __half c) {
  return __half(double(float(a)) * double(float(b)) + double(float(c)));
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};
}
inline __half __hfma_relu(__half a, __half b, __half c) {
  const __half value = __hfma(a, b, c);
  return float(value) > 0.0f ? value : __half(0.0f);
}
inline __half2 __hfma2_relu(__half2 a, __half2 b, __half2 c) {
  return {__hfma_relu(a.x, b.x, c.x), __hfma_relu(a.y, b.y, c.y)};
}

#define SDI_HALF_COMPARE(name, op)                                           \
  inline bool __h##name(__half a, __half b) { return float(a) op float(b); } \
  inline __half2 __h##name##2(__half2 a, __half2 b) {                        \
    return {__half(float(a.x) op float(b.x) ? 1.0f : 0.0f),                  \
            __half(float(a.y) op float(b.y) ? 1.0f : 0.0f)};                 \
  }
SDI_HALF_COMPARE(eq, ==)
SDI_HALF_COMPARE(ne, !=)
SDI_HALF_COMPARE(lt, <)
SDI_HALF_COMPARE(le, <=)
SDI_HALF_COMPARE(gt, >)
SDI_HALF_COMPARE(ge, >=)
#undef SDI_HALF_COMPARE
inline bool __hisnan(__half a) { return float(a) != float(a); }

#define SDI_HALF_OPERATOR(op, name)                                    \
  inline __half operator op(__half a, __half b) { return name(a, b); } \
  inline __half& operator op## = (__half & a, __half b) { return a = name(a, b); }
SDI_HALF_OPERATOR(+, __hadd)
SDI_HALF_OPERATOR(-, __hsub)
SDI_HALF_OPERATOR(*, __hmul)
SDI_HALF_OPERATOR(/, __hdiv)
#undef SDI_HALF_OPERATOR
inline __half operator-(__half a) { return __hneg(a); }
#define SDI_HALF2_OPERATOR(op, name)                                      \
  inline __half2 operator op(__half2 a, __half2 b) { return name(a, b); } \
  inline __half2& operator op## = (__half2 & a, __half2 b) { return a = name(a, b); }
SDI_HALF2_OPERATOR(+, __hadd2)
SDI_HALF2_OPERATOR(-, __hsub2)
SDI_HALF2_OPERATOR(*, __hmul2)
SDI_HALF2_OPERATOR(/, __h2div)
#undef SDI_HALF2_OPERATOR

inline __half atomicAdd(__half* p, __half value, SDI_HERE) {
  return emulator::exchange(p, at, [value](__half old) { return __hadd(old, value); });
}
inline __half2 atomicAdd(__half2* p, __half2 value, SDI_HERE) {
  return emulator::exchange(p, at, [value](__half2 old) { return __hadd2(old, value); });
}
