// The CPU launchers, and which instruction set's copy of them runs.
//
// The sources in this folder are compiled once an instruction set, each time in a namespace of its
// own (SDI_ISA). kernels() picks the widest that the processor has, once. Every launcher takes its
// arguments and the number of OpenMP threads, and returns a Status.
#pragma once

#include "../ops.h"

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
