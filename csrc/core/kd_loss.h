// One row of the distillation loss: statistics that merge, loss terms and gradient coefficients.
//
//   L       = w_ce * CE(z, y) + w_kd * T^2 * KL(p' || q)
//   dL/dz_k = w_ce * softmax(z)_k + w_kd * T * q_k - w_kd * T * beta * p_k - smoothing,
//             plus a constant at k = y
//
//   q = softmax(z / T), p = softmax(v / T), p' = p after label revision; beta = 1 on rows that are
//   not revised.
//
// Apart from its logits at y, a row is summarised by RowStats, which merge like the statistics of
// an online softmax: each lane, warp, block or cluster keeps one, and they are merged in a fixed
// order.
#pragma once

#include <cmath>
#include <cstdint>

// These functions have internal linkage: each translation unit keeps its own copy, compiled for its
// instruction set, so the linker cannot use an AVX-512 copy on a CPU without AVX-512.
#if defined(__CUDACC__) || defined(LRDS_SIMT)
#define LRDS_HOST_DEVICE static __host__ __device__
// For functions that only kernels instantiate.
#define LRDS_DEVICE static __device__
#define LRDS_DEVICE_MEMBER __device__
#else
#define LRDS_HOST_DEVICE static
#define LRDS_DEVICE static
#define LRDS_DEVICE_MEMBER
#endif

namespace lrds {

enum class DType : std::int32_t { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };
enum class Revise : std::int32_t { kNone = 0, kLabelRevision = 1, kMft = 2, kSwap = 3 };
enum class Reduction : std::int32_t { kNone = 0, kMean = 1, kSum = 2, kElementMean = 3 };
enum class SelectedType : std::int32_t { kPrefix = 0, kBool = 1, kFloat32 = 2, kFloat64 = 3 };

// Flags of a row. Their counts are n_valid, n_selected and n_revised of kd_loss_parts.
enum RowFlag : std::uint8_t { kRowValid = 1, kRowSelected = 2, kRowRevised = 4 };

// The parameters that all rows share. A is the accumulation type: double if the student's or the
// teacher's logits are double, else float.
template <typename A>
struct RowParams {
  A temperature;
  A inv_temperature;
  A ce_weight;             // of a fully selected row
  A ce_weight_unselected;  // of a row without teacher
  A kd_weight;
  A eta;
  A label_smoothing;
  Revise revise;
  // For label revision at its own temperature R: 1 / R and R / T. revision_ratio is 0, and both are
  // unused, where R equals T.
  A inv_revise_temperature;
  A revision_ratio;
};

// The statistics of a row or of a part of it. Fields that the row's terms do not need keep their
// initial value. Exponentials are relative to anchor(max), which is the maximum, or 0 for a part of
// only -inf, so that no part computes (-inf) - (-inf). A whole row of -inf gives NaN.
//   max_z      max z_k
//   sum_z      sum exp(z_k - anchor(max_z))                      (cross-entropy)
//   sum_zt     sum exp((z_k - anchor(max_z)) / T)                (distillation)
//   sum_shift  sum (z_k - anchor(max_z))                         (label smoothing)
//   max_v      max v_k
//   sum_vt     sum exp((v_k - anchor(max_v)) / T)
//   dot        sum exp((v_k - anchor(max_v)) / T) * (dv_k - dz_k), where
//              dv_k = v_k - anchor(max_v) and dz_k = z_k - anchor(max_z);
//              terms whose exponential is 0 are left out, because 0 * inf = NaN
// To merge two parts, rebase_row_stats both to the common maxima, then add_row_stats.
template <typename A>
struct RowStats {
  A max_z;
  A sum_z;
  A sum_zt;
  A sum_shift;
  A max_v;
  A sum_vt;
  A dot;
};

template <typename A>
LRDS_HOST_DEVICE inline A negative_infinity() {
  return -static_cast<A>(INFINITY);
}

template <typename A>
LRDS_HOST_DEVICE inline RowStats<A> empty_row_stats() {
  return RowStats<A>{negative_infinity<A>(), A(0), A(0), A(0), negative_infinity<A>(), A(0), A(0)};
}

// The mathematical functions of a row, overloaded by type.
LRDS_HOST_DEVICE inline float row_exp(float x) { return expf(x); }
LRDS_HOST_DEVICE inline double row_exp(double x) { return exp(x); }
LRDS_HOST_DEVICE inline float row_log(float x) { return logf(x); }
LRDS_HOST_DEVICE inline double row_log(double x) { return log(x); }
LRDS_HOST_DEVICE inline float row_sqrt(float x) { return sqrtf(x); }
LRDS_HOST_DEVICE inline double row_sqrt(double x) { return sqrt(x); }
LRDS_HOST_DEVICE inline float row_log1p(float x) { return log1pf(x); }
LRDS_HOST_DEVICE inline double row_log1p(double x) { return log1p(x); }
LRDS_HOST_DEVICE inline float row_expm1(float x) { return expm1f(x); }
LRDS_HOST_DEVICE inline double row_expm1(double x) { return expm1(x); }

// a / b for b away from the ends of the range. On the device it is accurate to 2 ulp and takes a
// fifth of the instructions of a division.
#if defined(__CUDA_ARCH__)
LRDS_HOST_DEVICE inline float row_divide(float a, float b) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
}
#else
LRDS_HOST_DEVICE inline float row_divide(float a, float b) { return a / b; }
#endif
LRDS_HOST_DEVICE inline double row_divide(double a, double b) { return a / b; }

template <typename A>
LRDS_HOST_DEVICE inline A anchor(A max) {
  return max == negative_infinity<A>() ? A(0) : max;
}

// Makes `stats`, gathered over `count` classes, relative to the maxima of the whole row, which must
// not be smaller.
template <typename A>
LRDS_HOST_DEVICE inline void rebase_row_stats(RowStats<A>& stats, A max_z, A max_v, A count,
                                              A inv_temperature) {
  const A down_z = anchor(stats.max_z) - anchor(max_z);
  const A down_v = anchor(stats.max_v) - anchor(max_v);
  if (stats.max_z != negative_infinity<A>()) {
    stats.sum_z *= row_exp(down_z);
    stats.sum_zt *= row_exp(down_z * inv_temperature);
  }
  stats.sum_shift += count * down_z;
  if (stats.max_v != negative_infinity<A>()) {
    const A scale = row_exp(down_v * inv_temperature);
    // An underflowed part becomes 0 before its possibly infinite factor could turn it into NaN.
    stats.dot = scale == A(0) ? A(0) : scale * (stats.dot + stats.sum_vt * (down_v - down_z));
    stats.sum_vt *= scale;
  }
  stats.max_z = max_z;
  stats.max_v = max_v;
}

// Adds the sums of `part`, which must have the same maxima.
template <typename A>
LRDS_HOST_DEVICE inline void add_row_stats(RowStats<A>& stats, const RowStats<A>& part) {
  stats.sum_z += part.sum_z;
  stats.sum_zt += part.sum_zt;
  stats.sum_shift += part.sum_shift;
  stats.sum_vt += part.sum_vt;
  stats.dot += part.dot;
}

// The result of a row.
//   ce, kd         loss terms, weighted, before the reduction
//   coefficient_*  dL/dz_k = coefficient_z  * exp(z_k - anchor(max_z))
//                          + coefficient_zt * exp((z_k - anchor(max_z)) / T)
//                          - coefficient_vt * exp((v_k - anchor(max_v)) / T)
//                          - smoothing
//   at_target      added to the above at k = y
template <typename A>
struct RowResult {
  A ce;
  A kd;
  A coefficient_z;
  A coefficient_zt;
  A coefficient_vt;
  A smoothing;
  A at_target;
  bool revised;
};

// The weights of a row's two terms.
template <typename A>
struct RowWeights {
  A ce;
  A kd;
};

template <typename A>
LRDS_HOST_DEVICE inline RowWeights<A> row_weights(const RowParams<A>& params, A w) {
  // w is the row's selection weight. w = 0 and w = 1 give exactly one side's weight: weights are
  // finite, so 0 * inf cannot occur.
  return RowWeights<A>{w * params.ce_weight + (A(1) - w) * params.ce_weight_unselected,
                       w * params.kd_weight};
}

// Whether the teacher is wrong. A tie between the target and another class counts as right.
template <typename A>
LRDS_HOST_DEVICE inline bool teacher_is_wrong(A v_y, A max_v) {
  return v_y < max_v;
}

// The values at the target that finish_row needs, relative to the maxima that the sums of the row
// are relative to.
//   z_shift, v_shift    z_y and v_y
//   v_term, max_v_term  exp(v_y / T) (if wrong) and exp(max v / T)
//   revised_shift       the target's logit after a revision at another temperature, less max v and
//                       divided by T (if wrong)
//   wrong               whether to revise the row
template <typename A>
struct RowTarget {
  A z_shift;
  A v_shift;
  A v_term;
  A max_v_term;
  A revised_shift;
  bool wrong;
};

// Whether a row is revised at the revision's own temperature, so that sum_vr is needed.
template <typename A>
LRDS_HOST_DEVICE inline bool needs_sum_vr(const RowParams<A>& params, A v_y, A max_v) {
  return params.revision_ratio > A(0) && teacher_is_wrong(v_y, max_v);
}

// RowTarget::revised_shift. gap = v_y - max v; sum_vr = sum exp((v_k - max v) / R). The revision
// changes the target's logit only, so that softmax(v' / R) = p'.
template <typename A>
LRDS_HOST_DEVICE inline A revised_target(A gap, A sum_vr, const RowParams<A>& params) {
  const A e_y = row_exp(gap * params.inv_revise_temperature);
  const A lifted = e_y + (sum_vr * (A(1) - params.eta) + (A(1) - e_y)) / params.eta;
  return params.revision_ratio * row_log(lifted);
}

// RowTarget relative to the maxima of stats. sum_vr is read if needs_sum_vr.
template <typename A>
LRDS_HOST_DEVICE inline RowTarget<A> row_target(const RowStats<A>& stats, A z_y, A v_y, A sum_vr,
                                                const RowParams<A>& params) {
  const A v_shift = v_y - stats.max_v;
  const bool wrong = params.revise != Revise::kNone && teacher_is_wrong(v_y, stats.max_v);
  return RowTarget<A>{
      z_y - stats.max_z,
      v_shift,
      wrong ? row_exp(v_shift * params.inv_temperature) : A(0),
      A(1),
      wrong && params.revision_ratio > A(0) ? revised_target(v_shift, sum_vr, params) : A(0),
      wrong};
}

// Loss terms and gradient coefficients of a row. The sums in stats must be complete for the terms
// with a weight other than 0; if weights.kd is 0, only z_shift of target is read. gradient_scale
// multiplies the gradient coefficients but not the loss terms.
template <typename A>
LRDS_HOST_DEVICE inline RowResult<A> finish_row(const RowStats<A>& stats,
                                                const RowTarget<A>& target,
                                                const RowParams<A>& params, RowWeights<A> weights,
                                                A classes, A gradient_scale) {
  RowResult<A> out{A(0), A(0), A(0), A(0), A(0), A(0), A(0), false};
  if (weights.ce != A(0)) {
    const A log_sum = row_log(stats.sum_z);
    const A smoothing = params.label_smoothing;
    const A scaled = weights.ce * gradient_scale;
    // The reference of the sum may be rounded; the CE of a certain row must not fall below 0.
    const A surprise = log_sum - target.z_shift;
    A ce = (A(1) - smoothing) * (surprise < A(0) ? A(0) : surprise);
    if (smoothing != A(0)) {
      ce += smoothing * (log_sum - stats.sum_shift / classes);
      out.smoothing = scaled * smoothing / classes;
    }
    out.ce = weights.ce * ce;
    out.coefficient_z = row_divide(scaled, stats.sum_z);
    out.at_target = -scaled * (A(1) - smoothing);
  }
  if (weights.kd != A(0)) {
    const A t = params.temperature;
    const A inv_t = params.inv_temperature;
    const A log_sum_z = row_log(stats.sum_zt);
    const A log_sum_v = row_log(stats.sum_vt);
    A beta = A(1);
    A kl = row_divide(stats.dot * inv_t, stats.sum_vt) - log_sum_v + log_sum_z;
    if (target.wrong) {
      const A log_p_y = target.v_shift * inv_t - log_sum_v;
      const A log_q_y = target.z_shift * inv_t - log_sum_z;
      const A p_y = row_divide(target.v_term, stats.sum_vt);
      const A p_max = row_divide(target.max_v_term, stats.sum_vt);
      if (params.revision_ratio > A(0)) {
        // Z / (Z - E_y + E'_y), with numerator and denominator divided by E'_y, which may overflow.
        const A down = row_divide(row_exp(-target.revised_shift), target.max_v_term);
        beta = row_divide(stats.sum_vt * down, A(1) + (stats.sum_vt - target.v_term) * down);
      } else {
        beta = params.eta / (A(1) + p_max - p_y);
      }
      const A revised_y = beta * p_y + (A(1) - beta);
      // The target's term of the KL is replaced by its revised one. p_y may have underflowed, and
      // then 0 log 0 = 0. A student that excludes the target (q_y = 0) has an infinite loss,
      // whatever the KL of the other classes.
      const A teacher_term = p_y > A(0) ? p_y * (log_p_y - log_q_y) : A(0);
      const A others =
          beta > A(0) ? beta * (A(1) - p_y) * row_log(beta) + beta * (kl - teacher_term) : A(0);
      kl = log_q_y == negative_infinity<A>() ? static_cast<A>(INFINITY)
                                             : others + revised_y * (row_log(revised_y) - log_q_y);
      out.revised = true;
    }
    out.kd = weights.kd * t * t * kl;
    const A scaled = weights.kd * t * gradient_scale;
    out.coefficient_zt = row_divide(scaled, stats.sum_zt);
    out.coefficient_vt = row_divide(scaled * beta, stats.sum_vt);
    out.at_target -= scaled * (A(1) - beta);
  }
  return out;
}

// finish_row with the sums relative to the maxima of stats. z_y and v_y are the logits at the
// target; sum_vr is that of row_target.
template <typename A>
LRDS_HOST_DEVICE inline RowResult<A> finish_row(const RowStats<A>& stats, A z_y, A v_y, A sum_vr,
                                                const RowParams<A>& params, RowWeights<A> weights,
                                                A classes, A gradient_scale) {
  return finish_row(stats, row_target(stats, z_y, v_y, sum_vr, params), params, weights, classes,
                    gradient_scale);
}

// 1 / denominator, and 0 for a denominator of 0.
LRDS_HOST_DEVICE inline double inverse_of_denominator(double denominator) {
  return denominator == 0.0 ? 0.0 : 1.0 / denominator;
}

// inverse_of_denominator of a reduction.
template <typename A>
LRDS_HOST_DEVICE inline A reduction_scale(Reduction reduction, A valid_rows, A classes) {
  if (reduction == Reduction::kNone || reduction == Reduction::kSum) return A(1);
  const A count = reduction == Reduction::kElementMean ? valid_rows * classes : valid_rows;
  return count == A(0) ? A(0) : A(1) / count;
}

// 1 / denominator of each term. The two differ only with class weights.
struct TermScales {
  double ce;
  double kd;
};

constexpr int kMaxTemperatures = 8;

// The moments of a row, where g = d CE / dz, h = d KD / dz and r is the row's `direction`: CE, KD,
// g.g, h.h, g.h, g.r, h.r, r_y - mean(r).
enum Moment : int {
  kMomentCe = 0,
  kMomentKd = 1,
  kMomentCeCe = 2,
  kMomentKdKd = 3,
  kMomentCeKd = 4,
  kMomentCeAlong = 5,
  kMomentKdAlong = 6,
  kMomentTarget = 7,
  kMoments = 8
};

// The arguments of one call, for the kernels of both devices: pointers, sizes, and strides in
// elements. The last stride of every logit tensor is 1. accumulate is kFloat64 if the student's or
// the teacher's logits are, else kFloat32; A below is that type.
struct KdLossArgs {
  std::int64_t rows;
  std::int64_t classes;
  const void* student;  // (rows, classes)
  std::int64_t student_stride;
  DType student_type;
  // (teacher_rows, classes); teacher_rows < rows only with SelectedType::kPrefix
  const void* teacher;
  std::int64_t teacher_stride;
  std::int64_t teacher_rows;
  DType teacher_type;
  const void* target;  // (rows,), int64 or int32
  bool target_is_int64;
  std::int64_t ignore_index;
  const void* selected;  // (rows,) of selected_type; unused for kPrefix: the first teacher_rows
                         // rows are selected
  SelectedType selected_type;

  double temperature;
  double ce_weight;
  double ce_weight_unselected;
  double kd_weight;
  double eta;
  double label_smoothing;
  Revise revise;
  double revise_temperature;  // temperature of label revision; 0: the temperature of each KD term
  Reduction reduction;
  DType accumulate;

  // Options that a call with is_plain() does not use.
  std::int32_t divergence;  // index in Divergences (divergences.h)
  double divergence_parameters[3];
  bool standardize;
  std::int32_t temperature_count;
  // temperature is the first of them; the KD terms at all of them are added.
  double temperatures[kMaxTemperatures];
  // A[rows * classes] or null. With it, target is unused and no row is ignored.
  const void* soft_target;
  const void* class_weight;  // A[classes] or null
  const void* weight_sum;    // A[1] or null: replaces the sum of the valid rows' class weights
  // A cached teacher: `teacher` holds kept_classes logits per row, teacher_indices their classes,
  // and teacher_rest logsumexp(v / temperature) over the other classes, which get equal logits.
  std::int64_t kept_classes;            // 0: the teacher is dense
  const std::int64_t* teacher_indices;  // (teacher_rows, kept_classes) contiguous
  const void* teacher_rest;             // A[teacher_rows]

  double* workspace;  // CUDA: kd_loss_workspace_doubles(args) doubles on the device; null for none

  // Inner products of a row's two logit gradients, which the scores of data selection need, instead
  // of a loss: g = d CE / dz and h = d KD / dz, both of terms with weight 1.
  const void* direction;  // A, (rows, classes), or null: r = 0
  std::int64_t direction_stride;
  void* moments;  // A[kMoments * rows], one moment after another, or null
  // The teacher's top class. Of several it is the target, if that is one of them, else the lowest.
  std::int64_t* teacher_top;
  void* moments_scratch;  // CUDA: see cuda/kd_moments.h

  const void* num_valid;    // A[1] or null: replaces the count of valid rows in the denominator
  const void* grad_scale;   // A[1] or null: multiplies the gradient before it is rounded
  const void* grad_output;  // null, or A[rows] / A[1] for grad_output_stride 1 / 0: multiplies
                            // each row's gradient
  std::int64_t grad_output_stride;

  void* gradient;  // (rows, classes) contiguous, of student_type; null: no gradient
  void* ce;  // A[rows] each: weighted terms of every row before the reduction; unused if counts is
             // null
  void* kd;
  std::uint8_t* flags;  // RowFlag bits of every row

  // Written by the finalize step. With Reduction::kNone, loss is A[rows] (ce + kd), and loss_ce and
  // loss_kd are unused.
  void* loss;
  void* loss_ce;
  void* loss_kd;
  std::int64_t* counts;  // n_valid, n_selected, n_revised; null: only the gradient is computed
};

// Whether a call needs only the default loss, for which both devices have their fastest kernels.
LRDS_HOST_DEVICE inline bool is_plain(const KdLossArgs& args) {
  return args.divergence == 0 && !args.standardize && args.temperature_count <= 1 &&
         args.soft_target == nullptr && args.class_weight == nullptr && args.kept_classes == 0 &&
         args.moments == nullptr &&
         (args.revise == Revise::kNone || args.revise == Revise::kLabelRevision);
}

// Whether the mean of the CE is over class weights instead of rows.
LRDS_HOST_DEVICE inline bool weighs_rows(const KdLossArgs& args) {
  return args.reduction == Reduction::kMean && args.class_weight != nullptr &&
         args.soft_target == nullptr;
}

// Whether label revision uses another temperature than this one.
LRDS_HOST_DEVICE inline bool revises_elsewhere(const KdLossArgs& args, double temperature) {
  return args.revise_temperature > 0.0 && args.revise_temperature != temperature &&
         (args.revise == Revise::kLabelRevision || args.revise == Revise::kMft);
}

template <typename A>
LRDS_HOST_DEVICE inline RowParams<A> row_params(const KdLossArgs& args) {
  const bool elsewhere = revises_elsewhere(args, args.temperature);
  return RowParams<A>{static_cast<A>(args.temperature),
                      static_cast<A>(1.0 / args.temperature),
                      static_cast<A>(args.ce_weight),
                      static_cast<A>(args.ce_weight_unselected),
                      static_cast<A>(args.kd_weight),
                      static_cast<A>(args.eta),
                      static_cast<A>(args.label_smoothing),
                      args.revise,
                      static_cast<A>(elsewhere ? 1.0 / args.revise_temperature : 0.0),
                      static_cast<A>(elsewhere ? args.revise_temperature / args.temperature : 0.0)};
}

}  // namespace lrds
