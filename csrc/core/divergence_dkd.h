// Decoupled knowledge distillation,
//   alpha T^2 KL(binary(p'_y) || binary(q_y)) + beta T^2 KL(p'hat || qhat),
// where hat means renormalised over the classes other than the target, so that p'hat = phat.
// Parameters: alpha, beta. Zhao et al., CVPR 2022.
#pragma once

#include "core/divergence.h"

namespace lrds {

struct Dkd {
  static constexpr bool kRevised = true;
  static constexpr int kSums = 1;
  static constexpr int kSecondSums = 0;
  static constexpr Classes kClasses = Classes::kOthers;
  static constexpr SecondTemperature kSecondTemperature = SecondTemperature::kNone;

  template <class M, class X>
  LRDS_DEVICE_MEMBER static void add(const Element<X>& e, X* sums) {
    sums[0] += M::where_positive(e.ev, e.ev * (e.dv - e.dz));
  }

  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> finish(const DistillStats<A>& s,
                                                   const DistillTerms<A>&) {
    const A t = s.temperature, alpha = s.parameters[0], beta = s.parameters[1];
    const Revision<A>& p = s.revision;
    DistillTerms<A> out{};
    const A binary = times_log(p.target, p.log_target - s.student.log_target) +
                     times_log(p.others, p.log_others - s.student.log_others);
    const A hat = renormalised_kl(s.sums[0] * s.inv_temperature, s.sum_v, s.sum_z);
    // A weight of 0 switches its term off even if the term is infinite.
    out.loss = t * t * (times_log(alpha, binary) + times_log(beta, hat));
    out.at_target = alpha * t * excess(s.student.target, s.student.others, p.target, p.others);
    const A hat_weight = s.sum_v == A(0) ? A(0) : t * beta;
    out.c[0] = over_sum(hat_weight - out.at_target, s.sum_z);
    out.c[1] = over_sum(hat_weight, s.sum_v);
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    return f.c[0] * e.ez - f.c[1] * e.ev;
  }
};

}  // namespace lrds
