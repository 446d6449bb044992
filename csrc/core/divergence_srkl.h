// Skewed reverse KL divergence, T^2 KL(q || m), m = w q + (1 - w) p'. Parameter: w. Ko et al.,
// ICML 2024.
#pragma once

#include "core/divergence.h"

namespace lrds {

struct Srkl {
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
    const X ratio = over_mixture<M>(f.c[2], q, p);
    sums[0] += M::where_positive(q, q * M::log(ratio));
    sums[1] += q * ratio;
  }

  // The derivative of q log(q / m) by q is log(q / m) - w q / m + 1.
  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> finish(const DistillStats<A>& s, DistillTerms<A> out) {
    const A t = s.temperature, w = s.parameters[0];
    const A q = s.student.target;
    const A log_ratio = log_over_mixture(w, s.student.log_target, s.revision.log_target);
    const A slope = log_ratio - w * row_exp(log_ratio);
    const A others = s.second[0] - w * s.second[1];
    out.loss = t * t * (s.second[0] + times_log(q, log_ratio));
    out.c[3] = others + times_log(q, slope);
    out.c[4] = t;
    out.at_target = t * times_log(q, s.student.others * slope - others);
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    const X q = f.c[0] * e.ez, p = f.c[1] * e.ev;
    const X ratio = over_mixture<M>(f.c[2], q, p);
    return M::where_positive(q, f.c[4] * q * ((M::log(ratio) - f.c[2] * ratio) - f.c[3]));
  }
};

}  // namespace lrds
