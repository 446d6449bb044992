// Refined logit distillation,
//   alpha Tc^2 KL((p_a, 1 - p_a) || (q_y, 1 - q_y)) + beta T^2 KL(phat || qhat).
// The first term compares the teacher's top probability p_a with q_y at the temperature Tc; hat
// means renormalised over the classes with v_k < v_y. It replaces label revision. Parameters:
// alpha, beta, Tc. Sun et al., "Knowledge Distillation with Refined Logits", 2024.
#pragma once

#include "core/divergence.h"

namespace lrds {

struct Rld {
  static constexpr bool kRevised = false;
  static constexpr int kSums = 1;
  static constexpr int kSecondSums = 0;
  static constexpr Classes kClasses = Classes::kBelowTarget;
  static constexpr SecondTemperature kSecondTemperature = SecondTemperature::kParameter;

  template <class M, class X>
  LRDS_DEVICE_MEMBER static void add(const Element<X>& e, X* sums) {
    sums[0] += M::where_positive(e.ev, e.ev * (e.dv - e.dz));
  }

  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> finish(const DistillStats<A>& s,
                                                   const DistillTerms<A>&) {
    const A t = s.temperature, alpha = s.parameters[0], beta = s.parameters[1];
    const A tc = s.second_temperature;
    const Split<A>& p = s.second_teacher;
    const Split<A>& q = s.second_student;
    DistillTerms<A> out{};
    A top = p.target, log_top = p.log_target, left = p.others, log_left = p.log_others;
    if (s.wrong) {
      // The top class is one of the others; the target is among the rest.
      log_top = -p.total;
      top = row_exp(log_top);
      log_left = log_add(row_log(s.second_rest_v) + log_top, p.log_target);
      left = row_exp(log_left);
    }
    const A binary =
        times_log(top, log_top - q.log_target) + times_log(left, log_left - q.log_others);
    const A hat = renormalised_kl(s.sums[0] * s.inv_temperature, s.sum_v, s.sum_z);
    const bool others = s.classes > A(1);
    out.loss = others ? times_log(alpha, tc * tc * binary) + times_log(beta, t * t * hat) : A(0);
    out.at_target = others ? alpha * tc * excess(q.target, q.others, top, left) : A(0);
    out.c[2] = over_sum(-out.at_target, s.second_sum_z);
    if (s.sum_v != A(0)) {
      out.c[0] = over_sum(t * beta, s.sum_z);
      out.c[1] = t * beta / s.sum_v;
    }
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    return f.c[2] * e.second_z + f.c[0] * e.ez - f.c[1] * e.ev;
  }
};

}  // namespace lrds
