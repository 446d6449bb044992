// The CUDA sweep of kd_loss: device pointers in, per-row terms, the reduced loss and the gradient
// out. No torch. A launcher enqueues on the stream it is given, on the current device; it never
// allocates and never waits, so it can be captured into a graph. What it returns is the state of
// the launch, not of the work.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/kd_loss.h"

namespace lrds::cuda {

// Rows are checked on the device: a target outside [0, classes) that is not ignore_index, or a
// selection weight outside [0, 1], makes that row's loss and gradient NaN. args.counts null (only
// the gradient is wanted) leaves ce, kd, flags, loss, loss_ce and loss_kd untouched; args.gradient
// null writes only the loss. rows = 0 writes a loss and counts of 0. args.workspace must hold
// kd_loss_workspace_doubles(args) doubles. Launches: the row kernel; finalize if the loss is
// wanted; one memset of 16 bytes if blocks share the counting of the rows or the adding of their
// terms, which takes more than 4096 or 8192 rows.
cudaError_t kd_loss(const KdLossArgs& args, cudaStream_t stream);
std::size_t kd_loss_workspace_doubles(const KdLossArgs& args);

// out[i] = gradient[i] * (grad_output / grad_scale), the factor read on the device; done at once
// when out is gradient and the factor is 1. The product is formed in double for float64, else in
// float. grad_output and grad_scale (null: 1) are double[1] if factor_is_double, else float[1].
// gradient and out must be the same or not overlap.
cudaError_t scale_gradient(const void* gradient, void* out, std::int64_t count, DType type,
                           const void* grad_output, const void* grad_scale, bool factor_is_double,
                           cudaStream_t stream);

}  // namespace lrds::cuda
