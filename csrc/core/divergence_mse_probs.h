// Mean squared error of the probabilities, mean_k (q_k - p'_k)^2 at the temperature T, without T^2.
#pragma once

#include "core/divergence.h"

namespace lrds {

struct MseProbs {
  static constexpr bool kRevised = true;
  static constexpr int kSums = 0;
  static constexpr int kSecondSums = 2;
  static constexpr Classes kClasses = Classes::kOthers;
  static constexpr SecondTemperature kSecondTemperature = SecondTemperature::kNone;

  // q_k = c0 * ez, p'_k = c1 * ev. The differences are squared one by one; the sums of q_k^2, q_k
  // p'_k and p'_k^2 would cancel.
  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> prepare(const DistillStats<A>& s) {
    DistillTerms<A> out{};
    out.c[0] = row_exp(-s.student.total);
    out.c[1] = row_exp(-s.teacher.total) * s.revision.beta;
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static void add_second(const DistillTerms<A>& f, const Element<X>& e,
                                            X* sums) {
    const X q = f.c[0] * e.ez;
    const X d = q - f.c[1] * e.ev;
    sums[0] += d * d;
    sums[1] += q * d;
  }

  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> finish(const DistillStats<A>& s, DistillTerms<A> out) {
    const A q = s.student.target, d = q - s.revision.target;
    const A mean = s.second[1] + q * d;  // sum_k q_k (q_k - p'_k)
    out.loss = s.classes == A(1) ? A(0) : (s.second[0] + d * d) / s.classes;
    out.c[2] = A(2) / (s.classes * s.temperature);
    out.c[3] = mean;
    out.at_target = out.c[2] * q * (d - mean);
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    const X q = f.c[0] * e.ez;
    return f.c[2] * q * ((q - f.c[1] * e.ev) - f.c[3]);
  }
};

}  // namespace lrds
