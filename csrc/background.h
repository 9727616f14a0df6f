// Launch API of the environment background. Twin: sdi_fast/reference/background.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

constexpr int kBackgroundWeights = 16 * 9 + 16 * 16 + 3 * 16;  // w1, w2, w3 one after another
constexpr int kBackgroundMaxBlocks = 264;  // of the CUDA backward: rows of its workspace

template <class T>
struct BackgroundArgs {
  const T* directions;  // [n, 3], unit length
  const T* w1;          // [16, 9]
  const T* w2;          // [16, 16]
  const T* w3;          // [3, 16]
  T* rgb;               // [n, 3], in (0, 1); forward only
  const T* grad_rgb;    // [n, 3]; backward only
  T* grad_weights;      // [kBackgroundWeights]: w1, w2, w3; backward only
  T* workspace;         // [kBackgroundMaxBlocks, kBackgroundWeights]; CUDA backward only
  int64_t n;
};

}  // namespace sdi
