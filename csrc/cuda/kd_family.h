// The launcher of every call that is not is_plain(), with the row template of core/kd_row.h.
#pragma once

#include <cuda_runtime_api.h>

#include "core/kd_loss.h"

namespace lrds::cuda {

// Enqueues the kernel of the denominators (for means; it writes the scales of both terms to
// args.workspace) and the row kernel. As in kd_loss.h, invalid input makes its row NaN; so does an
// index of a cached teacher outside [0, classes). Returns cudaErrorInvalidValue for an unknown
// divergence, and for a cached teacher with more classes than shared memory has bits.
cudaError_t kd_family(const KdLossArgs& args, cudaStream_t stream);

// One translation unit per accumulation type.
cudaError_t launch_family_f32(const KdLossArgs& args, int device, cudaStream_t stream);
cudaError_t launch_family_f64(const KdLossArgs& args, int device, cudaStream_t stream);

// Whether a call needs the kernel of the denominators.
inline bool family_has_scales(const KdLossArgs& args) {
  return args.reduction == Reduction::kMean || args.reduction == Reduction::kElementMean;
}

}  // namespace lrds::cuda
