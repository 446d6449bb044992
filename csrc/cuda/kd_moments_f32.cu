#include "cuda/kd_moments.cuh"

namespace lrds::cuda {

cudaError_t launch_moments_f32(const KdLossArgs& args, int device, cudaStream_t stream) {
  return launch_moments<float>(args, device, stream);
}

}  // namespace lrds::cuda
