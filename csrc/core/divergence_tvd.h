// Total variation distance, T / 2 sum_k |q_k - p'_k|. Its gradient at a class where q_k = p'_k is
// the subgradient with sign 0. Wen et al., ACL 2023.
#pragma once

#include "core/divergence.h"

namespace lrds {

struct Tvd {
  static constexpr bool kRevised = true;
  static constexpr int kSums = 0;
  static constexpr int kSecondSums = 2;
  static constexpr Classes kClasses = Classes::kOthers;
  static constexpr SecondTemperature kSecondTemperature = SecondTemperature::kNone;

  // x where d > 0, -x where d < 0, else d, which is 0 or NaN.
  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X signed_like(X d, X x, A zero) {
    return M::where_less(d, zero, X{} - x, M::where_less(X{} - d, zero, x, d));
  }

  // q_k = c0 * ez, p'_k = c1 * ev. M::difference compares the rounded products: a subtraction that
  // is fused with one of them would give equal probabilities a sign.
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
    const X d = M::difference(q, f.c[1] * e.ev);
    sums[0] += signed_like<M>(d, d, A(0));
    sums[1] += signed_like<M>(d, q, A(0));
  }

  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> finish(const DistillStats<A>& s, DistillTerms<A> out) {
    const Split<A>& q = s.student;
    const A d = excess(q.target, q.others, s.revision.target, s.revision.others);
    const A sign = d > A(0) ? A(1) : d < A(0) ? A(-1) : d;
    out.loss = s.temperature / A(2) * (s.second[0] + sign * d);
    out.c[2] = s.second[1] + sign * q.target;  // sum_k q_k sign_k
    out.at_target = q.target / A(2) * (sign * q.others - s.second[1]);
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    const X q = f.c[0] * e.ez;
    const X d = M::difference(q, f.c[1] * e.ev);
    return A(0.5) * (signed_like<M>(d, q, A(0)) - f.c[2] * q);
  }
};

}  // namespace lrds
