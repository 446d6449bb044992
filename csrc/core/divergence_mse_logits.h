// Mean squared error of the logits, mean_k (z_k - v'_k)^2, without T^2: only the revision of v
// depends on the temperature. It changes the target's logit alone, so that softmax(v' / T) = p'. A
// class that both networks exclude (logit -inf) adds 0.
#pragma once

#include "core/divergence.h"

namespace lrds {

struct MseLogits {
  static constexpr bool kRevised = true;
  static constexpr int kSums = 1;
  static constexpr int kSecondSums = 0;
  static constexpr Classes kClasses = Classes::kOthers;
  static constexpr SecondTemperature kSecondTemperature = SecondTemperature::kNone;

  template <class M, class X>
  LRDS_DEVICE_MEMBER static void add(const Element<X>& e, X* sums) {
    const X d = M::difference(e.z, e.v);
    sums[0] += d * d;
  }

  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> finish(const DistillStats<A>& s,
                                                   const DistillTerms<A>&) {
    DistillTerms<A> out{};
    if (s.classes == A(1)) return out;
    const Revision<A>& p = s.revision;
    // Relative to the teacher's anchor: a difference of the logits themselves would round at their
    // size.
    const A from = p.revised ? s.anchor_v : s.v_y;
    const A lift = p.revised ? s.temperature * (p.log_target - p.log_beta + s.teacher.total) : A(0);
    const A d = (s.z_y == from ? A(0) : s.z_y - from) - lift;
    out.loss = (s.sums[0] + d * d) / s.classes;
    out.c[0] = A(2) / s.classes;
    out.at_target = out.c[0] * d;
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    return f.c[0] * M::difference(e.z, e.v);
  }
};

}  // namespace lrds
