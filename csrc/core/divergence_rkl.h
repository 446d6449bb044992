// Reverse KL divergence, T^2 KL(q || p').
#pragma once

#include "core/divergence.h"

namespace lrds {

struct Rkl {
  static constexpr bool kRevised = true;
  static constexpr int kSums = 1;
  static constexpr int kSecondSums = 0;
  static constexpr Classes kClasses = Classes::kOthers;
  static constexpr SecondTemperature kSecondTemperature = SecondTemperature::kNone;

  template <class M, class X>
  LRDS_DEVICE_MEMBER static void add(const Element<X>& e, X* sums) {
    sums[0] += M::where_positive(e.ez, e.ez * (e.dz - e.dv));
  }

  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> finish(const DistillStats<A>& s,
                                                   const DistillTerms<A>&) {
    const A t = s.temperature;
    const Revision<A>& p = s.revision;
    DistillTerms<A> out{};
    // log q_k - log p'_k = (dz - dv) / T + offset
    const A offset = s.teacher.total - s.student.total - p.log_beta;
    const A scale = row_exp(-s.student.total);
    const A log_ratio = s.student.log_target - p.log_target;
    const A dot = s.sums[0] * s.inv_temperature + s.sum_z * offset;
    const A kl = times_log(s.student.target, log_ratio) +
                 (scale > A(0) && s.sum_z > A(0) ? scale * dot : A(0));
    out.loss = t * t * kl;
    out.at_target = t * times_log(s.student.target, log_ratio - kl);
    out.c[0] = scale;  // q_k = c0 * ez
    out.c[1] = t * (offset - kl);
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    // Tests q itself: q may underflow where ez does not, and 0 times an infinite ratio must be 0.
    const X q = f.c[0] * e.ez;
    return M::where_positive(q, q * ((e.dz - e.dv) + f.c[1]));
  }
};

}  // namespace lrds
