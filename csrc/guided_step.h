// Launch API of the guided DDIM step. Twin: sdi_fast/reference/guided_step.py.
#pragma once

#include <cstdint>

#include "status.h"

namespace sdi {

enum GuidedStepFlag : int {
  kChannelsLast = 1,     // outputs are [.., pixels, channels]
  kPaperConvention = 2,  // methods.md B3; of two conditions only
  kVPrediction = 4,
  kHalfOutputs = 8,   // outputs are f16; CUDA only
  kBf16Outputs = 16,  // outputs are bf16; CUDA only
};

// A time step beyond n_levels - 2 counts as the last one, a negative one as the clean end.
template <class T>
struct GuidedStepArgs {
  const void* outputs;     // [n_conditions, batch, channels, pixels], of T or as the flags say
  const T* x;              // [batch, channels, pixels]
  const float* levels;     // [n_levels], a(t) at t + 1
  const int64_t* t;        // [batch]
  const int64_t* t_next;   // [batch]; null: predict z
  const T* neg_weights;    // [batch, 2] where n_conditions is 4
  const int64_t* lengths;  // [batch] or null: samples with lengths <= step keep x
  const T* noise;          // [batch, channels, pixels] or null
  const int64_t* rng;      // [2] seed, offset; or null. Read where noise is null and eta is not 0
  T* result;               // [batch, channels, pixels]
  T* eps;                  // [batch, channels, pixels] or null
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t n_levels;
  int64_t step;
  int64_t draw;  // added to the offset
  double scale;
  double eta;
  int n_conditions;  // 2 or 4
  int flags;
};

}  // namespace sdi
