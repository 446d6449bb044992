#include "cuda/kd_loss_launch.cuh"

namespace lrds::cuda {

cudaError_t launch_rows_f64(const KdLossArgs& args, const Plan& plan, ValidRows valid_rows,
                            int device, cudaStream_t stream) {
  return launch_rows<double>(args, plan, valid_rows, device, stream);
}

}  // namespace lrds::cuda
