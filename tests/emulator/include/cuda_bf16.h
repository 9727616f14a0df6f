// bfloat16 on the CPU: storage and conversions, to nearest even.
#pragma once

#include "cuda_runtime.h"

struct alignas(2) __nv_bfloat16 {
  unsigned short bits;
  __nv_bfloat16() = default;
  __nv_bfloat16(float x) {
    const unsigned all = __float_as_uint(x);
    const unsigned rounded = all + 0x7fffu + (all >> 16 & 1u);
    bits = static_cast<unsigned short>(x != x ? 0x7fffu : rounded >> 16);
  }
  operator float() const { return __uint_as_float(static_cast<unsigned>(bits) << 16); }
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

namespace emulator {
template <>
struct is_shuffled<__nv_bfloat16> : std::true_type {};
template <>
struct is_shuffled<__nv_bfloat162> : std::true_type {};
}  // namespace emulator

inline __nv_bfloat16 __float2bfloat16(float x) { return __nv_bfloat16(x); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__nv_bfloat16(a), __nv_bfloat16(b)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return make_float2(a.x, a.y); }
