#include "cpu/kd_loss.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace lrds::cpu {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa capped_isa() {
  const Isa best = best_isa();
  const char* const cap = std::getenv("LRDS_FAST_CPU_ISA");
  if (cap == nullptr) return best;
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (std::strcmp(cap, isa_name(isa)) == 0) return isa < best ? isa : best;
  }
  std::fprintf(stderr,
               "lrds_fast: LRDS_FAST_CPU_ISA must be baseline, avx2, avx512 or avx512_bf16; got "
               "%s, running %s\n",
               cap, isa_name(best));
  return best;
}

// Sums terms[0..rows) in eight interleaved double accumulators, so that the result does not depend
// on how the rows were split.
template <class A>
double sum_rows(const A* terms, std::int64_t rows) {
  double sums[8] = {};
  std::int64_t row = 0;
  for (; row + 8 <= rows; row += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] += static_cast<double>(terms[row + lane]);
  }
  for (; row < rows; ++row) sums[row % 8] += static_cast<double>(terms[row]);
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

template <class A>
void finalize(const KdLossArgs& args, const TermScales& scales) {
  const A* const ce = static_cast<const A*>(args.ce);
  const A* const kd = static_cast<const A*>(args.kd);
  A* const loss = static_cast<A*>(args.loss);
  if (args.reduction == Reduction::kNone) {
    for (std::int64_t row = 0; row < args.rows; ++row) loss[row] = ce[row] + kd[row];
  } else {
    // The sum of no rows is 0, and stays 0 when the denominator of the mean is 0 too.
    const double sum_ce = sum_rows(ce, args.rows) * scales.ce;
    const double sum_kd = sum_rows(kd, args.rows) * scales.kd;
    *static_cast<A*>(args.loss_ce) = static_cast<A>(sum_ce);
    *static_cast<A*>(args.loss_kd) = static_cast<A>(sum_kd);
    *loss = static_cast<A>(sum_ce + sum_kd);
  }
  std::int64_t counts[3] = {};
  for (std::int64_t row = 0; row < args.rows; ++row) {
    const std::uint8_t flags = args.flags[row];
    counts[0] += flags & 1;
    counts[1] += (flags >> 1) & 1;
    counts[2] += (flags >> 2) & 1;
  }
  std::memcpy(args.counts, counts, sizeof counts);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    default:
      return "baseline";
  }
}

bool isa_compiled(Isa isa) {
#if defined(__x86_64__)
  (void)isa;
  return true;
#else
  return isa == Isa::kBaseline;
#endif
}

Isa selected_isa() {
  static const Isa isa = capped_isa();
  return isa;
}

std::size_t kd_loss_scratch_bytes(const KdLossArgs& args) {
  const bool wide = args.accumulate == DType::kFloat64;
  if (wide || !is_plain(args)) {
    return detail::kFamilyScratchRows *
           static_cast<std::size_t>(detail::family_padded(args.classes)) *
           (wide ? sizeof(double) : sizeof(float));
  }
  const std::int64_t kept = 2 * detail::group_rows(args.classes);
  const std::int64_t converted = args.teacher_type != args.student_type ? 1 : 0;
  return static_cast<std::size_t>((kept + converted) * detail::scratch_padded(args.classes)) *
         sizeof(float);
}

std::int64_t kd_loss_count_valid(const KdLossArgs& args) {
  if (args.soft_target != nullptr) return args.rows;
  std::int64_t valid = 0;
  if (args.target_is_int64) {
    const std::int64_t* const target = static_cast<const std::int64_t*>(args.target);
    for (std::int64_t row = 0; row < args.rows; ++row) valid += target[row] != args.ignore_index;
  } else {
    const std::int32_t* const target = static_cast<const std::int32_t*>(args.target);
    for (std::int64_t row = 0; row < args.rows; ++row) valid += target[row] != args.ignore_index;
  }
  return valid;
}

double kd_loss_weight_sum(const KdLossArgs& args) {
  const auto weight = [&](std::int64_t y) {
    if (y == args.ignore_index || y < 0 || y >= args.classes) return 0.0;
    return args.accumulate == DType::kFloat64 ? static_cast<const double*>(args.class_weight)[y]
                                              : static_cast<const float*>(args.class_weight)[y];
  };
  double sum = 0.0;
  for (std::int64_t row = 0; row < args.rows; ++row) {
    sum += weight(args.target_is_int64 ? static_cast<const std::int64_t*>(args.target)[row]
                                       : static_cast<const std::int32_t*>(args.target)[row]);
  }
  return sum;
}

RowError kd_loss_rows(const KdLossArgs& args, const TermScales& scales, std::int64_t begin,
                      std::int64_t end, void* scratch) {
  if (args.accumulate == DType::kFloat64) {
    return detail::kd_family_rows_double(args, scales, begin, end, scratch);
  }
#if defined(__x86_64__)
  static const Isa isa = selected_isa();
  static const detail::RowsFunction rows = isa >= Isa::kAvx512 ? detail::kd_loss_rows_avx512
                                           : isa == Isa::kAvx2 ? detail::kd_loss_rows_avx2
                                                               : detail::kd_loss_rows_baseline;
  static const detail::FamilyFunction family = isa >= Isa::kAvx512 ? detail::kd_family_rows_avx512
                                               : isa == Isa::kAvx2
                                                   ? detail::kd_family_rows_avx2
                                                   : detail::kd_family_rows_baseline;
#else
  static const detail::RowsFunction rows = detail::kd_loss_rows_baseline;
  static const detail::FamilyFunction family = detail::kd_family_rows_baseline;
#endif
  if (!is_plain(args)) return family(args, scales, begin, end, scratch);
  // Without class weights both terms have the same denominator.
#if defined(__x86_64__)
  if (isa == Isa::kAvx512Bf16 && args.student_type == DType::kBFloat16) {
    return detail::kd_loss_rows_avx512_bf16(args, scales.kd, begin, end, scratch);
  }
#endif
  return rows(args, scales.kd, begin, end, scratch);
}

void kd_loss_finalize(const KdLossArgs& args, const TermScales& scales) {
  if (args.accumulate == DType::kFloat64) {
    finalize<double>(args, scales);
  } else {
    finalize<float>(args, scales);
  }
}

}  // namespace lrds::cpu
