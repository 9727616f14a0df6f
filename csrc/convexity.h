// Launch API of the convexity loss. Twin: sdi_fast/reference/convexity.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

template <class T>
struct ConvexityArgs {
  const T* normals;    // [batch, height, width, 3]
  const T* opacity;    // [batch, height, width]; null: the normals are taken as they stand
  const T* c2w;        // [batch, 3, 4], columns right, up, toward the viewer; with opacity only
  T* loss;             // [1]; forward only
  const T* grad_loss;  // [1]; backward only
  T* grad_normals;     // [batch, height, width, 3], written whole; backward only
  T* grad_opacity;     // [batch, height, width], written whole; backward with opacity only
  double* workspace;   // [batch], the views' sums; CUDA forward only
  int64_t batch;
  int64_t height;
  int64_t width;
};

}  // namespace sdi
