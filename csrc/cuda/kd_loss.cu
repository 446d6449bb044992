// The launcher of kd_loss, and the kernel that sums the rows.
#include "cuda/kd_loss.h"

#include "cuda/device.cuh"
#include "cuda/kd_family.h"
#include "cuda/kd_loss_launch.h"

namespace lrds::cuda {
namespace {

constexpr int kFinalizeThreads = 1024;

template <class A>
struct Totals {
  std::int64_t rows;
  std::int64_t classes;
  Reduction reduction;
  const A* num_valid;
  const A* ce;
  const A* kd;
  const std::uint8_t* flags;
  A* loss;
  A* loss_ce;
  A* loss_kd;
  std::int64_t* counts;
  const double* scales;  // of the CE and of the KD term, where the family's kernel has left them
};

// The block's sum of x, for thread 0, added in an order that depends on the block's size alone.
template <class T>
__device__ T block_sum(T x) {
  __shared__ T partial[kFinalizeThreads / kWarpSize];
  x = group_sum(x, kWarpSize);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  T total = T(0);
  if (threadIdx.x == 0) {
    for (unsigned warp = 0; warp < blockDim.x / kWarpSize; ++warp) total += partial[warp];
  }
  __syncthreads();
  return total;
}

// One block. With Reduction::kNone the rows wrote their losses themselves.
template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1) kd_loss_finalize(const Totals<A> totals) {
  const bool sums = totals.reduction != Reduction::kNone;
  double ce = 0.0, kd = 0.0;
  unsigned long long valid = 0, selected = 0, revised = 0;
#pragma unroll 8
  for (std::int64_t row = threadIdx.x; row < totals.rows; row += kFinalizeThreads) {
    const unsigned flags = totals.flags[row];
    valid += flags & kRowValid ? 1 : 0;
    selected += flags & kRowSelected ? 1 : 0;
    revised += flags & kRowRevised ? 1 : 0;
    if (sums) {
      ce += static_cast<double>(totals.ce[row]);
      kd += static_cast<double>(totals.kd[row]);
    }
  }
  valid = block_sum(valid);
  selected = block_sum(selected);
  revised = block_sum(revised);
  ce = block_sum(ce);
  kd = block_sum(kd);
  if (threadIdx.x != 0) return;
  totals.counts[0] = static_cast<std::int64_t>(valid);
  totals.counts[1] = static_cast<std::int64_t>(selected);
  totals.counts[2] = static_cast<std::int64_t>(revised);
  if (!sums) return;
  const double rows = totals.num_valid != nullptr ? static_cast<double>(*totals.num_valid)
                                                  : static_cast<double>(valid);
  const double scale =
      reduction_scale<double>(totals.reduction, rows, static_cast<double>(totals.classes));
  ce *= totals.scales != nullptr ? totals.scales[0] : scale;
  kd *= totals.scales != nullptr ? totals.scales[1] : scale;
  *totals.loss_ce = static_cast<A>(ce);
  *totals.loss_kd = static_cast<A>(kd);
  *totals.loss = static_cast<A>(ce + kd);
}

template <class A>
cudaError_t finalize(const KdLossArgs& args, cudaStream_t stream) {
  return launch(kd_loss_finalize<A>, 1, kFinalizeThreads, 0, stream,
                Totals<A>{args.rows, args.classes, args.reduction,
                          static_cast<const A*>(args.num_valid), static_cast<const A*>(args.ce),
                          static_cast<const A*>(args.kd), args.flags, static_cast<A*>(args.loss),
                          static_cast<A*>(args.loss_ce), static_cast<A*>(args.loss_kd), args.counts,
                          !is_plain(args) && family_has_scales(args) ? args.workspace : nullptr});
}

cudaError_t launch_rows(const KdLossArgs& args, cudaStream_t stream) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  DeviceFacts facts;
  error = device_facts(device, &facts);
  if (error != cudaSuccess) return error;

  const ValidRows valid_rows = plan_valid_rows(args);
  if (valid_rows == ValidRows::kShared) {
    // The first count lends its place until finalize overwrites it.
    error = cudaMemsetAsync(args.counts, 0, sizeof(std::int64_t), stream);
    if (error != cudaSuccess) return error;
  }
  const Plan plan = plan_rows(args, facts);
  switch (args.student_type) {
    case DType::kFloat64:
      return launch_rows_f64(args, plan, valid_rows, device, stream);
    case DType::kFloat32:
      return launch_rows_f32(args, plan, valid_rows, device, stream);
    case DType::kBFloat16:
      return launch_rows_bf16(args, plan, valid_rows, device, stream);
    default:
      return launch_rows_f16(args, plan, valid_rows, device, stream);
  }
}

}  // namespace

cudaError_t kd_loss(const KdLossArgs& args, cudaStream_t stream) {
  if (args.classes < 1 || args.classes > kMaxClasses || args.rows < 0) {
    return cudaErrorInvalidValue;
  }
  if (!is_plain(args) || args.rows > 0) {
    const cudaError_t error = is_plain(args) ? launch_rows(args, stream) : kd_family(args, stream);
    if (error != cudaSuccess) return error;
  }
  if (args.counts == nullptr) return cudaSuccess;
  return args.accumulate == DType::kFloat64 ? finalize<double>(args, stream)
                                            : finalize<float>(args, stream);
}

}  // namespace lrds::cuda
