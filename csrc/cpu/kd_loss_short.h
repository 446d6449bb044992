// The sweep of short rows: kWidth rows at a time, one row per lane, class by class, so that no
// partial vector of classes remains. Included by kd_loss_sweep.h, whose names it uses.
#pragma once

namespace {

// The longest row for which one row per lane is faster (docs/kernels.md).
constexpr std::int64_t kShortClasses = lrds::cpu::detail::kShortClasses;

// kWidth rows, transposed: logits, which exponentials and then the gradient replace.
struct ShortRows {
  Simd::V z[kShortClasses];
  Simd::V v[kShortClasses];
};

inline float* lane_of(Simd::V* rows, std::int64_t k, int lane) {
  return reinterpret_cast<float*>(rows) + k * kWidth + lane;
}

template <class T>
inline void gather_lane(const T* row, std::int64_t classes, Simd::V* rows, int lane) {
  for (std::int64_t k = 0; k < classes; ++k) *lane_of(rows, k, lane) = lrds::cpu::to_float(row[k]);
}

inline void clear_lane(std::int64_t classes, Simd::V* rows, int lane) {
  for (std::int64_t k = 0; k < classes; ++k) *lane_of(rows, k, lane) = 0.0f;
}

inline void gather_teacher(const KdLossArgs& args, std::int64_t row, Simd::V* rows, int lane) {
  const std::int64_t offset = row * args.teacher_stride;
  switch (args.teacher_type) {
    case lrds::DType::kBFloat16:
      return gather_lane(static_cast<const lrds::cpu::BFloat16*>(args.teacher) + offset,
                         args.classes, rows, lane);
    case lrds::DType::kFloat16:
      return gather_lane(static_cast<const lrds::cpu::Float16*>(args.teacher) + offset,
                         args.classes, rows, lane);
    default:
      return gather_lane(static_cast<const float*>(args.teacher) + offset, args.classes, rows,
                         lane);
  }
}

// P is that of kd_loss_sweep.h.
template <int P, class Z>
RowError sweep_short_rows(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                          std::int64_t end) {
  using V = Simd::V;
  constexpr int kPower = P == 0 ? 1 : P;
  const RowParams<float> params = lrds::row_params<float>(args);
  const std::int64_t classes = args.classes;
  const bool smoothing = params.label_smoothing != 0.0f;
  const V inv_t = Simd::set(params.inv_temperature);
  const bool elsewhere = params.revision_ratio > 0.0f;
  const int ratio = revision_power(args);
  const V inv_r = Simd::set(params.inv_revise_temperature);
  const float* const grad_output = static_cast<const float*>(args.grad_output);
  ShortRows rows;

  for (std::int64_t first = begin; first < end; first += kWidth) {
    const int count = static_cast<int>(end - first < kWidth ? end - first : kWidth);
    Lanes lanes{};
    std::int64_t y[kWidth];
    int flags[kWidth];
    bool any_teacher = false;
    for (int lane = 0; lane < kWidth; ++lane) {
      y[lane] = -1;
      const std::int64_t row = first + lane;
      RowWeights<float> weights{0.0f, 0.0f};
      if (lane < count) {
        float w;
        const RowError error = lrds::cpu::read_row(args, row, &y[lane], &w);
        if (error.kind != RowError::kNone) return error;
        const bool valid = y[lane] != args.ignore_index;
        flags[lane] = valid ? lrds::kRowValid | (w > 0.0f ? lrds::kRowSelected : 0) : 0;
        if (valid) weights = lrds::row_weights(params, w);
      }
      if (weights.ce != 0.0f || weights.kd != 0.0f) {
        gather_lane(static_cast<const Z*>(args.student) + row * args.student_stride, classes,
                    rows.z, lane);
        // A row with a weight is valid: read_row has checked that its y is in [0, classes).
        // NOLINTNEXTLINE(clang-analyzer-security.ArrayBound)
        lanes.z_y[lane] = *lane_of(rows.z, y[lane], lane);
      } else {
        clear_lane(classes, rows.z, lane);
        y[lane] = -1;
      }
      if (weights.kd != 0.0f) {
        any_teacher = true;
        gather_teacher(args, row, rows.v, lane);
        // NOLINTNEXTLINE(clang-analyzer-security.ArrayBound)
        lanes.v_y[lane] = *lane_of(rows.v, y[lane], lane);
      } else {
        clear_lane(classes, rows.v, lane);
      }
      lanes.ce_weight[lane] = weights.ce;
      lanes.kd_weight[lane] = weights.kd;
      double scale = gradient_scale;
      if (grad_output != nullptr && lane < count)
        scale *= grad_output[row * args.grad_output_stride];
      lanes.scale[lane] = static_cast<float>(scale);
    }

    RowStats<V> stats = empty_lanes();
    for (std::int64_t k = 0; k < classes; ++k) {
      stats.max_z = Simd::max(stats.max_z, rows.z[k]);
      stats.max_v = Simd::max(stats.max_v, rows.v[k]);
    }
    const V shift_z = anchor_lanes(stats.max_z), shift_v = anchor_lanes(stats.max_v);
    if (elsewhere && any_teacher && ratio == 0) {
      for (std::int64_t k = 0; k < classes; ++k) {
        lanes.sum_vr += Simd::exp((rows.v[k] - shift_v) * inv_r);
      }
    }
    V exp_z[P == 0 ? kShortClasses : 1];
    for (std::int64_t k = 0; k < classes; ++k) {
      const V dz = rows.z[k] - shift_z, dv = rows.v[k] - shift_v;
      const V ez = Simd::exp(dz * inv_t);
      const V ez1 = P == 0 ? Simd::exp(dz) : power<kPower>(ez);
      if constexpr (P == 0) exp_z[k] = ez1;
      stats.sum_z += ez1;
      stats.sum_zt += ez;
      if (smoothing) stats.sum_shift += dz;
      rows.z[k] = ez;
      if (any_teacher) {
        const V ev = Simd::exp(dv * inv_t);
        stats.sum_vt += ev;
        stats.dot = Simd::fma_where_positive(ev, dv - dz, stats.dot);
        rows.v[k] = ev;
      }
    }
    if (any_teacher) {
      with_power(ratio, [&](auto n) {
        for (std::int64_t k = 0; k < classes; ++k) lanes.sum_vr += power<n()>(rows.v[k]);
      });
    }
    const LaneTerms terms = finish_lanes(stats, lanes, params, static_cast<float>(classes));
    if (args.counts != nullptr) {
      for (int lane = 0; lane < count; ++lane) {
        static_cast<float*>(args.ce)[first + lane] = terms.ce[lane];
        static_cast<float*>(args.kd)[first + lane] = terms.kd[lane];
        args.flags[first + lane] = static_cast<std::uint8_t>(
            flags[lane] | (terms.revised[lane] != 0.0f ? lrds::kRowRevised : 0));
      }
    }
    if (args.gradient == nullptr) continue;
    const V at_target = target_lanes(terms, lanes, shift_z, shift_v, params.inv_temperature);
    for (std::int64_t k = 0; k < classes; ++k) {
      const V ez = rows.z[k];
      V ez1;
      if constexpr (P == 0) {
        ez1 = exp_z[k];
      } else {
        ez1 = power<kPower>(ez);
      }
      V g = Simd::fma(terms.on_zt, ez, terms.on_z * ez1 - terms.smoothing);
      if (any_teacher) g = Simd::fnma(terms.on_vt, rows.v[k], g);
      rows.z[k] = g;
    }
    for (int lane = 0; lane < count; ++lane) {
      if (y[lane] >= 0) *lane_of(rows.z, y[lane], lane) = at_target[lane];
      Z* const out = static_cast<Z*>(args.gradient) + (first + lane) * classes;
      for (std::int64_t k = 0; k < classes; ++k) {
        lrds::cpu::from_float(*lane_of(rows.z, k, lane), out + k);
      }
    }
  }
  return RowError{RowError::kNone, 0};
}

}  // namespace
