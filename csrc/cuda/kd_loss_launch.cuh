// From a plan to a kernel, for one student type.
#pragma once

#include <algorithm>

#include "cuda/kd_loss_block.cuh"
#include "cuda/kd_loss_bulk.cuh"
#include "cuda/kd_loss_launch.h"
#include "cuda/kd_loss_warp.cuh"

namespace lrds::cuda {

// Lets a kernel have all the dynamic shared memory there is, beside its own `static_bytes`.
template <auto kKernel>
cudaError_t allow_shared(int device, int static_bytes) {
  static OncePerDevice once;
  return once(device, [static_bytes](int d) {
    DeviceFacts facts;
    const cudaError_t status = device_facts(d, &facts);
    if (status != cudaSuccess) return status;
    return cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                facts.shared_per_block - static_bytes);
  });
}

template <class S, class A, bool kSameTeacher, int kWidth>
cudaError_t launch_block(const KdLossArgs& args, const Plan& plan, ValidRows valid_rows, int device,
                         cudaStream_t stream) {
  constexpr auto kernel = kd_loss_block<S, A, kSameTeacher, kWidth>;
  const cudaError_t error = allow_shared<kernel>(device, kBlockStaticBytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, plan.grid, plan.threads, plan.shared_bytes, stream,
                make_sweep<A>(args, valid_rows), plan.resident);
}

template <class S>
cudaError_t launch_bulk(const KdLossArgs& args, const Plan& plan, ValidRows valid_rows, int device,
                        cudaStream_t stream) {
  constexpr auto kernel = kd_loss_bulk<S>;
  const auto cluster = static_cast<unsigned>(plan.cluster);
  cudaError_t error = allow_shared<kernel>(device, 0);
  if (error != cudaSuccess) return error;
  // Rows are dealt out beforehand: a cluster that has to wait for another to end doubles the time.
  std::int64_t most = 0;
  error = resident_blocks(device, kernel, plan.threads, cluster, plan.shared_bytes, &most);
  if (error != cudaSuccess) return error;
  const auto grid = static_cast<unsigned>(std::min<std::int64_t>(plan.grid, most));
  return launch_clusters(kernel, grid, plan.threads, cluster, plan.shared_bytes, stream,
                         make_sweep<float>(args, valid_rows), plan.tiles, plan.cluster);
}

template <class S>
cudaError_t launch_rows(const KdLossArgs& args, const Plan& plan, ValidRows valid_rows, int device,
                        cudaStream_t stream) {
  if (args.accumulate == DType::kFloat64) {
    return launch_block<S, double, false, 1>(args, plan, valid_rows, device, stream);
  }
  if constexpr (std::is_same_v<S, double>) {
    return cudaErrorInvalidValue;  // accumulate must be float64
  } else {
    constexpr int kWidth = 16 / sizeof(S);
    const auto warp = [&](auto kernel) {
      return launch(kernel, plan.grid, plan.threads, plan.shared_bytes, stream,
                    make_sweep<float>(args, valid_rows), plan.lanes);
    };
    switch (plan.path) {
      case Path::kWarpShort:
        return warp(kd_loss_warp<S, true, 1, kShortElements, 0>);
      case Path::kWarpShortVector:
        return warp(kd_loss_warp<S, true, kWidth, kShortElements / kWidth, 0>);
      case Path::kFlat:
        return warp(kd_loss_flat<S>);
      case Path::kWarpVector:
        if (plan.lanes == 16) {
          return warp(kd_loss_warp<S, true, kWidth, kLongElements / kWidth, 16>);
        }
        return warp(kd_loss_warp<S, true, kWidth, kLongElements / kWidth, 32>);
      case Path::kWarpElement:
        return warp(kd_loss_warp<S, false, 1, kElementElements, 0>);
      case Path::kBulk:
        return launch_bulk<S>(args, plan, valid_rows, device, stream);
      case Path::kBlockVector:
        return launch_block<S, float, true, kWidth>(args, plan, valid_rows, device, stream);
      default:
        return launch_block<S, float, false, 1>(args, plan, valid_rows, device, stream);
    }
  }
}

}  // namespace lrds::cuda
