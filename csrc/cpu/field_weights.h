// The field's weights packed for one launch.
#pragma once

#include "../math/field.h"
#include "parallel.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
class WeightStore {
 public:
  explicit WeightStore(const FieldSpec& spec)
      : n_in_(spec.active_levels * spec.grid.n_features),
        n_in_padded_(padded(n_in_)),
        hidden_padded_(padded(spec.hidden)),
        memory_(2 * (n_in_ + n_in_padded_) * hidden_padded_ + 4 * hidden_padded_) {}

  bool ok() const { return memory_.ok(); }

  PackedWeights<T> pack(const FieldSpec& spec, const FieldParams<T>& params) const {
    PackedWeights<T> w;
    w.n_in = n_in_;
    w.n_in_padded = n_in_padded_;
    w.hidden_padded = hidden_padded_;
    T* next = memory_.get();
    const auto take = [&next](int64_t n) {
      T* here = next;
      for (int64_t i = 0; i < n; ++i) here[i] = T(0);
      next += n;
      return here;
    };
    w.density_in = take(n_in_ * hidden_padded_);
    w.density_in_back = take(n_in_padded_ * hidden_padded_);
    w.color_in = take(n_in_ * hidden_padded_);
    w.color_in_back = take(n_in_padded_ * hidden_padded_);
    w.density_out = take(hidden_padded_);
    w.color_out = take(3 * hidden_padded_);
    const int width = spec.grid.n_levels * spec.grid.n_features;
    for (int h = 0; h < spec.hidden; ++h) {
      for (int i = 0; i < n_in_; ++i) {
        w.density_in[i * hidden_padded_ + h] = params.density_w1[h * width + i];
        w.density_in_back[h * n_in_padded_ + i] = params.density_w1[h * width + i];
        w.color_in[i * hidden_padded_ + h] = params.color_w1[h * width + i];
        w.color_in_back[h * n_in_padded_ + i] = params.color_w1[h * width + i];
      }
      w.density_out[h] = params.density_w2[h];
      for (int k = 0; k < 3; ++k) {
        w.color_out[k * hidden_padded_ + h] = params.color_w2[k * spec.hidden + h];
      }
    }
    return w;
  }

 private:
  int n_in_;
  int n_in_padded_;
  int hidden_padded_;
  Buffer<T> memory_;
};

}  // namespace SDI_ISA
}  // namespace sdi
