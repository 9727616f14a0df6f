// Philox4x32-10 and Box-Muller: normals of a counter. Twin: sdi_fast/reference/philox.py.
#pragma once

#include "base.h"

namespace sdi {
namespace SDI_ISA {

SDI_HD void philox_round(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  const uint64_t even = static_cast<uint64_t>(0xD2511F53u) * c[0];
  const uint64_t odd = static_cast<uint64_t>(0xCD9E8D57u) * c[2];
  c[0] = static_cast<uint32_t>(odd >> 32) ^ c[1] ^ k0;
  c[1] = static_cast<uint32_t>(odd);
  c[2] = static_cast<uint32_t>(even >> 32) ^ c[3] ^ k1;
  c[3] = static_cast<uint32_t>(even);
}

SDI_HD void philox(uint32_t (&c)[4], uint64_t seed) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int i = 0; i < 10; ++i) {
    philox_round(c, k0, k1);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// In (0, 1]
SDI_HD float uniform_of(uint32_t word) {
  return static_cast<float>(word) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
}

// Four normals of group `group` of sample `sample` in draw `draw` of the stream.
SDI_HD void philox_normals(uint64_t seed, uint64_t draw, uint32_t sample, uint32_t group,
                           float (&normals)[4]) {
  uint32_t c[4] = {group, sample, static_cast<uint32_t>(draw), static_cast<uint32_t>(draw >> 32)};
  philox(c, seed);
  for (int i = 0; i < 4; i += 2) {
    const float radius = sqrtf(-2.0f * logf(uniform_of(c[i])));
    const float angle = 6.283185307179586f * uniform_of(c[i + 1]);
    normals[i] = radius * cosf(angle);
    normals[i + 1] = radius * sinf(angle);
  }
}

}  // namespace SDI_ISA
}  // namespace sdi
