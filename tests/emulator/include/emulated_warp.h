// csrc/cuda/warp.h's wrappers of PTX, on the CPU: fragments laid out as the PTX ISA has them, products
// exact in f32, sums in f32 in the order of k. All but the red_add are for full warps.
#pragma once

#include "cuda_fp16.h"

namespace sdi {
namespace cuda {

namespace emulated {

constexpr unsigned kAll = 0xffffffffu;

struct Words {
  uint32_t w[4];
};
struct MmaIn {
  float c[4];
  uint32_t a[4], b[2];
};
struct MmaOut {
  float c[4];
};

inline float half_at(const uint32_t* words, int i) {  // i-th of consecutive halves, low first
  return __ushort_as_half(static_cast<unsigned short>(words[i / 2] >> (16 * (i % 2))));
}

// ldmatrix of `count` 8x8 matrices of 16-bit elements; lane i gives row i % 8 of matrix i / 8.
template <int count>
Words load_matrices(const char* primitive, const void* row, bool transposed,
                    emulator::Location at) {
  const int lane = emulator::lane_id();
  if (lane < 8 * count && reinterpret_cast<uintptr_t>(row) % 16) {
    emulator::fail(at, "%s: a row's address is no multiple of 16", primitive);
  }
  return emulator::collective<Words>(primitive, kAll, at, row, [transposed](const auto& lanes) {
    for (int m = 0; m < count; ++m) {
      uint16_t matrix[8][8];
      for (int r = 0; r < 8; ++r) std::memcpy(matrix[r], lanes.in(8 * m + r), 16);
      for (int to = 0; to < 32; ++to) {
        const int r = to / 4, c = 2 * (to % 4);
        const uint32_t low = transposed ? matrix[c][r] : matrix[r][c];
        const uint32_t high = transposed ? matrix[c + 1][r] : matrix[r][c + 1];
        lanes.out(to).w[m] = low | high << 16;
      }
    }
  });
}

inline void check_alignment(const char* primitive, const float* p, unsigned bytes,
                            emulator::Location at) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    emulator::fail(at, "%s: the address is no multiple of %u", primitive, bytes);
  }
}

}  // namespace emulated

// C[16, 8] f32 += A[16, 16] f16 row-major . B[16, 8] f16, a column's elements together
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SDI_HERE) {
  using namespace emulated;
  const MmaIn in{{c[0], c[1], c[2], c[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  const MmaOut out = emulator::collective<MmaOut>("mma_16816", kAll, at, in, [](const auto& lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const MmaIn& given = lanes.in(lane);
      for (int i = 0; i < 8; ++i) {  // a0: (g, 2t), a1: (g + 8, 2t), a2, a3: 8 columns on
        left[g + 8 * (i / 2 % 2)][2 * t + i % 2 + 8 * (i / 4)] = half_at(given.a, i);
      }
      for (int i = 0; i < 4; ++i) right[2 * t + i % 2 + 8 * (i / 2)][g] = half_at(given.b, i);
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = lanes.in(lane).c[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        lanes.out(lane).c[i] = sum;
      }
    }
  });
  for (int i = 0; i < 4; ++i) c[i] = out.c[i];
}
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SDI_HERE) {
  mma_16816(c, a, b[0], b[1], at);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SDI_HERE) {
  const emulated::Words out = emulated::load_matrices<4>("ldmatrix_x4", row, false, at);
  std::memcpy(r, out.w, sizeof r);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SDI_HERE) {
  const emulated::Words out = emulated::load_matrices<4>("ldmatrix_x4_trans", row, true, at);
  std::memcpy(r, out.w, sizeof r);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, SDI_HERE) {
  const emulated::Words out = emulated::load_matrices<2>("ldmatrix_x2", row, false, at);
  std::memcpy(r, out.w, sizeof r);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, SDI_HERE) {
  const emulated::Words out = emulated::load_matrices<2>("ldmatrix_x2_trans", row, true, at);
  std::memcpy(r, out.w, sizeof r);
}

// The transpose of an 8x8 matrix of 16-bit elements: lane l holds row l / 4, columns 2 (l % 4) + 0, 1.
inline uint32_t movmatrix_trans(uint32_t x, SDI_HERE) {
  return emulator::collective<uint32_t>(
      "movmatrix_trans", emulated::kAll, at, x, [](const auto& lanes) {
        uint16_t matrix[8][8];
        for (int lane = 0; lane < 32; ++lane) {
          matrix[lane / 4][2 * (lane % 4)] = static_cast<uint16_t>(lanes.in(lane));
          matrix[lane / 4][2 * (lane % 4) + 1] = static_cast<uint16_t>(lanes.in(lane) >> 16);
        }
        for (int lane = 0; lane < 32; ++lane) {
          const int r = lane / 4, c = 2 * (lane % 4);
          lanes.out(lane) = matrix[c][r] | static_cast<uint32_t>(matrix[c + 1][r]) << 16;
        }
      });
}

inline void red_add_v2(float* p, float x, float y, SDI_HERE) {
  emulated::check_alignment("red_add_v2", p, 8, at);
  p[0] += x;
  p[1] += y;
}
inline void red_add_v4(float* p, float x, float y, float z, float w, SDI_HERE) {
  emulated::check_alignment("red_add_v4", p, 16, at);
  p[0] += x;
  p[1] += y;
  p[2] += z;
  p[3] += w;
}

}  // namespace cuda
}  // namespace sdi
