// Checks of index arrays that come from outside: a bad one is an error, not a stray read.
#pragma once

#include <cstdint>

#include "../math/scalar.h"

namespace sdi {
namespace SDI_ISA {

// packed_info [n_rays, 2] (first, count): every range inside [0, n)
inline bool ranges_fit(const int64_t* packed_info, int64_t n_rays, int64_t n) {
  int64_t n_bad = 0;
  for (int64_t ray = 0; ray < n_rays; ++ray) {
    const int64_t first = packed_info[2 * ray], count = packed_info[2 * ray + 1];
    n_bad += first < 0 || count < 0 || first > n || count > n - first;
  }
  return n_bad == 0;
}

inline bool indices_fit(const int64_t* indices, int64_t n, int64_t limit) {
  int64_t n_bad = 0;
  for (int64_t i = 0; i < n; ++i) n_bad += indices[i] < 0 || indices[i] >= limit;
  return n_bad == 0;
}

}  // namespace SDI_ISA
}  // namespace sdi
