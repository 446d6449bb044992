// The launcher of the moments (core/kd_loss.h: Moment), with a block per row.
#pragma once

#include <cuda_runtime_api.h>

#include "core/kd_loss.h"

namespace lrds::cuda {

// Bytes of args.moments_scratch: two rows of gradients for every block that runs at once. One block
// writes and reads each, so that they stay in L2.
cudaError_t kd_moments_scratch_bytes(const KdLossArgs& args, std::size_t* bytes);

// Enqueues the kernel. The call must have args.moments, and no soft targets, class weights, cached
// teacher, Revise::kSwap or unselected rows. A target out of range makes its row NaN; the moments
// of an ignored row are 0.
cudaError_t kd_moments(const KdLossArgs& args, cudaStream_t stream);

// One translation unit per accumulation type.
cudaError_t launch_moments_f32(const KdLossArgs& args, int device, cudaStream_t stream);
cudaError_t launch_moments_f64(const KdLossArgs& args, int device, cudaStream_t stream);

}  // namespace lrds::cuda
