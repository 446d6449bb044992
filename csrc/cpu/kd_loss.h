// The CPU sweep of kd_loss: from the rows' logits to the terms of each row and the gradient. It
// uses no torch, starts no threads and allocates nothing: the caller splits the rows and provides
// scratch.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/kd_loss.h"

namespace lrds::cpu {

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best instruction set that this build has and this CPU runs, or the one that the environment
// variable LRDS_FAST_CPU_ISA names as the limit (baseline, avx2, avx512, avx512_bf16). The variable
// is read once.
Isa selected_isa();
const char* isa_name(Isa isa);
bool isa_compiled(Isa isa);

struct RowError {
  enum Kind : int { kNone = 0, kTarget = 1, kSelected = 2, kTeacherIndex = 3 };
  Kind kind;
  std::int64_t row;
};

// Bytes of scratch per thread. It must be aligned to 64 bytes.
std::size_t kd_loss_scratch_bytes(const KdLossArgs& args);

// The number of rows with target != ignore_index.
std::int64_t kd_loss_count_valid(const KdLossArgs& args);

// The sum of the class weights of these rows, for the denominator of a mean.
double kd_loss_weight_sum(const KdLossArgs& args);

// Computes the rows [begin, end). `scales` (1 / denominator * grad_scale) multiply the gradients of
// the terms; a row's grad_output multiplies its gradient too. The result of a row does not depend
// on begin and end, bit for bit. Stops at the first invalid row and returns it.
RowError kd_loss_rows(const KdLossArgs& args, const TermScales& scales, std::int64_t begin,
                      std::int64_t end, void* scratch);

// Sums the terms of the rows in a fixed order into loss, loss_ce and loss_kd, and counts the flags.
void kd_loss_finalize(const KdLossArgs& args, const TermScales& scales);

namespace detail {
using RowsFunction = RowError (*)(const KdLossArgs&, double, std::int64_t, std::int64_t, void*);
RowError kd_loss_rows_baseline(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                               std::int64_t end, void* scratch);
RowError kd_loss_rows_avx2(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                           std::int64_t end, void* scratch);
RowError kd_loss_rows_avx512(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                             std::int64_t end, void* scratch);
// For bfloat16 students only.
RowError kd_loss_rows_avx512_bf16(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                                  std::int64_t end, void* scratch);
// Rows of at most this length are computed one row per lane (kd_loss_short.h).
constexpr std::int64_t kShortClasses = 48;
// Scratch of a row: exponentials of z and v, and a converted teacher row, plus one vector each.
constexpr std::int64_t kScratchSlack = 64;
// The exponentials of a group of rows may take so much of the first-level cache.
constexpr std::int64_t kGroupBytes = 16 << 10;
// Rows in a group. Instruction sets with fewer lanes use fewer.
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

// The sweep of kd_family_sweep.h.
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
// Scratch: z, v, gradient, soft target and class weights of a row, each in whole vectors.
constexpr std::int64_t kFamilyScratchRows = 5;
constexpr std::int64_t family_padded(std::int64_t classes) { return (classes + 15) / 16 * 16; }
}  // namespace detail

}  // namespace lrds::cpu
