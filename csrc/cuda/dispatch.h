// The CUDA launchers of all ops. `stream` is a cudaStream_t. Nothing is allocated or synchronised;
// indices are not checked, since that would need a synchronisation: csrc/<op>.h says what happens
// to one that leaves its array.
#pragma once

#include "../ops.h"

namespace sdi {
namespace cuda {

#define SDI_DECLARE_CUDA(name, Args) \
  template <class T>                 \
  int launch_##name(const Args<T>& args, void* stream);
SDI_FOR_EACH_OP(SDI_DECLARE_CUDA)
#undef SDI_DECLARE_CUDA

}  // namespace cuda
}  // namespace sdi

#define SDI_INSTANTIATE_CUDA(name, Args)                        \
  template int launch_##name<float>(const Args<float>&, void*); \
  template int launch_##name<double>(const Args<double>&, void*);
