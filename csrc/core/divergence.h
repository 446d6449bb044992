// The interface of a divergence between teacher and student, for one row at one temperature T.
//
// "The others" are the classes k != y, where y is the row's target. Sums run over the others only,
// and the target is added in closed form. So log(1 - q_y) is a logsumexp over the others instead of
// the logarithm of a difference, and label revision, which multiplies the others by one factor and
// sets the target, is applied after the sums. q = softmax(z / T), p = softmax(v / T), p' = p after
// revision.
//
// A divergence is a struct in its own file (divergence_kl.h is the shortest) and an entry of
// divergences.h. Its functions of one class take X, a number or a SIMD vector of numbers, and a
// type M with the mathematical functions of X:
//   kRevised             whether it takes the revised teacher
//   kSums                how many sums over classes it needs
//   kSecondSums          how many more it needs whose terms depend on the results of the first sums
//   kClasses             the classes of its sums: the others, or those of the others whose teacher
//                        logit is below the target's
//   kSecondTemperature   which other temperature it uses
//   add          adds a class to the first sums
//   prepare      statistics -> coefficients                               (kSecondSums > 0)
//   add_second   adds a class to the second sums                          (kSecondSums > 0)
//   finish       statistics, prepare's coefficients -> loss, gradient at the target, coefficients
//   gradient     coefficients -> d loss / dz_k of one of the others
// All of them are templates of M, even those that do not use it: M is a type of one translation
// unit, so the functions are too, and the linker cannot mix instruction sets.
#pragma once

#include <limits>

#include "core/kd_loss.h"

namespace lrds {

enum class Classes : std::int32_t { kOthers = 0, kBelowTarget = 1 };
enum class SecondTemperature : std::int32_t { kNone = 0, kOne = 1, kParameter = 2 };

constexpr int kMaxSums = 2;
constexpr int kMaxCoefficients = 6;

// The probabilities of the target and of the others together under softmax(x / T).
//   total       log sum_k exp((x_k - anchor) / T), where anchor is the maximum of the others
//   log_target, log_others, target, others    log q_y, log(1 - q_y), q_y, 1 - q_y
template <typename A>
struct Split {
  A total;
  A log_target;
  A log_others;
  A target;
  A others;
};

// A teacher's distribution after revision. The probability of each other class is beta * p_k.
template <typename A>
struct Revision {
  A beta;
  A log_beta;
  A log_target;
  A log_others;
  A target;
  A others;
  bool revised;
};

// Statistics of a row at one temperature. Exponentials are relative to the maximum over the
// divergence's classes: exp((z_k - max_z) / T).
template <typename A>
struct DistillStats {
  A temperature;
  A inv_temperature;
  A classes;
  // Relative to the same number as Element::z and v; v's exponentials are relative to anchor_v.
  A z_y, v_y, anchor_v;
  bool wrong;      // whether another class's teacher logit is above the target's
  A sum_z, sum_v;  // sum exp((z_k - max_z) / T), and of v, over the divergence's classes
  A sums[kMaxSums];
  A second[kMaxSums];
  Split<A> student, teacher;  // at T; unset for Classes::kBelowTarget
  Revision<A> revision;       // at T
  A second_temperature;
  A second_sum_z;   // over the others, at the second temperature
  A second_rest_v;  // over the others except one of the largest; for SecondTemperature::kParameter
  Split<A> second_student, second_teacher;
  Revision<A> second_revision;
  const A* parameters;
};

template <typename A>
struct DistillTerms {
  A loss;
  A at_target;  // d loss / dz_y
  A c[kMaxCoefficients];
};

// The values of one class. Outside the divergence's classes ez and ev are 0.
template <typename X>
struct Element {
  X z, v;      // the logits, both relative to the same number
  X dz, dv;    // the logits relative to their anchors
  X ez, ev;    // exp(dz / T), exp(dv / T)
  X second_z;  // exp((z_k - max of the others) / second temperature)
};

// x * y, and 0 if x is 0, whatever y is.
template <typename A>
LRDS_HOST_DEVICE inline A times_log(A x, A y) {
  return x == A(0) ? A(0) : x * y;
}

// log(1 + exp(x))
template <typename A>
LRDS_HOST_DEVICE inline A softplus(A x) {
  return x > A(0) ? x + row_log1p(row_exp(-x)) : row_log1p(row_exp(x));
}

// log(exp(a) + exp(b))
template <typename A>
LRDS_HOST_DEVICE inline A log_add(A a, A b) {
  if (a == b) return a + static_cast<A>(0.69314718055994531);
  return a > b ? a + row_log1p(row_exp(b - a)) : b + row_log1p(row_exp(a - b));
}

// a / m, m = w a + (1 - w) b. The mixture is clamped to the smallest normal number, because it may
// underflow to 0; a and b are then as small, so the error is negligible.
template <class M, class X, class A>
LRDS_DEVICE inline X over_mixture(A w, X a, X b) {
  const A least = std::numeric_limits<A>::min();
  const X mixture = w * a + (A(1) - w) * b;
  return M::divide(a, M::where_less(mixture, least, X{} + least, mixture));
}

// The logarithm of over_mixture from the logarithms of a and b. It is accurate relative to b - a
// where they are close, and finite where exp(log_b - log_a) overflows.
template <typename A>
LRDS_HOST_DEVICE inline A log_over_mixture(A w, A log_a, A log_b) {
  const A lead = log_b - log_a;
  const A down = lead > A(0) ? -lead : lead;
  const A of_larger = lead > A(0) ? A(1) - w : w;
  const A of_smaller = lead > A(0) ? w : A(1) - w;
  const A log_sum = down > A(-1) ? row_log1p(of_smaller * row_expm1(down))
                                 : row_log(of_larger + of_smaller * row_exp(down));
  return lead > A(0) ? -lead - log_sum : -log_sum;
}

// Split from the sum of exponentials over the others and target_shift = (x_y - anchor) / T.
template <typename A>
LRDS_HOST_DEVICE inline Split<A> split(A sum_others, A target_shift) {
  const A log_sum = row_log(sum_others);
  const A lead = log_sum - target_shift;
  Split<A> out;
  out.log_target = -softplus(lead);
  out.log_others = -softplus(-lead);
  out.total = target_shift > log_sum ? target_shift + softplus(lead) : log_sum + softplus(-lead);
  out.target = row_exp(out.log_target);
  out.others = row_exp(out.log_others);
  return out;
}

// q_y - p_y of two distributions over the target and the others, from the smaller of the two
// probabilities, so that no precision is lost where both q_y and p_y are close to 1.
template <typename A>
LRDS_HOST_DEVICE inline A excess(A q_y, A q_others, A p_y, A p_others) {
  return q_y > q_others ? p_others - q_others : q_y - p_y;
}

// KL(phat || qhat) over the divergence's classes, from dot = sum_k ev (dv - dz) / T. It is 0 if the
// teacher's sum is 0, and infinite if only the student's is.
template <typename A>
LRDS_HOST_DEVICE inline A renormalised_kl(A dot, A sum_v, A sum_z) {
  if (sum_v == A(0)) return A(0);
  if (sum_z == A(0)) return static_cast<A>(INFINITY);
  return dot / sum_v - row_log(sum_v) + row_log(sum_z);
}

// x / sum, and 0 for an empty sum.
template <typename A>
LRDS_HOST_DEVICE inline A over_sum(A x, A sum) {
  return sum == A(0) ? A(0) : x / sum;
}

template <typename A>
LRDS_HOST_DEVICE inline Revision<A> unrevised(const Split<A>& p) {
  return Revision<A>{A(1), A(0), p.log_target, p.log_others, p.target, p.others, false};
}

// Revises p towards a target distribution whose probability at the target is `mass` and exceeds the
// next largest by `margin` (both 1 for a class index). Where the teacher is wrong, beta = eta *
// margin / (margin + p_max - p_y). "mft" also changes rows where it is right: p'_y = min(1, p_y + 1
// - eta). gap = (v_max - v_y) / T, positive where the teacher is wrong.
template <typename A>
LRDS_HOST_DEVICE inline Revision<A> revise(const Split<A>& p, bool wrong, A gap, Revise policy,
                                           A eta, A mass, A margin) {
  Revision<A> out = unrevised(p);
  if (wrong && (policy == Revise::kLabelRevision || policy == Revise::kMft)) {
    // p_max - p_y. The largest exponential of the others is exp(0).
    const A lead = -row_exp(-p.total) * row_expm1(-gap);
    out.beta = margin == A(0) ? A(0) : eta * margin / (margin + lead);
    out.target = out.beta * p.target + (A(1) - out.beta) * mass;
    out.revised = true;
  } else if (policy == Revise::kMft && p.log_others > negative_infinity<A>()) {
    // p'_y = p_y + min(1 - eta, 1 - p_y); the others get the rest.
    const A left = p.others - (A(1) - eta);
    out.beta = left > A(0) ? left / p.others : A(0);
    out.target = left > A(0) ? p.target + (A(1) - eta) : A(1);
    out.revised = true;
  }
  if (out.revised) {
    out.log_beta = row_log(out.beta);
    out.log_target = row_log(out.target);
    out.log_others = p.log_others + out.log_beta;
    out.others = out.beta * p.others;
  }
  return out;
}

// A revision at the temperature R changes the target's logit only: to this value, relative to the
// anchor of p. p and revision are at R. Infinite if the others' probability is 0.
template <typename A>
LRDS_HOST_DEVICE inline A revised_logit(const Split<A>& p, const Revision<A>& revision, A r) {
  return r * (revision.log_target - revision.log_beta + p.total);
}

// The revision of revised_logit at another temperature T, at which p is the teacher. sum_others is
// the sum of exponentials over the others at T; target_shift is the target's new logit relative to
// the anchor, divided by T.
template <typename A>
LRDS_HOST_DEVICE inline Revision<A> softened(const Split<A>& p, A sum_others, A target_shift) {
  const Split<A> revised = split(sum_others, target_shift);
  const A log_beta = p.total - revised.total;
  return Revision<A>{
      row_exp(log_beta), log_beta, revised.log_target, revised.log_others, revised.target,
      revised.others,    true};
}

}  // namespace lrds
