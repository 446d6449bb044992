// out[i] = gradient[i] * factor for i in [begin, end), computed in double for float64 and in float
// for the other types.
#pragma once

#include <cstdint>

#include "core/kd_loss.h"

namespace lrds::cpu {
void scale_gradient(DType type, const void* gradient, void* out, std::int64_t begin,
                    std::int64_t end, double factor);
}
