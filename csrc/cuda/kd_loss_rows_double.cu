#include "cuda/kd_loss_rows.cuh"

namespace lrds::cuda {

cudaError_t kd_loss_rows_double(const KdLossArgs& args, const DeviceLimits& limits,
                                cudaStream_t stream) {
  switch (args.student_type) {
    case DType::kFloat64:
      return launch_streaming<double, AnyType, double>(args, limits, stream);
    case DType::kFloat32:
      return launch_streaming<float, AnyType, double>(args, limits, stream);
    case DType::kBFloat16:
      return launch_streaming<__nv_bfloat16, AnyType, double>(args, limits, stream);
    default:
      return launch_streaming<__half, AnyType, double>(args, limits, stream);
  }
}

}  // namespace lrds::cuda
