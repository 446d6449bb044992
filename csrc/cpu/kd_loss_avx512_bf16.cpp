// The sweep of bfloat16 students with AVX-512's bfloat16 conversions. Other students are not faster
// with them, so they are not compiled here.
#if defined(__x86_64__)
// Standard headers come first: their inline functions must keep the baseline instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/kd_loss.h"

// GCC 12 warns inside its own intrinsics (GCC bug 105593), thousands of times.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
// The compiler warns that a vector loses attributes as a template argument. They concern its
// alignment and aliasing, not its arithmetic.
#pragma GCC diagnostic ignored "-Wignored-attributes"
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")

#define LRDS_SIMD_AVX512_BF16

#include "cpu/half.h"
#include "cpu/kd_loss_row.h"
#include "cpu/simd_avx512.h"

// These use the Simd above.
#include "cpu/kd_loss_sweep.h"

namespace lrds::cpu::detail {

RowError kd_loss_rows_avx512_bf16(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                                  std::int64_t end, void* scratch) {
  const auto sweep = args.teacher_type == DType::kBFloat16
                         ? sweep_by_temperature<BFloat16, BFloat16>
                         : sweep_by_temperature<BFloat16, float>;
  return sweep(args, gradient_scale, begin, end, static_cast<float*>(scratch));
}

}  // namespace lrds::cpu::detail
#endif  // __x86_64__
