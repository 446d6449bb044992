#include "cuda/kd_family.cuh"

namespace lrds::cuda {

cudaError_t launch_family_f64(const KdLossArgs& args, int device, cudaStream_t stream) {
  return launch_family<double>(args, device, stream);
}

}  // namespace lrds::cuda
