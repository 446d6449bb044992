// The launcher of every loss that is not is_plain(), by the row template of core/kd_row.h.
#pragma once

#include <cuda_runtime_api.h>

#include "core/kd_loss.h"

namespace lrds::cuda {

// Enqueues the denominators' kernel (means only; the scales of both terms stay in args.workspace)
// and the row kernel. Bad input makes its row NaN, as in kd_loss.h: also a cached teacher's index
// outside [0, classes). cudaErrorInvalidValue for an unknown divergence, and for a cached teacher
// of more classes than shared memory has bits.
cudaError_t kd_family(const KdLossArgs& args, cudaStream_t stream);

// One translation unit per accumulation type.
cudaError_t launch_family_f32(const KdLossArgs& args, int device, cudaStream_t stream);
cudaError_t launch_family_f64(const KdLossArgs& args, int device, cudaStream_t stream);

// Does a mean need the denominators' kernel?
inline bool family_has_scales(const KdLossArgs& args) {
  return args.reduction == Reduction::kMean || args.reduction == Reduction::kElementMean;
}

}  // namespace lrds::cuda
