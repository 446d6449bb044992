// The loss of one row under any divergence, revision policy, target and number of temperatures: one
// template for both devices. An executor knows where the row is stored and how to loop over it:
// SIMD over scratch memory, a warp, or a block.
//
// Executor:
//   M            the mathematical functions: scalar type A, element type X (A or a vector of A),
//                exp(x, scale) = e^(x * scale), log, divide, where_*
//   z(k), v(k)   logits of the classes at position k; -inf at the target and past the row's end
//   t(k), w(k)   soft target's probabilities, class weights
//   others(k, x) x, but 0 at the target and past the row's end
//   max(f)             the maximum of f(k) -> X over all positions
//   sum<N>(f, out)     N sums over all positions; f(k, X* sums) adds its terms
//   each(f)            calls f(k) for all positions
//   store(k, x)        writes the gradient at position k
#pragma once

#include "core/divergence.h"

namespace lrds {

template <typename A>
struct DistillParams {
  int temperatures;
  A temperature[kMaxTemperatures];
  Revise revise;
  A eta;
  A revise_temperature;  // 0: the temperature of each KD term
  A label_smoothing;
  A classes;
  bool standardize;
  bool soft;      // whether targets are probabilities
  bool weighted;  // whether classes have weights
  bool gradient;  // whether the gradient is needed
  A parameters[3];
};

template <typename A>
LRDS_HOST_DEVICE inline DistillParams<A> distill_params(const KdLossArgs& args) {
  DistillParams<A> out{};
  out.temperatures = args.temperature_count > 0 ? args.temperature_count : 1;
  out.temperature[0] = static_cast<A>(args.temperature);
  for (int i = 1; i < out.temperatures; ++i) {
    out.temperature[i] = static_cast<A>(args.temperatures[i]);
  }
  out.revise = args.revise;
  out.eta = static_cast<A>(args.eta);
  out.revise_temperature = static_cast<A>(args.revise_temperature);
  out.label_smoothing = static_cast<A>(args.label_smoothing);
  out.classes = static_cast<A>(args.classes);
  out.standardize = args.standardize;
  out.soft = args.soft_target != nullptr;
  out.weighted = args.class_weight != nullptr;
  out.gradient = args.gradient != nullptr || args.moments != nullptr;
  for (int i = 0; i < 3; ++i) out.parameters[i] = static_cast<A>(args.divergence_parameters[i]);
  return out;
}

// Whether a call has one temperature, class-index targets, and neither class weights, label
// smoothing nor standardisation.
template <typename A>
LRDS_HOST_DEVICE inline bool is_simple(const DistillParams<A>& params) {
  return params.temperatures == 1 && !params.soft && !params.weighted && !params.standardize &&
         params.label_smoothing == A(0);
}

// The logit of each of the `others` classes that a cached teacher does not have. Together their
// exponentials sum to exp(rest).
template <typename A>
LRDS_HOST_DEVICE inline A cached_filler(double temperature, A rest, std::int64_t others) {
  const double each = static_cast<double>(rest) - log(static_cast<double>(others));
  return others > 0 ? static_cast<A>(temperature * each) : negative_infinity<A>();
}

// The inputs of a row. A term of weight 0 is neither read nor added.
//   ce_scale, kd_scale    multiply the terms' gradients
//   z_y, v_y              logits at the target
//   t_y, t_margin, t_sum  the soft target's probability at the target, how far it exceeds the next
//                         class (or 0, if that is negative), and its sum over positive entries;
//                         1, 1, 1 for a class index
//   w_y                   the target's class weight, 1 without weights
template <typename A>
struct RowTask {
  A ce_weight, kd_weight;
  A ce_scale, kd_scale;
  A z_y, v_y;
  A t_y, t_margin, t_sum;
  A w_y;
};

// ce, kd: weighted loss terms. at_target: the gradient at the target.
template <typename A>
struct RowTerms {
  A ce;
  A kd;
  A at_target;
  bool revised;
};

// x -> (x - anchor) * scale - middle. Subtracting the anchor first keeps a common offset of the
// logits from rounding their differences.
template <typename A>
struct Affine {
  A anchor;
  A mean;  // of x - anchor
  A scale;
  A middle;     // mean * scale
  A deviation;  // unbiased; unset without standardisation
};

constexpr double kStandardizeEpsilon = 1e-7;

// Revision towards a soft target, which changes every class. With dv_k the teacher's logits
// relative to their anchor and T the temperature of the revision,
//   dv'_k = T log(exp(dv_k / T) + t_k exp(offset)).
// dv'_k = dv_k where t_k = 0, and no probability is computed. With beta = 0, dv'_k = T (log t_k +
// offset).
template <typename A>
struct SoftTeacher {
  bool on;
  A temperature;
  A inv_temperature;
  A beta;
  A offset;
  A top;  // the largest dv'_k
};

template <class M, class X, class A>
LRDS_DEVICE inline X soft_teacher_logit(const SoftTeacher<A>& soft, X dv, X t) {
  const X from_target = M::log(M::where_positive(t, t)) + soft.offset;
  if (!(soft.beta > A(0))) return soft.temperature * from_target;
  const X from_teacher = dv * soft.inv_temperature;
  const X lead = M::difference(from_teacher, from_target);
  const X larger = M::where_positive(lead, from_teacher, from_target);
  const X down = M::where_positive(lead, X{} - lead, lead);
  const X sum = larger + M::log(M::exp(down, A(1)) + A(1));
  return M::where_positive(t, soft.temperature * sum, dv);
}

// A row's values at one temperature that the gradient needs.
template <typename A>
struct AtTemperature {
  A inv_temperature;
  A inv_second;
  A shift_z, shift_v;  // the anchors, as logits without scaling
  SoftTeacher<A> soft;
  DistillTerms<A> terms;
};

// The task with only the CE or only the KD term, with weight 1.
template <typename A>
LRDS_HOST_DEVICE inline RowTask<A> only_term(RowTask<A> task, bool kd) {
  task.ce_weight = kd ? A(0) : A(1);
  task.kd_weight = kd ? A(1) : A(0);
  task.ce_scale = task.kd_scale = A(1);
  return task;
}

// Computes the terms and the gradient of one row. With kSimple, is_simple(params) holds and the
// code for all else is not compiled. The executor then needs none of t, w and others, but any(x):
// whether x holds for any row of the warp. The rows of a warp share the shuffles of their
// reductions, so they must take the same branches around them.
template <class D, class Executor, bool kSimple = false>
class RowProgram {
 public:
  using M = typename Executor::M;
  using A = typename M::A;
  using X = typename M::X;

  LRDS_DEVICE_MEMBER RowProgram(Executor& exec, const DistillParams<A>& params,
                                const RowTask<A>& row)
      : exec_(exec), params_(params), row_(row) {}

  LRDS_DEVICE_MEMBER RowTerms<A> run() {
    RowTerms<A> out{A(0), A(0), A(0), false};
    max_z_ = exec_.max([&](auto k) { return exec_.z(k); });
    const bool has_ce = row_.ce_weight != A(0);
    bool has_kd = row_.kd_weight != A(0);
    if (has_kd && params_.classes == A(1)) {
      // One class: there is nothing to distil. NaN if its logit is not finite.
      has_kd = false;
      out.kd = out.at_target = (row_.z_y - row_.z_y) + (row_.v_y - row_.v_y);
    }
    if (collective(has_ce)) {
      RowTerms<A> with_ce = out;
      cross_entropy(with_ce);
      if (has_ce) out = with_ce;
    }
    if (collective(has_kd)) {
      RowTerms<A> with_kd = out;
      distill(with_kd);
      if (has_kd) out = with_kd;
    }
    if (params_.gradient) {
      exec_.each([&](auto k) {
        X g = X{};
        if (has_ce) g += cross_entropy_gradient(k);
        if (has_kd) g += distill_gradient(k);
        exec_.store(k, g);
      });
    }
    return out;
  }

 private:
  // Whether this row, or any row that takes part in the same reductions, needs a step.
  LRDS_DEVICE_MEMBER bool collective(bool needed) const {
    if constexpr (kSimple) {
      return exec_.any(needed);
    } else {
      return needed;
    }
  }
  LRDS_DEVICE_MEMBER int temperatures() const { return kSimple ? 1 : params_.temperatures; }
  LRDS_DEVICE_MEMBER bool soft() const { return !kSimple && params_.soft; }
  LRDS_DEVICE_MEMBER bool standardize() const { return !kSimple && params_.standardize; }
  LRDS_DEVICE_MEMBER A label_smoothing() const { return kSimple ? A(0) : params_.label_smoothing; }

  // The maximum of the others; the target's logit if the others are all -inf or there are none, so
  // that the row's total is 0.
  LRDS_DEVICE_MEMBER static A anchor_of(A max, A at_target) {
    return max == negative_infinity<A>() ? at_target : max;
  }

  // --- Cross-entropy: sum_k c_k * (logsumexp(z) - z_k) ---

  // c_k of one of the others.
  template <class K>
  LRDS_DEVICE_MEMBER X target_weight(K k) const {
    if constexpr (kSimple) {
      return X{};
    } else {
      X c = X{} + params_.label_smoothing / params_.classes;
      if (params_.soft) c += (A(1) - params_.label_smoothing) * exec_.t(k);
      if (params_.weighted) c *= exec_.w(k);
      return exec_.others(k, c);
    }
  }

  LRDS_DEVICE_MEMBER bool spread() const { return soft() || label_smoothing() != A(0); }

  LRDS_DEVICE_MEMBER void cross_entropy(RowTerms<A>& out) {
    const A shift = shift_z_ = anchor_of(max_z_, row_.z_y);
    const bool dense = spread();
    constexpr int kSums = kSimple ? 1 : 3;
    A sums[3];
    exec_.template sum<kSums>(
        [&](auto k, X* into) {
          const X dz = exec_.z(k) - shift;
          into[0] += M::exp(dz, A(1));
          if (!kSimple && dense) {
            const X c = target_weight(k);
            into[1] += c;
            // c = 0 with dz = -inf adds 0. A negative c counts as any other.
            into[2] += M::where_positive(c, c * dz) + M::where_positive(X{} - c, c * dz);
          }
        },
        sums);
    const A smoothing = label_smoothing();
    const A c_y = row_.w_y * ((A(1) - smoothing) * row_.t_y + smoothing / params_.classes);
    const A c_others = dense ? sums[1] : A(0);
    const A c_sum = c_others + c_y;
    const Split<A> q = split(sums[0], row_.z_y - shift);
    const A at_others = dense ? sums[2] : A(0);
    // total - z_y from the split, because both may be large.
    out.ce =
        row_.ce_weight * (times_log(c_y, -q.log_target) + times_log(c_others, q.total) - at_others);
    const A scale = row_.ce_weight * row_.ce_scale;
    ce_scale_ = scale;
    ce_coefficient_ = scale * c_sum * row_exp(-q.total);
    out.at_target += scale * (c_sum * q.target - c_y);
  }

  template <class K>
  LRDS_DEVICE_MEMBER X cross_entropy_gradient(K k) const {
    X g = ce_coefficient_ * M::exp(exec_.z(k) - shift_z_, A(1));
    if (spread()) g -= ce_scale_ * target_weight(k);
    return g;
  }

  // --- Distillation ---

  // `largest` is the maximum of the others.
  template <class F>
  LRDS_DEVICE_MEMBER Affine<A> affine_of(F logit, A at_target, A largest) const {
    Affine<A> out{A(0), A(0), A(1), A(0), A(0)};
    if constexpr (!kSimple) {
      if (!params_.standardize) return out;
      const A anchor = out.anchor = anchor_of(largest, at_target);
      A sum[1];
      exec_.template sum<1>([&](auto k, X* into) { into[0] += exec_.others(k, logit(k) - anchor); },
                            sum);
      const A d_y = at_target - anchor;
      const A mean = out.mean = (sum[0] + d_y) / params_.classes;
      exec_.template sum<1>(
          [&](auto k, X* into) {
            const X d = exec_.others(k, (logit(k) - anchor) - mean);
            into[0] += d * d;
          },
          sum);
      const A square = sum[0] + (d_y - mean) * (d_y - mean);
      if (params_.classes > A(1)) out.deviation = row_sqrt(square / (params_.classes - A(1)));
      out.scale = A(1) / (out.deviation + static_cast<A>(kStandardizeEpsilon));
      out.middle = mean * out.scale;
    }
    return out;
  }

  // A logit, or a difference of two, after standardisation.
  template <class Y>
  LRDS_DEVICE_MEMBER static Y scaled(Y x, const Affine<A>& affine) {
    if constexpr (kSimple) {
      return x;
    } else {
      return x * affine.scale;
    }
  }
  template <class Y>
  LRDS_DEVICE_MEMBER Y centred(Y z) const {
    return (z - affine_z_.anchor) - affine_z_.mean;
  }
  // A logit on the scale on which divergences subtract student and teacher.
  template <class Y>
  LRDS_DEVICE_MEMBER Y standing(Y x, const Affine<A>& affine, A less) const {
    if constexpr (kSimple) {
      return x;
    } else {
      return (x - affine.anchor) * affine.scale - (affine.middle + less);
    }
  }
  // A logit of the revised teacher relative to their common anchor.
  template <class K>
  LRDS_DEVICE_MEMBER X soft_teacher(K k, const SoftTeacher<A>& soft) const {
    return soft_teacher_logit<M>(soft, scaled(exec_.v(k) - anchor_v_, affine_v_),
                                 exec_.others(k, exec_.t(k)));
  }

  // The values of position k for the divergence.
  template <class K>
  LRDS_DEVICE_MEMBER Element<X> element(K k, const AtTemperature<A>& at) const {
    Element<X> e;
    X z = exec_.z(k), v = exec_.v(k);
    if constexpr (D::kSecondTemperature != SecondTemperature::kNone) {
      e.second_z = M::exp(scaled(z - anchor_z_, affine_z_), at.inv_second);
    } else {
      e.second_z = X{};
    }
    if constexpr (D::kClasses == Classes::kBelowTarget) {
      const X nothing = X{} + negative_infinity<A>();
      z = M::where_less(v, row_.v_y, z, nothing);
      v = M::where_less(v, row_.v_y, v, nothing);
    }
    e.z = standing(z, affine_z_, A(0));
    e.v = standing(v, affine_v_, A(0));
    e.dz = scaled(z - at.shift_z, affine_z_);
    e.dv = scaled(v - at.shift_v, affine_v_);
    if constexpr (D::kRevised && !kSimple) {
      if (at.soft.on) {
        e.z = standing(z, affine_z_, standing(anchor_v_, affine_v_, A(0)));
        e.v = soft_teacher(k, at.soft);
        e.dv = e.v - at.soft.top;
      }
    }
    e.ez = M::exp(e.dz, at.inv_temperature);
    e.ev = M::exp(e.dv, at.inv_temperature);
    return e;
  }

  LRDS_DEVICE_MEMBER void distill(RowTerms<A>& out) {
    affine_z_ = affine_of([&](auto k) { return exec_.z(k); }, row_.z_y, max_z_);
    max_v_ = exec_.max([&](auto k) { return exec_.v(k); });
    affine_v_ = affine_of([&](auto k) { return exec_.v(k); }, row_.v_y, max_v_);
    anchor_z_ = anchor_of(max_z_, row_.z_y);
    anchor_v_ = anchor_of(max_v_, row_.v_y);
    if constexpr (D::kRevised) {
      revises_elsewhere_ =
          params_.revise_temperature > A(0) && !soft() &&
          (params_.revise == Revise::kMft ||
           (params_.revise == Revise::kLabelRevision && teacher_is_wrong(row_.v_y, max_v_)));
      if (collective(revises_elsewhere_)) lift_target();
    }
    A loss = A(0), at_target = A(0);
    for (int i = 0; i < temperatures(); ++i) {
      const bool revised = at_temperature(params_.temperature[i], at_[i]);
      loss += at_[i].terms.loss;
      at_target += at_[i].terms.at_target;
      out.revised = out.revised || revised;
    }
    out.kd = row_.kd_weight * loss;
    kd_scale_ = row_.kd_weight * row_.kd_scale;
    if constexpr (!kSimple) {
      if (params_.gradient && params_.standardize) at_target = standardized_gradient(at_target);
    }
    out.at_target += kd_scale_ * at_target;
  }

  // Whether the teacher is revised at another temperature than this one.
  LRDS_DEVICE_MEMBER bool elsewhere(A temperature) const {
    return params_.revise_temperature > A(0) && params_.revise_temperature != temperature;
  }

  // Revises the teacher at the revision's own temperature, once for all KD terms.
  LRDS_DEVICE_MEMBER void lift_target() {
    const A r = params_.revise_temperature, inv_r = A(1) / r;
    A sum[1];
    exec_.template sum<1>(
        [&](auto k, X* into) {
          into[0] += M::exp(scaled(exec_.v(k) - anchor_v_, affine_v_), inv_r);
        },
        sum);
    const Split<A> p = split(sum[0], scaled(row_.v_y - anchor_v_, affine_v_) * inv_r);
    const A gap = scaled(max_v_ - row_.v_y, affine_v_) * inv_r;
    const Revision<A> revision =
        revise(p, teacher_is_wrong(row_.v_y, max_v_), gap, params_.revise, params_.eta, A(1), A(1));
    revises_elsewhere_ = revises_elsewhere_ && revision.revised;
    revised_logit_ = revised_logit(p, revision, r);
  }

  // Carries the gradient through the standardisation; returns the gradient at the target.
  LRDS_DEVICE_MEMBER A standardized_gradient(A at_target) {
    A sums[2];
    exec_.template sum<2>(
        [&](auto k, X* into) {
          const X g = exec_.others(k, direct_gradient(k));
          into[0] += g;
          into[1] += g * exec_.others(k, centred(exec_.z(k)));
        },
        sums);
    const A d_y = centred(row_.z_y);
    gradient_mean_ = (sums[0] + at_target) / params_.classes;
    const A along = sums[1] + at_target * d_y;
    const A spread = (params_.classes - A(1)) * affine_z_.deviation;
    gradient_slope_ = spread > A(0)    ? along * affine_z_.scale / spread
                      : spread == A(0) ? A(0)
                                       : spread;
    return (at_target - gradient_mean_ - d_y * gradient_slope_) * affine_z_.scale;
  }

  // Statistics and terms at one temperature; returns whether the teacher was revised.
  LRDS_DEVICE_MEMBER bool at_temperature(A temperature, AtTemperature<A>& at) {
    DistillStats<A> s{};
    s.temperature = temperature;
    s.inv_temperature = A(1) / temperature;
    s.classes = params_.classes;
    s.z_y = standing(row_.z_y, affine_z_, A(0));
    s.v_y = standing(row_.v_y, affine_v_, A(0));
    s.anchor_v = standing(anchor_v_, affine_v_, A(0));
    s.wrong = teacher_is_wrong(row_.v_y, max_v_);
    s.parameters = params_.parameters;
    at.inv_temperature = s.inv_temperature;
    at.shift_z = anchor_z_;
    at.shift_v = anchor_v_;
    at.soft.on = false;
    at.inv_second = A(0);
    // A target with probability 0 revises nothing.
    const bool wrong = s.wrong && (!soft() || row_.t_y > A(0));
    const A mass = soft() ? row_.t_y / row_.t_sum : A(1);
    const A margin = soft() ? row_.t_margin / row_.t_sum : A(1);
    const A gap = scaled(max_v_ - row_.v_y, affine_v_);

    if constexpr (D::kSecondTemperature != SecondTemperature::kNone) {
      s.second_temperature =
          D::kSecondTemperature == SecondTemperature::kOne ? A(1) : params_.parameters[2];
      at.inv_second = A(1) / s.second_temperature;
      constexpr bool kRest = D::kSecondTemperature == SecondTemperature::kParameter;
      A sums[3];
      exec_.template sum<kRest ? 3 : 2>(
          [&](auto k, X* into) {
            const X v = exec_.v(k);
            into[0] += M::exp(scaled(exec_.z(k) - anchor_z_, affine_z_), at.inv_second);
            const X e = M::exp(scaled(v - anchor_v_, affine_v_), at.inv_second);
            if constexpr (kRest) {
              into[1] += M::where_less(v, anchor_v_, e, X{});
              into[2] += M::where_less(v, anchor_v_, X{}, e);
            } else {
              into[1] += e;
            }
          },
          sums);
      A sum_v = sums[1];
      if constexpr (kRest) {
        // Without one of the largest, each of which adds 1.
        s.second_rest_v = sums[1] + (sums[2] - A(1));
        sum_v += sums[2];
      }
      s.second_sum_z = sums[0];
      s.second_student = split(sums[0], scaled(row_.z_y - anchor_z_, affine_z_) * at.inv_second);
      s.second_teacher = split(sum_v, scaled(row_.v_y - anchor_v_, affine_v_) * at.inv_second);
      if (revises_elsewhere_ && elsewhere(s.second_temperature)) {
        s.second_revision = softened(s.second_teacher, sum_v, revised_logit_ * at.inv_second);
      } else {
        s.second_revision = revise(s.second_teacher, wrong, gap * at.inv_second, params_.revise,
                                   params_.eta, mass, margin);
      }
    }

    bool revised = false;
    if constexpr (D::kClasses == Classes::kBelowTarget) {
      const auto below = [&](auto k, X x) {
        return M::where_less(exec_.v(k), row_.v_y, x, X{} + negative_infinity<A>());
      };
      at.shift_z = anchor(exec_.max([&](auto k) { return below(k, exec_.z(k)); }));
      at.shift_v = anchor(exec_.max([&](auto k) { return below(k, exec_.v(k)); }));
    }
    A dv_y = scaled(row_.v_y - at.shift_v, affine_v_);
    if constexpr (D::kRevised && !kSimple) {
      if (params_.soft && wrong && params_.revise != Revise::kNone) {
        revised = true;
        dv_y = revise_soft(at, s, gap, mass, margin);
      }
    }

    constexpr int kSums = D::kSums + 2;
    A sums[kSums];
    exec_.template sum<kSums>(
        [&](auto k, X* into) {
          const Element<X> e = element(k, at);
          into[0] += e.ez;
          into[1] += e.ev;
          if constexpr (D::kSums > 0) D::template add<M>(e, into + 2);
        },
        sums);
    s.sum_z = sums[0];
    s.sum_v = sums[1];
    for (int i = 0; i < D::kSums; ++i) s.sums[i] = sums[2 + i];
    if constexpr (D::kClasses == Classes::kOthers) {
      s.student = split(s.sum_z, scaled(row_.z_y - at.shift_z, affine_z_) * s.inv_temperature);
      s.teacher = split(s.sum_v, dv_y * s.inv_temperature);
      if (revised) {
        s.revision = unrevised(s.teacher);
      } else if (revises_elsewhere_ && elsewhere(s.temperature)) {
        s.revision = softened(s.teacher, s.sum_v, revised_logit_ * s.inv_temperature);
        revised = true;
      } else {
        s.revision = revise(s.teacher, wrong, gap * s.inv_temperature,
                            soft() ? Revise::kNone : params_.revise, params_.eta, mass, margin);
        revised = s.revision.revised;
      }
    }
    at.terms = DistillTerms<A>{};
    if constexpr (D::kSecondSums > 0) {
      at.terms = D::template prepare<M>(s);
      A second[D::kSecondSums];
      exec_.template sum<D::kSecondSums>(
          [&](auto k, X* into) { D::template add_second<M>(at.terms, element(k, at), into); },
          second);
      for (int i = 0; i < D::kSecondSums; ++i) s.second[i] = second[i];
    }
    at.terms = D::template finish<M>(s, at.terms);
    return revised;
  }

  // Replaces the teacher by its revision towards a soft target, relative to the anchor of the
  // teacher before revision. Returns the target's new logit relative to the largest new logit.
  LRDS_DEVICE_MEMBER A revise_soft(AtTemperature<A>& at, DistillStats<A>& s, A gap, A mass,
                                   A margin) {
    const A revision_t =
        params_.revise_temperature > A(0) ? params_.revise_temperature : s.temperature;
    const A inv_revision_t = A(1) / revision_t;
    A sum[1];
    exec_.template sum<1>(
        [&](auto k, X* into) {
          into[0] += M::exp(scaled(exec_.v(k) - anchor_v_, affine_v_), inv_revision_t);
        },
        sum);
    const Split<A> p = split(sum[0], scaled(row_.v_y - anchor_v_, affine_v_) * inv_revision_t);
    const Revision<A> r =
        revise(p, true, gap * inv_revision_t, Revise::kLabelRevision, params_.eta, mass, margin);
    const A total = r.beta > A(0) ? p.total - r.log_beta : A(0);
    const A offset = row_log(A(1) - r.beta) - row_log(row_.t_sum) + total;
    at.soft = SoftTeacher<A>{true, revision_t, inv_revision_t, r.beta, offset, A(0)};
    s.z_y = standing(row_.z_y, affine_z_, s.anchor_v);
    s.v_y = revision_t * (r.log_target + total);
    at.soft.top = anchor_of(exec_.max([&](auto k) { return soft_teacher(k, at.soft); }), s.v_y);
    const A shift = s.v_y - at.soft.top;
    if constexpr (D::kSecondTemperature == SecondTemperature::kOne) {
      if (elsewhere(s.second_temperature)) {
        exec_.template sum<1>(
            [&](auto k, X* into) {
              into[0] += M::exp(soft_teacher(k, at.soft) - at.soft.top, at.inv_second);
            },
            sum);
        s.second_revision = unrevised(split(sum[0], shift * at.inv_second));
      }
    }
    return shift;
  }

  // The gradient of the KD terms with respect to the (standardised) logits, without weights.
  template <class K>
  LRDS_DEVICE_MEMBER X direct_gradient(K k) const {
    X g = X{};
    for (int i = 0; i < temperatures(); ++i) {
      g += D::template gradient<M>(at_[i].terms, element(k, at_[i]));
    }
    return g;
  }

  template <class K>
  LRDS_DEVICE_MEMBER X distill_gradient(K k) const {
    X g = direct_gradient(k);
    if (standardize()) {
      const X d = centred(exec_.z(k));
      g = (g - gradient_mean_ - d * gradient_slope_) * affine_z_.scale;
    }
    return kd_scale_ * g;
  }

  Executor& exec_;
  const DistillParams<A>& params_;
  const RowTask<A>& row_;
  A max_z_;    // of the others
  A shift_z_;  // anchor of the cross-entropy's exponentials
  A ce_coefficient_, ce_scale_;
  Affine<A> affine_z_, affine_v_;
  A max_v_;  // of the others
  A anchor_z_, anchor_v_;
  bool revises_elsewhere_ = false;  // whether the row is revised at the revision's own temperature,
  A revised_logit_;  // and then the target's new (standardised) logit relative to the anchor
  A kd_scale_;
  A gradient_mean_, gradient_slope_;
  AtTemperature<A> at_[kSimple ? 1 : kMaxTemperatures];
};

}  // namespace lrds
