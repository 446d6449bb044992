#include "cuda/kd_moments.cuh"

namespace lrds::cuda {

cudaError_t kd_moments_scratch_bytes(const KdLossArgs& args, std::size_t* bytes) {
  int device = 0;
  DeviceFacts facts;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = device_facts(device, &facts);
  if (error != cudaSuccess) return error;
  const bool wide = args.accumulate == DType::kFloat64;
  const std::int64_t blocks =
      wide ? moments_blocks<double>(args, facts) : moments_blocks<float>(args, facts);
  *bytes =
      static_cast<std::size_t>(2 * blocks * args.classes) * (wide ? sizeof(double) : sizeof(float));
  return cudaSuccess;
}

cudaError_t kd_moments(const KdLossArgs& args, cudaStream_t stream) {
  const bool supported = args.soft_target == nullptr && args.class_weight == nullptr &&
                         args.kept_classes == 0 && args.revise != Revise::kSwap &&
                         args.teacher_rows == args.rows && args.moments != nullptr &&
                         args.selected_type == SelectedType::kPrefix;
  if (!supported) return cudaErrorInvalidValue;
  if (args.rows == 0) return cudaSuccess;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  return args.accumulate == DType::kFloat64 ? launch_moments_f64(args, device, stream)
                                            : launch_moments_f32(args, device, stream);
}

cudaError_t launch_moments_f32(const KdLossArgs& args, int device, cudaStream_t stream) {
  return launch_moments<float>(args, device, stream);
}

}  // namespace lrds::cuda
