#include "cuda/kd_family.cuh"

namespace lrds::cuda {

cudaError_t launch_family_f32(const KdLossArgs& args, int device, cudaStream_t stream) {
  return launch_family<float>(args, device, stream);
}

}  // namespace lrds::cuda
