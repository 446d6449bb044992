// The float64 sweep: plain loops and the standard library's exp and log, for gradient checks and
// exact references.
#pragma once

#include "cpu/kd_loss.h"

namespace lrds::cpu::detail {
RowError kd_loss_rows_double(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                             std::int64_t end, void* scratch);
}
