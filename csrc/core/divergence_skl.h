// Skewed KL divergence, T^2 KL(p' || m), m = w p' + (1 - w) q. Parameter: w. Ko et al., ICML 2024.
#pragma once

#include "core/divergence.h"

namespace lrds {

struct Skl {
  static constexpr bool kRevised = true;
  static constexpr int kSums = 0;
  static constexpr int kSecondSums = 2;
  static constexpr Classes kClasses = Classes::kOthers;
  static constexpr SecondTemperature kSecondTemperature = SecondTemperature::kNone;

  // q_k = c0 * ez, p'_k = c1 * ev.
  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> prepare(const DistillStats<A>& s) {
    DistillTerms<A> out{};
    out.c[0] = row_exp(-s.student.total);
    out.c[1] = row_exp(-s.teacher.total) * s.revision.beta;
    out.c[2] = s.parameters[0];
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static void add_second(const DistillTerms<A>& f, const Element<X>& e,
                                            X* sums) {
    const X q = f.c[0] * e.ez, p = f.c[1] * e.ev;
    const X ratio = over_mixture<M>(f.c[2], p, q);
    sums[0] += M::where_positive(p, p * M::log(ratio));
    sums[1] += q * ratio;
  }

  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> finish(const DistillStats<A>& s, DistillTerms<A> out) {
    const A t = s.temperature, w = s.parameters[0];
    const A q = s.student.target;
    const A log_ratio = log_over_mixture(w, s.revision.log_target, s.student.log_target);
    const A ratio = row_exp(log_ratio);
    out.loss = t * t * (s.second[0] + times_log(s.revision.target, log_ratio));
    out.c[3] = s.second[1] + times_log(q, ratio);  // sum_k q_k p'_k / m_k
    out.c[4] = -t * (A(1) - w);
    out.at_target = out.c[4] * times_log(q, s.student.others * ratio - s.second[1]);
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    const X q = f.c[0] * e.ez, p = f.c[1] * e.ev;
    return f.c[4] * q * (over_mixture<M>(f.c[2], p, q) - f.c[3]);
  }
};

}  // namespace lrds
