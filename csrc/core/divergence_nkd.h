// Normalised knowledge distillation,
//   -p'_y log softmax(z)_y - gamma T^2 sum_{k != y} phat_k log qhat_k,
// where hat means renormalised over the classes other than the target. The first term is at
// temperature 1 and p'_y is revised there. Parameter: gamma. Yang et al., ICCV 2023.
#pragma once

#include "core/divergence.h"

namespace lrds {

struct Nkd {
  static constexpr bool kRevised = true;
  static constexpr int kSums = 1;
  static constexpr int kSecondSums = 0;
  static constexpr Classes kClasses = Classes::kOthers;
  static constexpr SecondTemperature kSecondTemperature = SecondTemperature::kOne;

  template <class M, class X>
  LRDS_DEVICE_MEMBER static void add(const Element<X>& e, X* sums) {
    sums[0] += M::where_positive(e.ev, e.ev * e.dz);
  }

  template <class M, class A>
  LRDS_DEVICE_MEMBER static DistillTerms<A> finish(const DistillStats<A>& s,
                                                   const DistillTerms<A>&) {
    const A t = s.temperature, gamma = s.parameters[0];
    const A p_y = s.second_revision.target;
    DistillTerms<A> out{};
    if (s.classes == A(1)) return out;
    const bool others = s.sum_v != A(0);
    const A cross = !others           ? A(0)
                    : s.sum_z == A(0) ? static_cast<A>(INFINITY)
                                      : row_log(s.sum_z) - s.sums[0] * s.inv_temperature / s.sum_v;
    out.loss = times_log(p_y, -s.second_student.log_target) + times_log(gamma, t * t * cross);
    out.at_target = -p_y * s.second_student.others;
    out.c[2] = p_y * row_exp(-s.second_student.total);
    if (others) {
      out.c[0] = over_sum(gamma * t, s.sum_z);
      out.c[1] = gamma * t / s.sum_v;
    }
    return out;
  }

  template <class M, class X, class A>
  LRDS_DEVICE_MEMBER static X gradient(const DistillTerms<A>& f, const Element<X>& e) {
    return f.c[2] * e.second_z + f.c[0] * e.ez - f.c[1] * e.ev;
  }
};

}  // namespace lrds
