// Device functions of one thread: intrinsics of arithmetic, bits and loads.
//
// Fast approximations (__expf, __fdividef, rsqrtf, ...) are exact to rounding here.
#pragma once

// In the global namespace, as CUDA has them.
#define SDI_MIN_MAX(A, B, T)                              \
  inline T min(A a, B b) {                                \
    const T x = static_cast<T>(a), y = static_cast<T>(b); \
    return y < x ? y : x;                                 \
  }                                                       \
  inline T max(A a, B b) {                                \
    const T x = static_cast<T>(a), y = static_cast<T>(b); \
    return x < y ? y : x;                                 \
  }
SDI_MIN_MAX(int, int, int)
SDI_MIN_MAX(unsigned, unsigned, unsigned)
SDI_MIN_MAX(int, unsigned, unsigned)
SDI_MIN_MAX(unsigned, int, unsigned)
SDI_MIN_MAX(long, long, long)
SDI_MIN_MAX(unsigned long, unsigned long, unsigned long)
SDI_MIN_MAX(long, unsigned long, unsigned long)
SDI_MIN_MAX(unsigned long, long, unsigned long)
SDI_MIN_MAX(long long, long long, long long)
SDI_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
SDI_MIN_MAX(long long, unsigned long long, unsigned long long)
SDI_MIN_MAX(unsigned long long, long long, unsigned long long)
#undef SDI_MIN_MAX
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

// Rounded, never contracted: a volatile between an operation and whatever uses it.
#define SDI_ROUNDED(name, T, expression)   \
  inline T name(T a, T b) {                \
    const volatile T value = (expression); \
    return value;                          \
  }
SDI_ROUNDED(__fadd_rn, float, a + b)
SDI_ROUNDED(__fsub_rn, float, a - b)
SDI_ROUNDED(__fmul_rn, float, a* b)
SDI_ROUNDED(__fdiv_rn, float, a / b)
SDI_ROUNDED(__fdividef, float, a / b)
SDI_ROUNDED(__dadd_rn, double, a + b)
SDI_ROUNDED(__dsub_rn, double, a - b)
SDI_ROUNDED(__dmul_rn, double, a* b)
SDI_ROUNDED(__ddiv_rn, double, a / b)
#undef SDI_ROUNDED
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline double __dsqrt_rn(double x) { return sqrt(x); }
inline float __frsqrt_rn(float x) { return static_cast<float>(1.0 / sqrt(double(x))); }
inline float rsqrtf(float x) { return __frsqrt_rn(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.0f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __log10f(float x) { return log10f(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __tanf(float x) { return tanf(x); }
inline void __sincosf(float x, float* s, float* c) {
  *s = sinf(x);
  *c = cosf(x);
}
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float norm3df(float x, float y, float z) { return sqrtf(x * x + y * y + z * z); }
inline float rnorm3df(float x, float y, float z) { return rsqrtf(x * x + y * y + z * z); }

namespace emulator {
template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}
}  // namespace emulator

inline float __int_as_float(int x) { return emulator::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return emulator::bit_cast<float>(x); }
inline int __float_as_int(float x) { return emulator::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return emulator::bit_cast<unsigned>(x); }
inline double __longlong_as_double(long long x) { return emulator::bit_cast<double>(x); }
inline long long __double_as_longlong(double x) { return emulator::bit_cast<long long>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(rintf(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(floorf(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(ceilf(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline unsigned __float2uint_rn(float x) { return static_cast<unsigned>(rintf(x)); }
inline unsigned __float2uint_rd(float x) { return static_cast<unsigned>(floorf(x)); }
inline unsigned __float2uint_rz(float x) { return static_cast<unsigned>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline long long __float2ll_rn(float x) {  // saturates; NaN gives the least
  if (!(x >= -0x1p63f)) return INT64_MIN;
  return x >= 0x1p63f ? INT64_MAX : static_cast<long long>(rintf(x));
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) {
  return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64;
}
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<long long>(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  shift &= 31;
  return shift ? high << shift | low >> (32 - shift) : high;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  shift &= 31;
  return shift ? high << (32 - shift) | low >> shift : low;
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = static_cast<unsigned long long>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned s = selector >> (4 * i) & 0xf;
    unsigned byte = static_cast<unsigned>(both >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= byte << (8 * i);
  }
  return result;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, const T& value) {
  *p = value;
}
template <class T>
void __stcg(T* p, const T& value) {
  *p = value;
}
