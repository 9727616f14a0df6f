// Launch API of the convexity loss. Twin: sdi_fast/reference/convexity.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

template <class T>
struct ConvexityArgs {
  const T* normals;    // [batch, height, width, 3]
  T* loss;             // [1]; forward only
  const T* grad_loss;  // [1]; backward only
  T* grad_normals;     // [batch, height, width, 3], zeroed by the caller; backward only
  int64_t batch;
  int64_t height;
  int64_t width;
};

}  // namespace sdi
