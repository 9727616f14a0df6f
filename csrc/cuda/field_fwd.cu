// The radiance field on the GPU, forward (methods.md D). Twin: sdi_fast/reference/field.py.
//
// h = W1 e, density = softplus(w2 . relu(h) + blob), albedo = sigmoid(V2 relu(V1 e)), normal =
// -g / |g| with g = J^T W1^T (1[h > 0] * w2) / 2r + grad blob. A block takes tiles of up to 32
// samples whose numbers stay in shared memory (field_tile.h): any number of levels, features and
// hidden units without local memory. Nothing is kept for the backward. Precision: T throughout.
// Bytes per sample in f32: 32 L F gathered, 12 read, 28 written.
#include "dispatch.h"
#include "field_tile.h"

namespace sdi {
namespace cuda {
namespace {

template <class T>
__global__ void density_kernel(const DensityArgs<T> a, const Row at) {
  const Worker<T> me(shared_rows<T>(), at);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * at.n_samples;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * at.n_samples; first < a.n;
       first += stride) {
    const int64_t i = first + me.sample;
    load_point(a.x_world, i, a.n, a.spec, at, me);
    __syncthreads();
    encode<false>(a.spec, a.params.table, at, me);
    __syncthreads();
    density_layer(a.params, at, me);
    __syncthreads();
    if (me.group == 0 && i < a.n) {
      T unused[3] = {};
      const T blob = add_blob(me.row + at.x, a.spec.blob_scale, a.spec.blob_std, unused);
      a.density[i] = softplus(density_head(a.params, at, me.row) + blob);
    }
  }
}

template <class T>
__global__ void field_fwd_kernel(const FieldFwdArgs<T> a, const Row at) {
  const Worker<T> me(shared_rows<T>(), at);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * at.n_samples;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * at.n_samples; first < a.n;
       first += stride) {
    const int64_t i = first + me.sample;
    evaluate_tile(a.x_world, a.params, i, a.n, a.spec, at, me);
    if (me.group == 0 && i < a.n) {
      const FieldValues<T> values = finish(a.spec, at, me.row);
      a.density[i] = softplus(values.logit);
      for (int c = 0; c < 3; ++c) {
        a.albedo[3 * i + c] = values.albedo[c];
        a.normal[3 * i + c] = values.normal[c];
      }
    }
  }
}

// Of both kernels. The next tile's load, by the same threads, touches nothing that others still
// read.
template <class T, class Args>
int launch_tiles(void (*kernel)(Args, Row), const Args& args, Row::Parts parts, void* stream) {
  if (args.n == 0) return kOk;
  const Row row(args.spec, parts, sizeof(T));
  const int64_t tiles = tiles_of(args.n, row);
  const int64_t blocks = tiles < kMaxTileBlocks ? tiles : kMaxTileBlocks;
  if (!allow_shared(kernel, row.bytes(sizeof(T)))) return kCudaError;
  return launch(kernel, static_cast<unsigned>(blocks), kTileThreads, row.bytes(sizeof(T)), stream,
                args, row);
}

}  // namespace

template <class T>
int launch_density(const DensityArgs<T>& args, void* stream) {
  return launch_tiles<T, DensityArgs<T>>(density_kernel<T>, args, Row::kDensity, stream);
}

template <class T>
int launch_field_fwd(const FieldFwdArgs<T>& args, void* stream) {
  return launch_tiles<T, FieldFwdArgs<T>>(field_fwd_kernel<T>, args, Row::kForward, stream);
}

SDI_INSTANTIATE_CUDA(density, DensityArgs)
SDI_INSTANTIATE_CUDA(field_fwd, FieldFwdArgs)

}  // namespace cuda
}  // namespace sdi
