// The launcher of the rows' moments (core/kd_loss.h: kMoments), a block per row.
#pragma once

#include <cuda_runtime_api.h>

#include "core/kd_loss.h"

namespace lrds::cuda {

// Bytes of args.moments_scratch: two rows of gradients for every block that runs at once. They are
// written and read by one block each and stay in L2.
cudaError_t kd_moments_scratch_bytes(const KdLossArgs& args, std::size_t* bytes);

// Enqueues the kernel. For calls with args.moments: no soft targets, no class weights, no cached
// teacher, no Revise::kSwap, every row selected. A target out of range makes its row NaN; an
// ignored row's moments are 0.
cudaError_t kd_moments(const KdLossArgs& args, cudaStream_t stream);

// One translation unit per accumulation type.
cudaError_t launch_moments_f32(const KdLossArgs& args, int device, cudaStream_t stream);
cudaError_t launch_moments_f64(const KdLossArgs& args, int device, cudaStream_t stream);

}  // namespace lrds::cuda
