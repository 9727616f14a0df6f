// The choice of the instruction set, made once. SDI_FAST_ISA in the environment lowers it.
#define SDI_ISA baseline
#include "dispatch.h"

#include <cstdlib>
#include <cstring>

namespace sdi {

#ifdef SDI_HAVE_X86_LEVELS
namespace avx2 {
template <class T>
const CpuKernels<T>& kernels();
}
namespace avx512 {
template <class T>
const CpuKernels<T>& kernels();
}
#endif

namespace {

int detect_level() {
#ifdef SDI_HAVE_X86_LEVELS
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi2");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd");
  const int level = has_avx2 && has_avx512 ? 2 : has_avx2 ? 1 : 0;
  const char* wish = std::getenv("SDI_FAST_ISA");
  if (wish && std::strcmp(wish, "baseline") == 0) return 0;
  if (wish && std::strcmp(wish, "avx2") == 0) return level < 1 ? level : 1;
  return level;
#else
  return 0;
#endif
}

int level() {
  static const int value = detect_level();
  return value;
}

}  // namespace

template <class T>
const CpuKernels<T>& cpu_kernels() {
#ifdef SDI_HAVE_X86_LEVELS
  if (level() == 2) return avx512::kernels<T>();
  if (level() == 1) return avx2::kernels<T>();
#endif
  return baseline::kernels<T>();
}

template const CpuKernels<float>& cpu_kernels<float>();
template const CpuKernels<double>& cpu_kernels<double>();

const char* cpu_isa() {
  const char* names[] = {"baseline", "avx2", "avx512"};
  return names[level()];
}

}  // namespace sdi
