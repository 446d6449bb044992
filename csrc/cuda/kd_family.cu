#include "cuda/kd_family.h"

#include "cuda/device.cuh"
#include "cuda/launch.h"

namespace lrds::cuda {
namespace {

constexpr int kScalesThreads = 512;

// The inputs of the denominators' kernel.
template <class A>
struct Denominators {
  std::int64_t rows;
  std::int64_t classes;
  const void* target;  // null: soft targets, every row is valid
  bool target_is_int64;
  std::int64_t ignore_index;
  const A* class_weight;  // null unless the mean of the CE is over class weights
  Reduction reduction;
  const A* num_valid;
  const A* weight_sum;
  double* scales;  // output: 1 / denominator of the CE and of the KD term
};

// One block. The order of the sums depends on the number of rows only.
template <class A>
__global__ void __launch_bounds__(kScalesThreads, 1) kd_family_scales(const Denominators<A> d) {
  __shared__ double weights[kScalesThreads / kWarpSize];
  __shared__ unsigned long long counts[kScalesThreads / kWarpSize];
  double weight = 0.0;
  unsigned long long valid = 0;
  for (std::int64_t row = threadIdx.x; row < d.rows && d.target != nullptr; row += kScalesThreads) {
    const std::int64_t y = d.target_is_int64 ? static_cast<const std::int64_t*>(d.target)[row]
                                             : static_cast<const std::int32_t*>(d.target)[row];
    if (y == d.ignore_index) continue;
    ++valid;
    if (d.class_weight != nullptr && y >= 0 && y < d.classes) {
      weight += static_cast<double>(d.class_weight[y]);
    }
  }
  weight = group_sum(weight, kWarpSize);
  valid = group_sum(valid, kWarpSize);
  if (threadIdx.x % kWarpSize == 0) {
    weights[threadIdx.x / kWarpSize] = weight;
    counts[threadIdx.x / kWarpSize] = valid;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  weight = 0.0;
  valid = 0;
  for (int warp = 0; warp < kScalesThreads / kWarpSize; ++warp) {
    weight += weights[warp];
    valid += counts[warp];
  }
  if (d.target == nullptr) valid = static_cast<unsigned long long>(d.rows);
  const double rows =
      d.num_valid != nullptr ? static_cast<double>(*d.num_valid) : static_cast<double>(valid);
  const double scale = reduction_scale<double>(d.reduction, rows, static_cast<double>(d.classes));
  d.scales[0] = scale;
  d.scales[1] = scale;
  if (d.class_weight != nullptr) {
    if (d.weight_sum != nullptr) weight = static_cast<double>(*d.weight_sum);
    d.scales[0] = inverse_of_denominator(weight);
  }
}

template <class A>
cudaError_t launch_scales(const KdLossArgs& args, cudaStream_t stream) {
  return launch(
      kd_family_scales<A>, 1, kScalesThreads, 0, stream,
      Denominators<A>{args.rows, args.classes, args.soft_target == nullptr ? args.target : nullptr,
                      args.target_is_int64, args.ignore_index,
                      weighs_rows(args) ? static_cast<const A*>(args.class_weight) : nullptr,
                      args.reduction, static_cast<const A*>(args.num_valid),
                      static_cast<const A*>(args.weight_sum), args.workspace});
}

}  // namespace

cudaError_t kd_family(const KdLossArgs& args, cudaStream_t stream) {
  const bool wide = args.accumulate == DType::kFloat64;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  if (family_has_scales(args)) {
    if (args.workspace == nullptr) return cudaErrorInvalidValue;
    error = wide ? launch_scales<double>(args, stream) : launch_scales<float>(args, stream);
    if (error != cudaSuccess) return error;
  }
  if (args.rows == 0) return cudaSuccess;
  return wide ? launch_family_f64(args, device, stream) : launch_family_f32(args, device, stream);
}

}  // namespace lrds::cuda
