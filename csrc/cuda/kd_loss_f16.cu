#include "cuda/kd_loss_launch.cuh"

namespace lrds::cuda {

cudaError_t launch_rows_f16(const KdLossArgs& args, const Plan& plan, ValidRows valid_rows,
                            int device, cudaStream_t stream) {
  return launch_rows<__half>(args, plan, valid_rows, device, stream);
}

}  // namespace lrds::cuda
