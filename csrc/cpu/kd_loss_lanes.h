// The scalar part of a row, for kWidth rows at a time with one row per lane: logarithms, label
// revision and the coefficients of the gradient. Lanes are independent, so that the result of a row
// does not depend on its neighbours. Included by kd_loss_sweep.h, whose names it uses.
#pragma once

namespace {

// The inputs of the row in each lane.
struct Lanes {
  Simd::V ce_weight, kd_weight, scale;
  Simd::V z_y, v_y;
  Simd::V sum_vr;  // as in row_target of core/kd_loss.h
};

struct LaneTerms {
  Simd::V ce, kd;
  Simd::V on_z, on_zt, on_vt, smoothing, at_target;
  Simd::V revised;  // 1 or 0
};

// anchor of core/kd_loss.h.
inline Simd::V anchor_lanes(Simd::V max) {
  return max == Simd::set(-__builtin_inff()) ? Simd::V{} : max;
}

// finish_row of core/kd_loss.h over lanes. Terms of weight 0 are masked, not multiplied by 0.
inline LaneTerms finish_lanes(const RowStats<Simd::V>& s, const Lanes& row,
                              const RowParams<float>& params, float classes) {
  using V = Simd::V;
  const auto set = [](auto x) { return Simd::set(x); };
  const auto log = [](auto x) { return log_lanes<Simd>(x); };
  const V zero{}, one = set(1.0f);
  LaneTerms out{};
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
    V candidate;
    if (params.revision_ratio > 0.0f) {
      const V eta = set(params.eta);
      const V e_y = Simd::exp((row.v_y - s.max_v) * set(params.inv_revise_temperature));
      const V lifted = e_y + (row.sum_vr * (one - eta) + (one - e_y)) / eta;
      const V down = Simd::exp(set(-params.revision_ratio) * log(lifted));
      candidate = s.sum_vt * down / (one + (s.sum_vt - p_y * s.sum_vt) * down);
    } else {
      candidate = set(params.eta) / (one + p_max - p_y);
    }
    const V revised_y = candidate * p_y + (one - candidate);
    const V teacher_term = p_y > zero ? p_y * (log_p_y - log_q_y) : zero;
    const V infinity = set(__builtin_inff());
    const V others = candidate * (one - p_y) * log(candidate) + candidate * (kl - teacher_term);
    const V revised = (candidate > zero ? others : zero) + revised_y * (log(revised_y) - log_q_y);
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

// The element of the gradient at the target, complete.
inline Simd::V target_lanes(const LaneTerms& terms, const Lanes& row, Simd::V shift_z,
                            Simd::V shift_v, float inv_t) {
  using V = Simd::V;
  const V dz = row.z_y - shift_z, dv = row.v_y - shift_v, scale = Simd::set(inv_t), zero{};
  const V exp_z = Simd::exp(dz), exp_zt = Simd::exp(dz * scale), exp_vt = Simd::exp(dv * scale);
  V at_target = terms.at_target - terms.smoothing;
  at_target += row.ce_weight != zero ? terms.on_z * exp_z : zero;
  at_target += row.kd_weight != zero ? terms.on_zt * exp_zt - terms.on_vt * exp_vt : zero;
  return at_target;
}

}  // namespace
