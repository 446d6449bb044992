// What a divergence between teacher and student is made of, seen from one row at one temperature T.
//
// A row is its target y and "the others", every k != y. Sums run over the others alone, and the
// target joins in closed form: so log(1 - q_y) is a logsumexp over the others and never the log of
// a difference, and label revision, which scales the others by one number and sets the target,
// happens after the sums. q = softmax(z / T), p = softmax(v / T), p' = p revised.
//
// A divergence is a struct in a file of its own (divergence_kl.h is the shortest to read), listed
// in divergences.h. Its element functions take X, a number or a SIMD vector of them, through a math
// M:
//   kRevised             is it taken of the revised teacher
//   kSums, kSecondSums   how many sums it needs, without and with its coefficients known
//   kClasses             over which classes: the others, or those of them below the target
//   kSecondTemperature   which further temperature it looks at
//   add          one class into its sums
//   prepare      statistics -> coefficients                          (kSecondSums > 0)
//   add_second   one class into its second sums                      (kSecondSums > 0)
//   finish       statistics and what prepare made -> loss, gradient at the target, coefficients
//   gradient     coefficients -> d loss / dz_k of another class k
// All are templates of M, also where they do not use it: with M a type of one translation unit, so
// are they, and the linker cannot mix instruction sets.
#pragma once

#include <limits>

#include "core/kd_loss.h"

namespace lrds {

enum class Classes : std::int32_t { kOthers = 0, kBelowTarget = 1 };
enum class SecondTemperature : std::int32_t { kNone = 0, kOne = 1, kParameter = 2 };

constexpr int kMaxSums = 2;
constexpr int kMaxCoefficients = 6;

// What softmax(x / T) gives the target and the others together.
//   total       log sum_k exp((x_k - anchor) / T), anchor the maximum of the others
//   log_target, log_others, target, others    log q_y, log(1 - q_y), q_y, 1 - q_y
template <typename A>
struct Split {
  A total;
  A log_target;
  A log_others;
  A target;
  A others;
};

// A teacher's distribution after revision: others' probabilities are beta * p.
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
// divergence's classes: z_k - max_z and so on.
template <typename A>
struct DistillStats {
  A temperature;
  A inv_temperature;
  A classes;
  A z_y, v_y,
      anchor_v;    // as Element::z and v are; anchor_v is what v was exponentiated relative to
  bool wrong;      // another class's logit is above the target's
  A sum_z, sum_v;  // sum exp((z_k - max_z) / T), likewise v, over the divergence's classes
  A sums[kMaxSums];
  A second[kMaxSums];
  Split<A> student, teacher;  // at T; unset for Classes::kBelowTarget
  Revision<A> revision;       // at T
  A second_temperature;
  A second_sum_z;   // over the others, at the second temperature
  A second_rest_v;  // over the others but one of the largest; of SecondTemperature::kParameter
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

// One class as the element functions see it. Outside the divergence's classes ez and ev are 0.
template <typename X>
struct Element {
  X z, v;      // the logits, both less the same number
  X dz, dv;    // the same less their anchors
  X ez, ev;    // exp(dz / T), exp(dv / T)
  X second_z;  // exp((z_k - max of the others) / second temperature)
};

// x * y with 0 * anything = 0.
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

// From the sum over the others and the target's (x_y - anchor) / T.
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

// q_y - p_y of two distributions over the target and the others: by the smaller of the two sides,
// so that nothing is lost where both are close to 1.
template <typename A>
LRDS_HOST_DEVICE inline A excess(A q_y, A q_others, A p_y, A p_others) {
  return q_y > q_others ? p_others - q_others : q_y - p_y;
}

// KL(phat || qhat) over the divergence's classes, from dot = sum_k ev (dv - dz) / T: 0 where the
// teacher has none of them, infinite where the student alone has none.
template <typename A>
LRDS_HOST_DEVICE inline A renormalised_kl(A dot, A sum_v, A sum_z) {
  if (sum_v == A(0)) return A(0);
  if (sum_z == A(0)) return static_cast<A>(INFINITY);
  return dot / sum_v - row_log(sum_v) + row_log(sum_z);
}

// x / sum, 0 for an empty sum.
template <typename A>
LRDS_HOST_DEVICE inline A over_sum(A x, A sum) {
  return sum == A(0) ? A(0) : x / sum;
}

template <typename A>
LRDS_HOST_DEVICE inline Revision<A> unrevised(const Split<A>& p) {
  return Revision<A>{A(1), A(0), p.log_target, p.log_others, p.target, p.others, false};
}

// The revision of p towards a target that carries the probability `mass` (1 for a class index) and
// leads the next one by `margin` (1 likewise): on rows where the teacher is wrong,
// beta = eta * margin / (margin + p_max - p_y). "mft" also lifts right rows, to
// p'_y = min(1, p_y + 1 - eta). gap: (v_max - v_y) / T, positive where the teacher is wrong.
template <typename A>
LRDS_HOST_DEVICE inline Revision<A> revise(const Split<A>& p, bool wrong, A gap, Revise policy,
                                           A eta, A mass, A margin) {
  Revision<A> out = unrevised(p);
  if (wrong && (policy == Revise::kLabelRevision || policy == Revise::kMft)) {
    // p_max - p_y; the others' largest exponential is exp(0).
    const A lead = -row_exp(-p.total) * row_expm1(-gap);
    out.beta = margin == A(0) ? A(0) : eta * margin / (margin + lead);
    out.target = out.beta * p.target + (A(1) - out.beta) * mass;
    out.revised = true;
  } else if (policy == Revise::kMft && p.log_others > negative_infinity<A>()) {
    // p'_y = p_y + min(1 - eta, 1 - p_y); the others keep what is left.
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

// A revision at the temperature R moves the target's logit alone: to this, less the anchor of p,
// where p and its revision are at R. Infinite where nothing is left for the others.
template <typename A>
LRDS_HOST_DEVICE inline A revised_logit(const Split<A>& p, const Revision<A>& revision, A r) {
  return r * (revision.log_target - revision.log_beta + p.total);
}

// That revision at another temperature, where p is the teacher: from the sum over the others, and
// the target's new logit less the anchor, over that temperature.
template <typename A>
LRDS_HOST_DEVICE inline Revision<A> softened(const Split<A>& p, A sum_others, A target_shift) {
  const Split<A> revised = split(sum_others, target_shift);
  const A log_beta = p.total - revised.total;
  return Revision<A>{
      row_exp(log_beta), log_beta, revised.log_target, revised.log_others, revised.target,
      revised.others,    true};
}

}  // namespace lrds
