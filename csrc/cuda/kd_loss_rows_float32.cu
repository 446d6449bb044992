#include "cuda/kd_loss_rows.cuh"

namespace lrds::cuda {

cudaError_t kd_loss_rows_float32(const KdLossArgs& args, const DeviceLimits& limits,
                                 cudaStream_t stream) {
  return launch_rows_of<float>(args, limits, stream);
}

}  // namespace lrds::cuda
