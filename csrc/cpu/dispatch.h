// The CPU launchers, and which instruction set's copy of them runs.
//
// The sources in this folder are compiled once an instruction set, each time in a namespace of its
// own (SDI_ISA). kernels() picks the widest that the processor has, once. Every launcher takes its
// arguments and the number of OpenMP threads, and returns a Status.
#pragma once

#include "../adam.h"
#include "../background.h"
#include "../composite.h"
#include "../convexity.h"
#include "../field.h"
#include "../hash_encode.h"
#include "../march.h"
#include "../occupancy.h"
#include "../shade.h"
#include "../status.h"

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
  X(occupancy_update, OccupancyArgs)    \
  X(adam_step, AdamArgs)

namespace sdi {

template <class T>
struct CpuKernels {
#define SDI_MEMBER(name, Args) int (*name)(const Args<T>&, int n_threads);
  SDI_FOR_EACH_OP(SDI_MEMBER)
#undef SDI_MEMBER
};

template <class T>
const CpuKernels<T>& cpu_kernels();  // dispatch.cpp

const char* cpu_isa();  // "avx512", "avx2" or "baseline"

namespace SDI_ISA {

#define SDI_DECLARE(name, Args) \
  template <class T>            \
  int launch_##name(const Args<T>& args, int n_threads);
SDI_FOR_EACH_OP(SDI_DECLARE)
#undef SDI_DECLARE

template <class T>
const CpuKernels<T>& kernels();  // table.cpp

}  // namespace SDI_ISA
}  // namespace sdi

#define SDI_INSTANTIATE(name, Args)                           \
  template int launch_##name<float>(const Args<float>&, int); \
  template int launch_##name<double>(const Args<double>&, int);
