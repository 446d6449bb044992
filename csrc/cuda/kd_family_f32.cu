#include "cuda/kd_family.cuh"
#include "cuda/kd_family_simple.cuh"

namespace lrds::cuda {

cudaError_t launch_family_f32(const KdLossArgs& args, int device, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  visit_divergence(args.divergence, [&](auto divergence) {
    using D = decltype(divergence);
    bool launched = false;
    error = launch_family_simple<D>(args, device, stream, &launched);
    if (!launched && error == cudaSuccess) {
      error = launch_family_rows<D, float>(args, device, stream);
    }
  });
  return error;
}

}  // namespace lrds::cuda
