// Generalised Jensen-Shannon divergence,
//   T^2 [w KL(p' || m) + (1 - w) KL(q || m)],   m = w p' + (1 - w) q.
// Parameter: w.
#pragma once

#include "core/divergence.h"

namespace lrds {

struct Jsd {
  static constexpr bool kRevised = true;
  static constexpr int kSums = 0;
  static constexpr int kSecondSums = 2;
  static constexpr Classes kClasses = Classes::kOthers;
  static constexpr SecondTemperature kSecondTemperature = SecondTemperature::kNone;

  // log(w p + (1 - w) q). The mixture is clamped to the smallest normal number, because it may
  // underflow to 0 where p and q do not. The factors of the logarithm are as small, so the error is
  // negligible.
  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X log_mixture(A w, X p, X q) {
    const A least = std::numeric_limits<A>::min();
    const X mixture = w * p + (A(1) - w) * q;
    return M::log(M::where_less(mixture, least, X{} + least, mixture));
  }

  // q_k = c0 * ez, log q_k = dz / T - c2; p'_k = c1 * ev, log p'_k = dv / T - c3.
  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> prepare(const DistillStats<A>& s) {
    DistillTerms<A> out{};
    out.c[0] = row_exp(-s.student.total);
    out.c[1] = row_exp(-s.teacher.total) * s.revision.beta;
    out.c[2] = s.student.total;
    out.c[3] = s.teacher.total - s.revision.log_beta;
    out.c[4] = s.parameters[0];
    out.c[5] = s.inv_temperature;
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static void add_second(const DistillTerms<A>& f, const Element<X>& e,
                                            X* sums) {
    const X q = f.c[0] * e.ez, p = f.c[1] * e.ev;
    const X log_m = log_mixture<M>(f.c[4], p, q);
    sums[0] += M::where_positive(p, p * ((e.dv * f.c[5] - f.c[3]) - log_m));
    sums[1] += M::where_positive(q, q * ((e.dz * f.c[5] - f.c[2]) - log_m));
  }

  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> finish(const DistillStats<A>& s, DistillTerms<A> out) {
    const A t = s.temperature, w = s.parameters[0];
    const A q = s.student.target, p = s.revision.target;
    const A log_m =
        log_add(row_log(w) + s.revision.log_target, row_log(A(1) - w) + s.student.log_target);
    const A student_kl = s.second[1] + times_log(q, s.student.log_target - log_m);
    const A teacher_kl = s.second[0] + times_log(p, s.revision.log_target - log_m);
    out.loss = t * t * (w * teacher_kl + (A(1) - w) * student_kl);
    out.at_target = t * (A(1) - w) * times_log(q, s.student.log_target - log_m - student_kl);
    // The gradient needs KL(q || m) instead of the teacher's normaliser.
    out.c[3] = student_kl;
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    const X q = f.c[0] * e.ez, p = f.c[1] * e.ev;
    const X ratio = (e.dz * f.c[5] - f.c[2]) - log_mixture<M>(f.c[4], p, q) - f.c[3];
    return M::where_positive(q, ((A(1) - f.c[4]) / f.c[5]) * q * ratio);
  }
};

}  // namespace lrds
