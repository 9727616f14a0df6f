// All ops that have launchers, on the CPU (cpu/dispatch.h) and on the GPU (cuda/dispatch.h).
#pragma once

#include "adam.h"
#include "background.h"
#include "composite.h"
#include "convexity.h"
#include "field.h"
#include "guided_step.h"
#include "hash_encode.h"
#include "march.h"
#include "occupancy.h"
#include "ray_losses.h"
#include "shade.h"
#include "status.h"

// name, argument struct
#define SDI_FOR_EACH_OP(X)              \
  X(hash_encode_fwd, HashEncodeFwdArgs) \
  X(hash_encode_bwd, HashEncodeBwdArgs) \
  X(density, DensityArgs)               \
  X(field_fwd, FieldFwdArgs)            \
  X(field_bwd, FieldBwdArgs)            \
  X(march_count, MarchArgs)             \
  X(march_fill, MarchArgs)              \
  X(prune_count, PruneArgs)             \
  X(prune_fill, PruneArgs)              \
  X(shade_fwd, ShadeArgs)               \
  X(shade_bwd, ShadeArgs)               \
  X(composite_fwd, CompositeFwdArgs)    \
  X(composite_bwd, CompositeBwdArgs)    \
  X(background_fwd, BackgroundArgs)     \
  X(background_bwd, BackgroundArgs)     \
  X(convexity_fwd, ConvexityArgs)       \
  X(convexity_bwd, ConvexityArgs)       \
  X(ray_losses_fwd, RayLossesArgs)      \
  X(ray_losses_bwd, RayLossesArgs)      \
  X(occupancy_update, OccupancyArgs)    \
  X(adam_step, AdamArgs)                \
  X(guided_step, GuidedStepArgs)
