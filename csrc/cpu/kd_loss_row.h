// Reads and checks the target and the selection weight of a row.
#pragma once

#include "core/kd_loss.h"
#include "cpu/kd_loss.h"

namespace lrds::cpu {

// y is ignore_index for an ignored row, else in [0, classes), and 0 for soft targets; w is in [0,
// 1].
static inline RowError read_row(const KdLossArgs& args, std::int64_t row, std::int64_t* y,
                                double* w) {
  const bool soft = args.soft_target != nullptr;
  *y = soft                   ? 0
       : args.target_is_int64 ? static_cast<const std::int64_t*>(args.target)[row]
                              : static_cast<const std::int32_t*>(args.target)[row];
  const bool valid = soft || *y != args.ignore_index;
  if (valid && (*y < 0 || *y >= args.classes)) return {RowError::kTarget, row};
  *w = 1.0;
  switch (args.selected_type) {
    case SelectedType::kPrefix:
      *w = row < args.teacher_rows ? 1.0 : 0.0;
      break;
    case SelectedType::kBool:
      *w = static_cast<const std::uint8_t*>(args.selected)[row] != 0 ? 1.0 : 0.0;
      break;
    case SelectedType::kFloat32:
      *w = static_cast<const float*>(args.selected)[row];
      break;
    case SelectedType::kFloat64:
      *w = static_cast<const double*>(args.selected)[row];
      break;
  }
  // The selection weight of an ignored row is not used, so it is not checked.
  if (valid && !(*w >= 0.0 && *w <= 1.0)) return {RowError::kSelected, row};
  return {RowError::kNone, row};
}

static inline RowError read_row(const KdLossArgs& args, std::int64_t row, std::int64_t* y,
                                float* w) {
  double wide = 1.0;
  const RowError error = read_row(args, row, y, &wide);
  *w = static_cast<float>(wide);
  return error;
}

}  // namespace lrds::cpu
