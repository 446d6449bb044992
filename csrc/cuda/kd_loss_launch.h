// Launches the row kernel of a student type. One translation unit per type defines its own, so that
// they build in parallel.
#pragma once

#include "core/kd_loss.h"
#include "cuda/kd_loss_plan.h"

namespace lrds::cuda {

cudaError_t launch_rows_f64(const KdLossArgs& args, const Plan& plan, ValidRows valid_rows,
                            int device, cudaStream_t stream);
cudaError_t launch_rows_f32(const KdLossArgs& args, const Plan& plan, ValidRows valid_rows,
                            int device, cudaStream_t stream);
cudaError_t launch_rows_bf16(const KdLossArgs& args, const Plan& plan, ValidRows valid_rows,
                             int device, cudaStream_t stream);
cudaError_t launch_rows_f16(const KdLossArgs& args, const Plan& plan, ValidRows valid_rows,
                            int device, cudaStream_t stream);

}  // namespace lrds::cuda
