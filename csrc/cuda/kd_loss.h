// The CUDA sweep of kd_loss: from device pointers to the terms of each row, the reduced loss and
// the gradient. It does not use torch. Launchers enqueue on the given stream and the current
// device. They neither allocate nor synchronise, so they can be captured in a graph, and return the
// state of the launch, not of the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "core/kd_loss.h"

namespace lrds::cuda {

// The kernels check the rows: a target outside [0, classes) other than ignore_index, or a selection
// weight outside [0, 1], makes the loss and gradient of its row NaN. If args.counts is null, only
// the gradient is computed, and ce, kd, flags, loss, loss_ce and loss_kd are not written; if
// args.gradient is null, only the loss is. With rows = 0 the loss and the counts are 0.
// args.workspace must hold kd_loss_workspace_doubles(args) doubles. Launches: the row kernel; the
// finalize kernel for a loss; and a memset of 16 bytes if blocks count valid rows together (above
// 4096 rows) or add terms together (above 8192 rows).
cudaError_t kd_loss(const KdLossArgs& args, cudaStream_t stream);
std::size_t kd_loss_workspace_doubles(const KdLossArgs& args);

// out[i] = gradient[i] * (grad_output / grad_scale). The factor is read on the device; if out is
// gradient and the factor is 1, nothing is written. The product is computed in double for float64,
// else in float. grad_output and grad_scale (null: 1) are double[1] if factor_is_double, else
// float[1]. gradient and out must be equal or not overlap.
cudaError_t scale_gradient(const void* gradient, void* out, std::int64_t count, DType type,
                           const void* grad_output, const void* grad_scale, bool factor_is_double,
                           cudaStream_t stream);

}  // namespace lrds::cuda
