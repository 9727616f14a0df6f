// The convexity loss on the CPU, forward and backward (methods.md D, Losses).
// Twin: sdi_fast/reference/convexity.py.
//
// 64 map points a view: serial. The backward recomputes the map. Precision: T, the sum over views
// in double. Bytes: 256 pixels' first two components a view, read (and, backward, written).
#include "../math/convexity.h"

#include "dispatch.h"

namespace sdi {
namespace SDI_ISA {
namespace {

constexpr int kPairs = kMapSide * (kMapSide - 1);  // of neighbours, a direction and map

}  // namespace

template <class T>
int launch_convexity_fwd(const ConvexityArgs<T>& a, int) {
  const int64_t size = a.height * a.width * 3;
  double sum = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    sum += convexity_sum(a.normals + b * size, a.height, a.width);
  }
  *a.loss = static_cast<T>(-sum / static_cast<double>(a.batch * kPairs));
  return kOk;
}

template <class T>
int launch_convexity_bwd(const ConvexityArgs<T>& a, int) {
  const int64_t size = a.height * a.width * 3;
  const T scale = -*a.grad_loss / static_cast<T>(a.batch * kPairs);
  for (int64_t b = 0; b < a.batch; ++b) {
    convexity_backward(a.normals + b * size, a.height, a.width, scale, a.grad_normals + b * size);
  }
  return kOk;
}

SDI_INSTANTIATE(convexity_fwd, ConvexityArgs)
SDI_INSTANTIATE(convexity_bwd, ConvexityArgs)

}  // namespace SDI_ISA
}  // namespace sdi
