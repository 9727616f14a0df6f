// A multiresolution hash grid's layout, in tiny-cuda-nn's order (sdi_fast/types.py HashGridSpec).
#pragma once

#include <cstdint>

namespace sdi {

constexpr int kMaxLevels = 32;
constexpr int kMaxInputs = 128;  // n_levels * n_features
constexpr int kMaxHidden = 256;

struct GridSpec {
  int32_t n_levels;
  int32_t n_features;              // numbers an entry
  double scale[kMaxLevels];        // position = u * scale + 0.5, u in [0, 1]
  int64_t resolution[kMaxLevels];  // grid points a side
  int64_t offset[kMaxLevels + 1];  // first entry of each level; the total at the end
  int32_t is_dense[kMaxLevels];    // else hashed, and the level's size is a power of two
};

}  // namespace sdi
