// Rounding to IEEE half precision, to nearest even, on host and device alike.
#pragma once

#include <cstring>

#include "base.h"

namespace sdi {
namespace SDI_ISA {

SDI_HD uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;
}

// The half's bits. Too large: infinity, from 65520 on; NaN stays one.
SDI_HD uint16_t half_bits(float x) {
  const uint32_t all = bits_of(x), sign = all & 0x80000000u, magnitude = all ^ sign;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536, the first that no half's exponent holds
    half = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {     // 2^-14: below, halves lie 2^-24 apart, as floats in
    const float value = x < 0.0f ? -x : x;  // [.5, 1) do; the sum rounds
    half = bits_of(value + 0.5f) - 0x3f000000u;
  } else {  // another exponent bias, 13 bits less, rounded
    const uint32_t odd = (magnitude >> 13) & 1u;
    half = (magnitude - 0x38000000u + 0xfffu + odd) >> 13;
  }
  return static_cast<uint16_t>(half | (sign >> 16));
}

SDI_HD uint16_t half_bits(double x) { return half_bits(static_cast<float>(x)); }  // as torch does

}  // namespace SDI_ISA
}  // namespace sdi
