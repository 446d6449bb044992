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

// Internal linkage on purpose: translation units for different instruction sets each keep their own
// copy, so that the linker can never hand an AVX-512 body to a CPU without it.
#if defined(__CUDACC__) || defined(LRDS_SIMT)
#define LRDS_HOST_DEVICE static __host__ __device__
// Of what only a kernel instantiates.
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

// Per-row outcome bits; their counts are the n_valid, n_selected, n_revised of kd_loss_parts.
enum RowFlag : std::uint8_t { kRowValid = 1, kRowSelected = 2, kRowRevised = 4 };

// What is the same for every row. A is the accumulation type: float, or double if any logits are
// double.
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
  // Label revision at a temperature R of its own. revision_ratio is R / T, or 0 where R is T: then
  // neither is used.
  A inv_revise_temperature;
  A revision_ratio;
};

// The statistics of one row, or of a part of it. Fields that a row's weights make unnecessary stay
// at their identity. Exponentials are relative to anchor(max): the maximum, or 0 where a part holds
// only -inf, so that (-inf) - (-inf) is never formed for a part; a whole row of -inf still ends as
// NaN.
//   max_z      max z_k
//   sum_z      sum exp(z_k - anchor(max_z))                      (cross-entropy)
//   sum_zt     sum exp((z_k - anchor(max_z)) / T)                (distillation)
//   sum_shift  sum (z_k - anchor(max_z))                         (label smoothing)
//   max_v      max v_k
//   sum_vt     sum exp((v_k - anchor(max_v)) / T)
//   dot        sum exp((v_k - anchor(max_v)) / T) * (dv_k - dz_k), where
//              dv_k = v_k - anchor(max_v) and dz_k = z_k - anchor(max_z);
//              terms whose exponential is 0 are left out, because 0 * inf = NaN
// Two parts merge by rebase_row_stats to the common maxima, then add_row_stats.
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

// exp(x) that the caller may override on the device; the host and tests use the standard library.
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

// a / b, where b is far from the ends of the range; on the device within 2 ulp and in a fifth of
// the instructions.
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

// Expresses `stats`, gathered over `count` classes, relative to the (not smaller) maxima of the
// whole row.
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
    // What underflows leaves the sum before its (possibly infinite) cofactor can make it NaN.
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

// A row's weights. w is its selection weight; 0 is exactly unselected.
template <typename A>
struct RowWeights {
  A ce;
  A kd;
};

template <typename A>
LRDS_HOST_DEVICE inline RowWeights<A> row_weights(const RowParams<A>& params, A w) {
  // w = 0 and w = 1 are exact: 1 * inf or 0 * inf of the other side's weight cannot arise, weights
  // are finite.
  return RowWeights<A>{w * params.ce_weight + (A(1) - w) * params.ce_weight_unselected,
                       w * params.kd_weight};
}

// Is the teacher wrong? A tie that the label takes part in counts as right.
template <typename A>
LRDS_HOST_DEVICE inline bool teacher_is_wrong(A v_y, A max_v) {
  return v_y < max_v;
}

// What a row's end takes of its maxima and of the logits at the target, relative to what the
// exponentials of the row's sums are relative to.
//   z_shift, v_shift   z_y and v_y
//   v_term, max_v_term their exponentials over T: of v_y (if wrong) and of max v
//   revised_shift      the target's logit after a revision at another temperature, less max v and
//                      over T (if wrong)
//   wrong              is the row to be revised?
template <typename A>
struct RowTarget {
  A z_shift;
  A v_shift;
  A v_term;
  A max_v_term;
  A revised_shift;
  bool wrong;
};

// Is a row with these logits revised at a temperature of its own, for which sum_vr is needed?
template <typename A>
LRDS_HOST_DEVICE inline bool needs_sum_vr(const RowParams<A>& params, A v_y, A max_v) {
  return params.revision_ratio > A(0) && teacher_is_wrong(v_y, max_v);
}

// RowTarget::revised_shift. gap: v_y - max v. sum_vr: sum exp((v_k - max v) / R). The revision
// moves the target's logit alone, to where softmax(v' / R) = p'.
template <typename A>
LRDS_HOST_DEVICE inline A revised_target(A gap, A sum_vr, const RowParams<A>& params) {
  const A e_y = row_exp(gap * params.inv_revise_temperature);
  const A lifted = e_y + (sum_vr * (A(1) - params.eta) + (A(1) - e_y)) / params.eta;
  return params.revision_ratio * row_log(lifted);
}

// Relative to the maxima themselves. sum_vr: where needs_sum_vr.
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

// The sums of stats must be complete for the terms whose weight is not 0 (of target all but z_shift
// is unused if weights.kd is 0). gradient_scale multiplies the gradient coefficients alone.
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
    // What the sum is relative to may be rounded: no loss of a certain row is below 0.
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
        // Z / (Z - E_y + E'_y), over E'_y, which may be too large for A.
        const A down = row_divide(row_exp(-target.revised_shift), target.max_v_term);
        beta = row_divide(stats.sum_vt * down, A(1) + (stats.sum_vt - target.v_term) * down);
      } else {
        beta = params.eta / (A(1) + p_max - p_y);
      }
      const A revised_y = beta * p_y + (A(1) - beta);
      // The target's own term leaves K and comes back revised. Its probability may have underflown
      // (0 log 0 = 0), and a student that excludes the target (q_y = 0) has an infinite loss
      // however large K is.
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

// The same, where the exponentials are relative to the maxima of stats; z_y, v_y are the logits at
// the target; sum_vr as row_target takes it.
template <typename A>
LRDS_HOST_DEVICE inline RowResult<A> finish_row(const RowStats<A>& stats, A z_y, A v_y, A sum_vr,
                                                const RowParams<A>& params, RowWeights<A> weights,
                                                A classes, A gradient_scale) {
  return finish_row(stats, row_target(stats, z_y, v_y, sum_vr, params), params, weights, classes,
                    gradient_scale);
}

// 1 / denominator, 0 for a denominator of 0.
LRDS_HOST_DEVICE inline double inverse_of_denominator(double denominator) {
  return denominator == 0.0 ? 0.0 : 1.0 / denominator;
}

// inverse_of_denominator for a reduction.
template <typename A>
LRDS_HOST_DEVICE inline A reduction_scale(Reduction reduction, A valid_rows, A classes) {
  if (reduction == Reduction::kNone || reduction == Reduction::kSum) return A(1);
  const A count = reduction == Reduction::kElementMean ? valid_rows * classes : valid_rows;
  return count == A(0) ? A(0) : A(1) / count;
}

// What the denominators make of each term: they differ only under class weights.
struct TermScales {
  double ce;
  double kd;
};

constexpr int kMaxTemperatures = 8;

// The moments of a row: CE, KD, g.g, h.h, g.h, g.r, h.r, r_y - mean(r).
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

// One call, as both devices' sweeps take it: plain pointers, sizes and strides in elements. The
// last stride of every logit tensor is 1. accumulate is kFloat64 if either logits are, else
// kFloat32; A below is that type.
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
  double revise_temperature;  // of the revision, over which p' is then softened; 0: each T itself
  Reduction reduction;
  DType accumulate;

  // The wider family. A call that is_plain() has none of it.
  std::int32_t divergence;  // code, the index in Divergences (divergences.h)
  double divergence_parameters[3];
  bool standardize;
  std::int32_t temperature_count;
  // temperature is the first of them; the KD terms at all of them are added.
  double temperatures[kMaxTemperatures];
  const void* soft_target;   // A[rows * classes] or null: target is unused, no row is ignored
  const void* class_weight;  // A[classes] or null
  const void* weight_sum;    // A[1] or null: replaces the sum of the valid rows' class weights
  // A cached teacher: `teacher` holds kept_classes logits a row, teacher_indices their classes, and
  // teacher_rest logsumexp(v / temperature) over all others, which share it evenly.
  std::int64_t kept_classes;            // 0: the teacher is dense
  const std::int64_t* teacher_indices;  // (teacher_rows, kept_classes) contiguous
  const void* teacher_rest;             // A[teacher_rows]

  double* workspace;  // CUDA: kd_loss_workspace_doubles(args) doubles on the device; null for none

  // What the scores of data selection need of a row's two logit gradients, instead of a loss. Both
  // are of terms with weight 1: g = d CE / dz, h = d KD / dz.
  const void* direction;  // A, (rows, classes), or null: r = 0
  std::int64_t direction_stride;
  void* moments;              // A[kMoments * rows], one moment after the other, or null
  std::int64_t* teacher_top;  // the teacher's top class: the target if it is one, else the lowest
  void* moments_scratch;      // CUDA: see cuda/kd_moments.h

  const void* num_valid;    // A[1] or null: replaces the count of valid rows in the denominator
  const void* grad_scale;   // A[1] or null: folded into the gradient before it is rounded
  const void* grad_output;  // null, or A[rows] / A[1] by grad_output_stride (1 / 0): multiplies
                            // each row's gradient
  std::int64_t grad_output_stride;

  void* gradient;  // (rows, classes) contiguous, of student_type; null: no gradient
  void* ce;  // A[rows] each: weighted terms of every row before the reduction; unused if counts is
             // null
  void* kd;
  std::uint8_t* flags;  // RowFlag bits of every row

  // Filled by the finalize step. With Reduction::kNone loss is A[rows] (ce + kd) and loss_ce,
  // loss_kd are unused.
  void* loss;
  void* loss_ce;
  void* loss_kd;
  std::int64_t* counts;  // n_valid, n_selected, n_revised; null: only the gradient is wanted
};

// The default loss, for which both devices have their fastest kernels.
LRDS_HOST_DEVICE inline bool is_plain(const KdLossArgs& args) {
  return args.divergence == 0 && !args.standardize && args.temperature_count <= 1 &&
         args.soft_target == nullptr && args.class_weight == nullptr && args.kept_classes == 0 &&
         args.moments == nullptr &&
         (args.revise == Revise::kNone || args.revise == Revise::kLabelRevision);
}

// Is the mean's CE sum divided by class weights instead of rows?
LRDS_HOST_DEVICE inline bool weighs_rows(const KdLossArgs& args) {
  return args.reduction == Reduction::kMean && args.class_weight != nullptr &&
         args.soft_target == nullptr;
}

// Is p' made at another temperature than T?
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
