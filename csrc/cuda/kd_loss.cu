// The launcher of kd_loss, and the kernel that reduces the terms of the rows.
#include "cuda/kd_loss.h"

#include <algorithm>

#include "cuda/device.cuh"
#include "cuda/kd_family.h"
#include "cuda/kd_loss_launch.h"

namespace lrds::cuda {
namespace {

constexpr int kFinalizeThreads = 1024;
constexpr int kFinalizeWarps = kFinalizeThreads / kWarpSize;
// Rows per block: adding the terms of more takes longer than one more launch.
constexpr std::int64_t kFinalizeRows = 8192;
constexpr std::int64_t kMaxFinalizeBlocks = 32;
// The workspace begins with the two scales that kd_family writes.
constexpr int kWorkspaceScales = 2;

// The contribution of some of the rows to the reduced loss.
struct FinalizePart {
  double ce;
  double kd;
  unsigned long long valid;
  unsigned long long selected;
  unsigned long long revised;
};

unsigned finalize_blocks(const KdLossArgs& args) {
  const std::int64_t blocks = (args.rows + kFinalizeRows - 1) / kFinalizeRows;
  return static_cast<unsigned>(std::min(std::max<std::int64_t>(1, blocks), kMaxFinalizeBlocks));
}

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
  const double* scales;  // of the CE and of the KD term, written by the kernel of kd_family
  FinalizePart* parts;   // one for each block, if there are several
};

__device__ inline FinalizePart warp_sum(FinalizePart part) {
  part.ce = group_sum(part.ce, kWarpSize);
  part.kd = group_sum(part.kd, kWarpSize);
  part.valid = group_sum(part.valid, kWarpSize);
  part.selected = group_sum(part.selected, kWarpSize);
  part.revised = group_sum(part.revised, kWarpSize);
  return part;
}

// Reduces the rows' terms and flags. Every block adds its share of the rows; the block that
// finishes last adds the partial sums. The order of the additions depends on the number of rows
// only. With Reduction::kNone the row kernels have already written the losses.
template <class A>
__global__ void __launch_bounds__(kFinalizeThreads, 1) kd_loss_finalize(const Totals<A> totals) {
  __shared__ FinalizePart of_warp[kFinalizeWarps];
  const bool sums = totals.reduction != Reduction::kNone;
  const std::int64_t share = (totals.rows + gridDim.x - 1) / gridDim.x;
  const std::int64_t begin = share * blockIdx.x;
  const std::int64_t end = begin + share < totals.rows ? begin + share : totals.rows;
  FinalizePart part{};
#pragma unroll 8
  for (std::int64_t row = begin + threadIdx.x; row < end; row += kFinalizeThreads) {
    const unsigned flags = totals.flags[row];
    part.valid += flags & kRowValid ? 1 : 0;
    part.selected += flags & kRowSelected ? 1 : 0;
    part.revised += flags & kRowRevised ? 1 : 0;
    if (sums) {
      part.ce += static_cast<double>(totals.ce[row]);
      part.kd += static_cast<double>(totals.kd[row]);
    }
  }
  part = warp_sum(part);
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = part;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  static_assert(kFinalizeWarps == kWarpSize && kMaxFinalizeBlocks <= kWarpSize);
  part = warp_sum(of_warp[threadIdx.x]);
  if (gridDim.x > 1) {
    unsigned long long finished = 0;
    if (threadIdx.x == 0) {
      totals.parts[blockIdx.x] = part;
      __threadfence();
      // Uses the second count as the counter of finished blocks; it was zeroed before the launch.
      finished = atomicAdd(reinterpret_cast<unsigned long long*>(totals.counts + 1), 1ull) + 1;
      __threadfence();
    }
    if (__shfl_sync(kWholeWarp, finished, 0) != gridDim.x) return;
    part = FinalizePart{};
    __syncwarp();  // the first lane's fence now holds for the whole warp
    if (threadIdx.x < gridDim.x) part = totals.parts[threadIdx.x];
    part = warp_sum(part);
  }
  if (threadIdx.x != 0) return;
  totals.counts[0] = static_cast<std::int64_t>(part.valid);
  totals.counts[1] = static_cast<std::int64_t>(part.selected);
  totals.counts[2] = static_cast<std::int64_t>(part.revised);
  if (!sums) return;
  const double rows = totals.num_valid != nullptr ? static_cast<double>(*totals.num_valid)
                                                  : static_cast<double>(part.valid);
  const double scale =
      reduction_scale<double>(totals.reduction, rows, static_cast<double>(totals.classes));
  const double ce = part.ce * (totals.scales != nullptr ? totals.scales[0] : scale);
  const double kd = part.kd * (totals.scales != nullptr ? totals.scales[1] : scale);
  *totals.loss_ce = static_cast<A>(ce);
  *totals.loss_kd = static_cast<A>(kd);
  *totals.loss = static_cast<A>(ce + kd);
}

template <class A>
cudaError_t finalize(const KdLossArgs& args, cudaStream_t stream) {
  const bool scaled = !is_plain(args) && family_has_scales(args);
  FinalizePart* const parts =
      args.workspace == nullptr
          ? nullptr
          : reinterpret_cast<FinalizePart*>(args.workspace + kWorkspaceScales);
  return launch(kd_loss_finalize<A>, finalize_blocks(args), kFinalizeThreads, 0, stream,
                Totals<A>{args.rows, args.classes, args.reduction,
                          static_cast<const A*>(args.num_valid), static_cast<const A*>(args.ce),
                          static_cast<const A*>(args.kd), args.flags, static_cast<A*>(args.loss),
                          static_cast<A*>(args.loss_ce), static_cast<A*>(args.loss_kd), args.counts,
                          scaled ? args.workspace : nullptr, parts});
}

cudaError_t launch_rows(const KdLossArgs& args, cudaStream_t stream) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  DeviceFacts facts;
  error = device_facts(device, &facts);
  if (error != cudaSuccess) return error;

  const ValidRows valid_rows = plan_valid_rows(args);
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

std::size_t kd_loss_workspace_doubles(const KdLossArgs& args) {
  const unsigned blocks = args.counts != nullptr ? finalize_blocks(args) : 1;
  const std::size_t parts = blocks > 1 ? blocks * sizeof(FinalizePart) / sizeof(double) : 0;
  return is_plain(args) && parts == 0 ? 0 : kWorkspaceScales + parts;
}

cudaError_t kd_loss(const KdLossArgs& args, cudaStream_t stream) {
  if (args.classes < 1 || args.classes > kMaxClasses || args.rows < 0) {
    return cudaErrorInvalidValue;
  }
  const bool several = args.counts != nullptr && finalize_blocks(args) > 1;
  if (several && args.workspace == nullptr) return cudaErrorInvalidValue;
  if (several || (is_plain(args) && plan_valid_rows(args) == ValidRows::kShared)) {
    // Until finalize writes the counts, the row kernel uses the first and finalize the second as a
    // counter.
    const cudaError_t error = cudaMemsetAsync(args.counts, 0, 2 * sizeof(std::int64_t), stream);
    if (error != cudaSuccess) return error;
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
