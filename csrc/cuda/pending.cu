// Ops whose CUDA kernels are still to be written: their launchers fail. (methods.md;
// sdi_fast/reference/; Precision: none.)
#include "dispatch.h"

#define SDI_PENDING(name, Args)              \
  template <class T>                         \
  int launch_##name(const Args<T>&, void*) { \
    return kCudaError;                       \
  }                                          \
  SDI_INSTANTIATE_CUDA(name, Args)

namespace sdi {
namespace cuda {

SDI_PENDING(convexity_fwd, ConvexityArgs)
SDI_PENDING(convexity_bwd, ConvexityArgs)
SDI_PENDING(occupancy_update, OccupancyArgs)
SDI_PENDING(adam_step, AdamArgs)

}  // namespace cuda
}  // namespace sdi
