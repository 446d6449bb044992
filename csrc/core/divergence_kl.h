// KL divergence, T^2 KL(p' || q).
#pragma once

#include "core/divergence.h"

namespace lrds {

struct Kl {
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
    const A t = s.temperature;
    const Revision<A>& p = s.revision;
    DistillTerms<A> out{};
    const A at_target = times_log(p.target, p.log_target - s.student.log_target);
    const A dot =
        s.sums[0] * s.inv_temperature + s.sum_v * (p.log_beta - s.teacher.total + s.student.total);
    const A scale = row_exp(-s.teacher.total) * p.beta;
    out.loss = t * t * (at_target + (scale > A(0) && s.sum_v > A(0) ? scale * dot : A(0)));
    out.at_target = t * excess(s.student.target, s.student.others, p.target, p.others);
    out.c[0] = t * row_exp(-s.student.total);
    out.c[1] = t * scale;
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    return f.c[0] * e.ez - f.c[1] * e.ev;
  }
};

}  // namespace lrds
