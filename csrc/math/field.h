// The radiance field at one point (methods.md D, MLPs and Density). Twin: reference/field.py.
//
// e = encode((x + r) / 2r), h = W1 e, logit = w2 . relu(h) + blob(x), density = softplus(logit),
// albedo = sigmoid(V2 relu(V1 e)), q = W1^T (1[h > 0] * w2), g = J^T q / 2r + grad blob,
// normal = -g / |g|.
#pragma once

#include "../field.h"
#include "grid.h"
#include "mlp.h"
#include "normal.h"

namespace sdi {
namespace SDI_ISA {

// The MLPs' weights as dense() wants them, masked levels left out.
template <class T>
struct PackedWeights {
  int n_in;  // active_levels * F
  int n_in_padded;
  int hidden_padded;
  T* density_in;       // [n_in, hidden_padded]: W1 transposed
  T* density_in_back;  // [hidden_padded, n_in_padded]: W1
  T* density_out;      // [hidden_padded]
  T* color_in;         // [n_in, hidden_padded]
  T* color_in_back;    // [hidden_padded, n_in_padded]
  T* color_out;        // [3, hidden_padded]
};

// What one evaluation leaves behind for the backward.
template <class R>
struct FieldState {
  R x[3];  // scene units
  R u[3];  // in [0, 1]
  R features[kMaxInputs];
  R jacobian[3 * kMaxInputs];  // d feature / d u
  R hidden[kMaxHidden];        // density MLP, before ReLU
  R gated[kMaxHidden];         // 1[h > 0] * w2
  R slope[kMaxInputs];         // q = d logit / d feature
  R color_hidden[kMaxHidden];  // after ReLU
  R logit;
  R albedo[3];
  R normal[3];
  R length;  // |g|, floored
};

template <bool kWithJacobian, class R, class T>
SDI_HD void encode_all(const FieldSpec& spec, const T* table, FieldState<R>& s) {
  const T side = T(2.0 * spec.radius);
  for (int a = 0; a < 3; ++a) s.u[a] = (s.x[a] + T(spec.radius)) / side;
  const int n_features = spec.grid.n_features;
  for (int l = 0; l < spec.active_levels; ++l) {
    const int first = l * n_features;
    encode_level<kWithJacobian>(level_of(spec.grid, l, table), n_features, s.u, s.features + first,
                                s.jacobian + 3 * first);
  }
}

template <class R, class T>
SDI_HD void density_mlp(const PackedWeights<T>& w, FieldState<R>& s) {
  dense(w.density_in, w.n_in, w.hidden_padded, s.features, s.hidden);
  for (int h = 0; h < w.hidden_padded; ++h) s.gated[h] = relu(s.hidden[h]);
  output_layer<1>(w.density_out, w.hidden_padded, s.gated, &s.logit);
}

// Density alone.
template <class R, class T>
SDI_HD R evaluate_density(const FieldSpec& spec, const T* table, const PackedWeights<T>& w,
                          FieldState<R>& s) {
  encode_all<false>(spec, table, s);
  density_mlp(w, s);
  R unused[3] = {};
  return softplus(s.logit + add_blob(s.x, spec.blob_scale, spec.blob_std, unused));
}

// Everything; s.logit ends with the blob in it.
template <class R, class T>
SDI_HD void evaluate_field(const FieldSpec& spec, const T* table, const PackedWeights<T>& w,
                           FieldState<R>& s) {
  encode_all<true>(spec, table, s);
  density_mlp(w, s);
  for (int h = 0; h < w.hidden_padded; ++h) {
    s.gated[h] = gate(s.hidden[h], R{} + w.density_out[h]);
  }
  dense(w.density_in_back, w.hidden_padded, w.n_in_padded, s.gated, s.slope);
  R g[3] = {};
  for (int i = 0; i < w.n_in; ++i) {
    for (int a = 0; a < 3; ++a) g[a] += s.slope[i] * s.jacobian[3 * i + a];
  }
  const T to_world = T(1) / T(2.0 * spec.radius);
  for (int a = 0; a < 3; ++a) g[a] *= to_world;
  s.logit += add_blob(s.x, spec.blob_scale, spec.blob_std, g);
  s.length = normal_from_gradient(g, s.normal);

  dense(w.color_in, w.n_in, w.hidden_padded, s.features, s.color_hidden);
  for (int h = 0; h < w.hidden_padded; ++h) s.color_hidden[h] = relu(s.color_hidden[h]);
  output_layer<3>(w.color_out, w.hidden_padded, s.color_hidden, s.albedo);
  for (int c = 0; c < 3; ++c) s.albedo[c] = sigmoid(s.albedo[c]);
}

// Cotangents of one evaluation, turned into what the scatter and the weight gradients need.
template <class R>
struct FieldCotangent {
  R density, albedo[3], normal[3];  // in
  R p[3];                           // out: cotangent of J^T q, i.e. direction of the slope term
  R logit;                          // out
  R color_logits[3];                // out
  R combined[kMaxInputs];           // out: logit * e + J p, W1's second factor
  R color_gate[kMaxHidden];         // out: cotangent of V1 e
  R features[kMaxInputs];           // out: cotangent of e through density and colour
};

template <class R, class T>
SDI_HD void backpropagate(const FieldSpec& spec, const PackedWeights<T>& w, const FieldState<R>& s,
                          FieldCotangent<R>& c) {
  normal_backward(s.normal, s.length, c.normal, c.p);
  const T to_unit = T(1) / T(2.0 * spec.radius);
  for (int a = 0; a < 3; ++a) c.p[a] *= to_unit;
  c.logit = c.density * softplus_slope(s.logit);
  for (int i = 0; i < w.n_in; ++i) {
    R along = c.logit * s.features[i];
    for (int a = 0; a < 3; ++a) along += s.jacobian[3 * i + a] * c.p[a];
    c.combined[i] = along;
  }
  for (int k = 0; k < 3; ++k) {
    c.color_logits[k] = c.albedo[k] * s.albedo[k] * (T(1) - s.albedo[k]);
  }
  for (int h = 0; h < w.hidden_padded; ++h) {
    R sum = c.color_logits[0] * w.color_out[h];
    sum += c.color_logits[1] * w.color_out[w.hidden_padded + h];
    sum += c.color_logits[2] * w.color_out[2 * w.hidden_padded + h];
    c.color_gate[h] = gate(s.color_hidden[h], sum);
  }
  dense(w.color_in_back, w.hidden_padded, w.n_in_padded, c.color_gate, c.features);
  for (int i = 0; i < w.n_in; ++i) c.features[i] += c.logit * s.slope[i];
}

}  // namespace SDI_ISA
}  // namespace sdi
