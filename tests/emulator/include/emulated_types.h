// CUDA's vector types, with its alignments.
#pragma once

#define SDI_VECTORS(T, name, a2, a4)                                 \
  struct name##1 { T x; };                                           \
  struct alignas(a2) name##2 { T x, y; };                            \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(a4) name##4 { T x, y, z, w; };                      \
  inline name##1 make_##name##1(T x) { return {x}; }                 \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

SDI_VECTORS(signed char, char, 2, 4)
SDI_VECTORS(unsigned char, uchar, 2, 4)
SDI_VECTORS(short, short, 4, 8)
SDI_VECTORS(unsigned short, ushort, 4, 8)
SDI_VECTORS(int, int, 8, 16)
SDI_VECTORS(unsigned, uint, 8, 16)
SDI_VECTORS(long, long, 16, 16)
SDI_VECTORS(unsigned long, ulong, 16, 16)
SDI_VECTORS(long long, longlong, 16, 16)
SDI_VECTORS(unsigned long long, ulonglong, 16, 16)
SDI_VECTORS(float, float, 8, 16)
SDI_VECTORS(double, double, 16, 16)
#undef SDI_VECTORS

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
