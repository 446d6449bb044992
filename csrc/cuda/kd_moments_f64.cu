#include "cuda/kd_moments.cuh"

namespace lrds::cuda {

cudaError_t launch_moments_f64(const KdLossArgs& args, int device, cudaStream_t stream) {
  return launch_moments<double>(args, device, stream);
}

}  // namespace lrds::cuda
