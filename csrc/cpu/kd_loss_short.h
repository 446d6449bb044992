// Short rows: kWidth rows at a time, one to a lane. Everything that a row does once (its
// logarithms, its revision, its coefficients) then costs a lane instead of a row, and there is no
// tail of classes. A lane never looks at another: a row's bits do not depend on its neighbours.
//
// Included by kd_loss_sweep.h, whose vocabulary it uses.
#pragma once

namespace {

// Up to here rows are swept across; beyond, along (docs/kernels.md).
constexpr std::int64_t kShortClasses = lrds::cpu::detail::kShortClasses;

// kWidth rows: transposed logits, then exponentials and the gradient in their place.
struct ShortRows {
  Simd::V z[kShortClasses];
  Simd::V v[kShortClasses];
};

// What each lane's row brings along.
struct ShortLanes {
  Simd::V ce_weight, kd_weight, scale;
  Simd::V z_y, v_y;
};

struct ShortTerms {
  Simd::V ce, kd;
  Simd::V on_z, on_zt, on_vt, smoothing, at_target;
  Simd::V revised;  // 1 or 0
};

inline float* lane_of(Simd::V* rows, std::int64_t k, int lane) {
  return reinterpret_cast<float*>(rows) + k * kWidth + lane;
}

// finish_row of core/kd_loss.h over lanes. A term of weight 0 is selected away, not multiplied.
inline ShortTerms finish_lanes(const RowStats<Simd::V>& s, const ShortLanes& row,
                               const RowParams<float>& params, float classes) {
  using V = Simd::V;
  const auto set = [](float x) { return Simd::set(x); };
  const auto log = [](V x) { return log_lanes<Simd>(x); };
  const V zero{}, one = set(1.0f);
  ShortTerms out{};
  const V z_shift = row.z_y - s.max_z;
  const float smoothing = params.label_smoothing;
  {
    const V log_sum = log(s.sum_z);
    V ce = set(1.0f - smoothing) * (log_sum - z_shift);
    if (smoothing != 0.0f) ce += set(smoothing) * (log_sum - s.sum_shift / set(classes));
    const V scaled = row.ce_weight * row.scale;
    const auto on = row.ce_weight != zero;
    out.ce = on ? row.ce_weight * ce : zero;
    out.on_z = on ? scaled / s.sum_z : zero;
    out.smoothing = on ? scaled * set(smoothing / classes) : zero;
    out.at_target = on ? -scaled * set(1.0f - smoothing) : zero;
  }
  const V inv_t = set(params.inv_temperature), t = set(params.temperature);
  const V log_sum_z = log(s.sum_zt), log_sum_v = log(s.sum_vt);
  V kl = s.dot * inv_t / s.sum_vt - log_sum_v + log_sum_z;
  V beta = one;
  if (params.revise != lrds::Revise::kNone) {
    const V v_shift = (row.v_y - s.max_v) * inv_t;
    const V log_p_y = v_shift - log_sum_v, log_q_y = z_shift * inv_t - log_sum_z;
    const V p_y = Simd::exp(v_shift) / s.sum_vt, p_max = one / s.sum_vt;
    const auto wrong = row.v_y < s.max_v;
    const V candidate = set(params.eta) / (one + p_max - p_y);
    const V revised_y = candidate * p_y + (one - candidate);
    const V own = p_y > zero ? p_y * (log_p_y - log_q_y) : zero;
    const V infinity = set(__builtin_inff());
    const V revised = candidate * (one - p_y) * log(candidate) + candidate * (kl - own) +
                      revised_y * (log(revised_y) - log_q_y);
    kl = wrong ? (log_q_y == -infinity ? infinity : revised) : kl;
    beta = wrong ? candidate : one;
    out.revised = wrong ? one : zero;
  }
  const auto on = row.kd_weight != zero;
  const V scaled = row.kd_weight * t * row.scale;
  out.kd = on ? row.kd_weight * t * t * kl : zero;
  out.on_zt = on ? scaled / s.sum_zt : zero;
  out.on_vt = on ? scaled * beta / s.sum_vt : zero;
  out.at_target -= on ? scaled * (one - beta) : zero;
  out.revised = on ? out.revised : zero;
  return out;
}

inline RowStats<Simd::V> empty_lanes() {
  const Simd::V nothing = Simd::set(-__builtin_inff()), zero{};
  return RowStats<Simd::V>{nothing, zero, zero, zero, nothing, zero, zero};
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

// P as in kd_loss_sweep.h.
template <int P, class Z>
RowError sweep_short_rows(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                          std::int64_t end) {
  using V = Simd::V;
  constexpr int kPower = P == 0 ? 1 : P;
  const RowParams<float> params = lrds::row_params<float>(args);
  const std::int64_t classes = args.classes;
  const bool smoothing = params.label_smoothing != 0.0f;
  const V inv_t = Simd::set(params.inv_temperature);
  const float* const grad_output = static_cast<const float*>(args.grad_output);
  ShortRows rows;

  for (std::int64_t first = begin; first < end; first += kWidth) {
    const int count = static_cast<int>(end - first < kWidth ? end - first : kWidth);
    ShortLanes lanes{};
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
        lanes.z_y[lane] = *lane_of(rows.z, y[lane], lane);
      } else {
        clear_lane(classes, rows.z, lane);
        y[lane] = -1;
      }
      if (weights.kd != 0.0f) {
        any_teacher = true;
        gather_teacher(args, row, rows.v, lane);
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
    const V nothing = Simd::set(-__builtin_inff());
    const V shift_z = stats.max_z == nothing ? V{} : stats.max_z;
    const V shift_v = stats.max_v == nothing ? V{} : stats.max_v;
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
    const ShortTerms terms = finish_lanes(stats, lanes, params, static_cast<float>(classes));
    if (args.counts != nullptr) {
      for (int lane = 0; lane < count; ++lane) {
        static_cast<float*>(args.ce)[first + lane] = terms.ce[lane];
        static_cast<float*>(args.kd)[first + lane] = terms.kd[lane];
        args.flags[first + lane] = static_cast<std::uint8_t>(
            flags[lane] | (terms.revised[lane] != 0.0f ? lrds::kRowRevised : 0));
      }
    }
    if (args.gradient == nullptr) continue;
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
      if (y[lane] >= 0) *lane_of(rows.z, y[lane], lane) += terms.at_target[lane];
      Z* const out = static_cast<Z*>(args.gradient) + (first + lane) * classes;
      for (std::int64_t k = 0; k < classes; ++k) {
        lrds::cpu::from_float(*lane_of(rows.z, k, lane), out + k);
      }
    }
  }
  return RowError{RowError::kNone, 0};
}

}  // namespace
