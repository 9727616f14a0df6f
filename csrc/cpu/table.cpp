// This instruction set's launchers, in one table.
#include "dispatch.h"

namespace sdi {
namespace SDI_ISA {

template <class T>
const CpuKernels<T>& kernels() {
  static const CpuKernels<T> table = {
#define SDI_ENTRY(name, Args) &launch_##name<T>,
      SDI_FOR_EACH_OP(SDI_ENTRY)
#undef SDI_ENTRY
  };
  return table;
}

template const CpuKernels<float>& kernels<float>();
template const CpuKernels<double>& kernels<double>();

}  // namespace SDI_ISA
}  // namespace sdi
