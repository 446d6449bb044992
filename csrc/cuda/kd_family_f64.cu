#include "cuda/kd_family.cuh"

namespace lrds::cuda {

cudaError_t launch_family_f64(const KdLossArgs& args, int device, cudaStream_t stream) {
  cudaError_t error = cudaErrorInvalidValue;
  visit_divergence(args.divergence, [&](auto divergence) {
    error = launch_family_rows<decltype(divergence), double>(args, device, stream);
  });
  return error;
}

}  // namespace lrds::cuda
