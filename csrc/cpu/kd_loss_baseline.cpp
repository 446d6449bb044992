// The sweep for the baseline instruction set.
// Standard headers come first: their inline functions must keep the baseline instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/kd_loss.h"

#include "cpu/half.h"
#include "cpu/kd_loss_row.h"
#include "cpu/simd_generic.h"

// These use the Simd above.
#include "cpu/kd_loss_sweep.h"

#include "cpu/kd_family_float.h"

namespace lrds::cpu::detail {

RowError kd_loss_rows_baseline(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                               std::int64_t end, void* scratch) {
  return sweep_by_type(args, gradient_scale, begin, end, scratch);
}

RowError kd_family_rows_baseline(const KdLossArgs& args, const TermScales& scales,
                                 std::int64_t begin, std::int64_t end, void* scratch) {
  return family_rows<FloatLanes>(args, scales, begin, end, scratch);
}

}  // namespace lrds::cpu::detail
