// The sweep for AVX2.
#if defined(__x86_64__)
// Standard headers come first: their inline functions must keep the baseline instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/kd_loss.h"

// The compiler warns that a vector loses attributes as a template argument. They concern its
// alignment and aliasing, not its arithmetic.
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")

#define LRDS_SIMD_AVX2

#include "cpu/half.h"
#include "cpu/kd_loss_row.h"
#include "cpu/simd_generic.h"

// These use the Simd above.
#include "cpu/kd_loss_sweep.h"

#include "cpu/kd_family_float.h"

namespace lrds::cpu::detail {

RowError kd_loss_rows_avx2(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                           std::int64_t end, void* scratch) {
  return sweep_by_type(args, gradient_scale, begin, end, scratch);
}

RowError kd_family_rows_avx2(const KdLossArgs& args, const TermScales& scales, std::int64_t begin,
                             std::int64_t end, void* scratch) {
  return family_rows<FloatLanes>(args, scales, begin, end, scratch);
}

}  // namespace lrds::cpu::detail
#endif  // __x86_64__
