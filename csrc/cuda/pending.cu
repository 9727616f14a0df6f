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

SDI_PENDING(hash_encode_fwd, HashEncodeFwdArgs)
SDI_PENDING(hash_encode_bwd, HashEncodeBwdArgs)
SDI_PENDING(density, DensityArgs)
SDI_PENDING(field_fwd, FieldFwdArgs)
SDI_PENDING(field_bwd, FieldBwdArgs)
SDI_PENDING(march_count, MarchArgs)
SDI_PENDING(march_fill, MarchArgs)
SDI_PENDING(prune_count, PruneArgs)
SDI_PENDING(prune_fill, PruneArgs)
SDI_PENDING(shade_fwd, ShadeArgs)
SDI_PENDING(shade_bwd, ShadeArgs)
SDI_PENDING(composite_fwd, CompositeFwdArgs)
SDI_PENDING(composite_bwd, CompositeBwdArgs)

}  // namespace cuda
}  // namespace sdi
