// The CPU sweep of kd_loss: rows in, per-row terms and gradient out. No torch, no threads, no
// allocation of its own: the caller splits the rows and lends scratch memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/kd_loss.h"

namespace lrds::cpu {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best level that this build has and this CPU runs, capped by the environment variable
// LRDS_FAST_CPU_ISA (baseline, avx2, avx512, avx512_bf16). Read once.
Isa selected_isa();
const char* isa_name(Isa isa);
bool isa_compiled(Isa isa);

struct RowError {
  enum Kind : int { kNone = 0, kTarget = 1, kSelected = 2, kTeacherIndex = 3 };
  Kind kind;
  std::int64_t row;
};

// Bytes of 64-byte aligned scratch that one thread needs.
std::size_t kd_loss_scratch_bytes(const KdLossArgs& args);

// Rows with target != ignore_index.
std::int64_t kd_loss_count_valid(const KdLossArgs& args);

// The sum of their class weights, for the denominator of a mean.
double kd_loss_weight_sum(const KdLossArgs& args);

// Rows [begin, end). `scales` multiply the terms' gradients (1 / denominator * grad_scale); a row's
// grad_output, if any, multiplies on top. A row's bits do not depend on begin and end. Stops at the
// first bad row and names it.
RowError kd_loss_rows(const KdLossArgs& args, const TermScales& scales, std::int64_t begin,
                      std::int64_t end, void* scratch);

// Sums the per-row terms in a fixed order, into loss, loss_ce, loss_kd and counts.
void kd_loss_finalize(const KdLossArgs& args, const TermScales& scales);

namespace detail {
using RowsFunction = RowError (*)(const KdLossArgs&, double, std::int64_t, std::int64_t, void*);
RowError kd_loss_rows_baseline(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                               std::int64_t end, void* scratch);
RowError kd_loss_rows_avx2(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                           std::int64_t end, void* scratch);
RowError kd_loss_rows_avx512(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                             std::int64_t end, void* scratch);
// For bfloat16 students alone.
RowError kd_loss_rows_avx512_bf16(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                                  std::int64_t end, void* scratch);
// Rows up to this long are swept a vector of rows at a time (kd_loss_short.h).
constexpr std::int64_t kShortClasses = 48;
// Scratch: exponentials of z and v, a converted teacher row, and one vector of slack each.
constexpr std::int64_t kScratchSlack = 64;
// What the exponentials of a group of rows may take of the first-level cache.
constexpr std::int64_t kGroupBytes = 16 << 10;
// Rows of a group; a sweep of fewer lanes takes fewer.
constexpr std::int64_t kGroupRows = 16;

// Elements of one row in scratch.
constexpr std::int64_t scratch_padded(std::int64_t classes) {
  return (classes + 63) / 64 * 64 + kScratchSlack;
}
constexpr std::int64_t group_rows(std::int64_t classes) {
  const std::int64_t fit =
      kGroupBytes / (2 * scratch_padded(classes) * std::int64_t{sizeof(float)});
  return fit < 1 ? 1 : fit > kGroupRows ? kGroupRows : fit;
}

// The wider family's rows (kd_family_sweep.h).
using FamilyFunction = RowError (*)(const KdLossArgs&, const TermScales&, std::int64_t,
                                    std::int64_t, void*);
RowError kd_family_rows_baseline(const KdLossArgs& args, const TermScales& scales,
                                 std::int64_t begin, std::int64_t end, void* scratch);
RowError kd_family_rows_avx2(const KdLossArgs& args, const TermScales& scales, std::int64_t begin,
                             std::int64_t end, void* scratch);
RowError kd_family_rows_avx512(const KdLossArgs& args, const TermScales& scales, std::int64_t begin,
                               std::int64_t end, void* scratch);
RowError kd_family_rows_double(const KdLossArgs& args, const TermScales& scales, std::int64_t begin,
                               std::int64_t end, void* scratch);
// Scratch: rows of z, v, gradient, soft target and class weights, each whole vectors long.
constexpr std::int64_t kFamilyScratchRows = 5;
constexpr std::int64_t family_padded(std::int64_t classes) { return (classes + 15) / 16 * 16; }
}  // namespace detail

}  // namespace lrds::cpu
