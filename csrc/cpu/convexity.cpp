// The convexity loss on the CPU, forward and backward (methods.md D, Losses; G6).
// Twin: sdi_fast/reference/convexity.py. Maths: math/convexity.h.
//
// 64 map points a view: serial. The backward recomputes the map. Precision: double inside, rounded
// to T once at the end. Bytes: 256 pixels a view, read and, backward, written, after the zero fill
// of the whole gradient.
#include "../math/convexity.h"

#include <cstring>

#include "dispatch.h"

namespace sdi {
namespace SDI_ISA {
namespace {

template <class T>
void fill_map(const NormalView<T>& view, NormalMap& map) {
  for (int r = 0; r < kMapSide; ++r) {
    for (int c = 0; c < kMapSide; ++c) sample_map(view, r, c, map[r][c]);
  }
}

template <class T>
void backward_view(const ConvexityArgs<T>& a, int64_t b, double scale) {
  const NormalView<T> view = view_of(a, b);
  T* grad_normals = a.grad_normals + 3 * a.height * a.width * b;
  T* grad_opacity = a.opacity ? a.grad_opacity + a.height * a.width * b : nullptr;
  NormalMap map, grad;
  fill_map(view, map);
  for (int r = 0; r < kMapSide; ++r) {
    for (int c = 0; c < kMapSide; ++c) convexity_gradient(map, r, c, scale, grad[r][c]);
  }
  for (int down = 0; down < kTaps; ++down) {  // taps that name the same pixel write the same twice
    const int64_t y = pixel_of_tap(down, a.height);
    double row[kMapSide][2];
    for (int c = 0; c < kMapSide; ++c) {
      for (int k = 0; k < 2; ++k) row[c][k] = row_gradient(grad, y, a.height, c, k);
    }
    for (int along = 0; along < kTaps; ++along) {
      const int64_t x = pixel_of_tap(along, a.width);
      write_pixel_gradient(view, row, y, x, grad_normals, grad_opacity);
    }
  }
}

}  // namespace

template <class T>
int launch_convexity_fwd(const ConvexityArgs<T>& a, int) {
  double sum = 0;
  for (int64_t b = 0; b < a.batch; ++b) {
    NormalMap map;
    fill_map(view_of(a, b), map);
    for (int r = 0; r < kMapSide; ++r) {
      for (int c = 0; c < kMapSide; ++c) sum += convexity_at(map, r, c);
    }
  }
  *a.loss = static_cast<T>(-sum / static_cast<double>(a.batch * kMapPairs));
  return kOk;
}

template <class T>
int launch_convexity_bwd(const ConvexityArgs<T>& a, int) {
  const int64_t pixels = a.batch * a.height * a.width;
  std::memset(a.grad_normals, 0, 3 * pixels * sizeof(T));
  if (a.opacity) std::memset(a.grad_opacity, 0, pixels * sizeof(T));
  const double scale = -static_cast<double>(*a.grad_loss) / (a.batch * kMapPairs);
  for (int64_t b = 0; b < a.batch; ++b) backward_view(a, b, scale);
  return kOk;
}

SDI_INSTANTIATE(convexity_fwd, ConvexityArgs)
SDI_INSTANTIATE(convexity_bwd, ConvexityArgs)

}  // namespace SDI_ISA
}  // namespace sdi
