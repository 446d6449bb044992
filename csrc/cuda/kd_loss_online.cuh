// Online statistics of a row, for kernels that do not know its maxima in advance. A thread's sums
// are relative to references that follow its maxima; they are then made relative to the maxima of a
// warp, and of all threads that share the row. The gradient of an element uses the same arithmetic.
#pragma once

#include "cuda/kd_loss_row.cuh"

namespace lrds::cuda {

// --- Cases, each with its own copy of the loops ---

// In a case n >= 0, exp(z) is exp(z / T) squared n times.
constexpr int kAnyTemperature = -1;
constexpr int kNoTeacher = -2;  // the row's kd weight is 0: exp(z) is the only exponential
constexpr int kHuge = -3;       // for the gradient: the logits are too large for a scaled reference

template <int kCase>
constexpr bool kHasTeacher = kCase != kNoTeacher;

// Calls body with the case as std::integral_constant. Without kSquares, T gets no case of its own.
template <bool kSquares, class A, class Body>
__device__ inline void with_case(const Sweep<A>& sweep, bool reads_v, Body body) {
  if (!reads_v) return body(std::integral_constant<int, kNoTeacher>());
  if constexpr (kSquares) {
    with_squarings(sweep, body);
  } else {
    body(std::integral_constant<int, kAnyTemperature>());
  }
}

// --- Exponentials relative to a reference ---

template <class A>
__device__ inline A logit_of_unit(const Sweep<A>& sweep) {  // 1 / exp_t_scale
  return std::is_same_v<A, float> ? sweep.params.temperature * A(0.69314718055994531)
                                  : sweep.params.temperature;
}

__device__ inline float multiply_add(float x, float y, float z) { return fmaf(x, y, z); }
__device__ inline double multiply_add(double x, double y, double z) { return fma(x, y, z); }

// exp_unit(argument(x)) is exp(x * scale) relative to exp(scaled), where `scaled` is logit * scale
// after rounding. One multiply-add computes the argument, so that only its own rounding is lost.
// From kMostScaled on, the rounding of `scaled` would change results. There `scaled` is NaN, and so
// are the sums of arguments that multiply_add computes; a NaN sum makes add_vectors use argument(),
// which is relative to exp(logit * scale).
constexpr float kMostScaled = 1048576.0f;

template <class A>
__device__ inline A argument(A x, A scale, A logit, A scaled) {
  return scaled == scaled ? multiply_add(x, scale, -scaled) : (x - logit) * scale;
}

// The references of a row, or of a part of it, for student and teacher.
template <class A>
struct References {
  A logit_z, logit_v;  // 0 where there is no maximum
  A scaled_z, scaled_zt, scaled_vt;
};

// Whether the references for this maximum are NaN.
template <class A>
__device__ inline bool is_huge(const Sweep<A>& sweep, A logit) {
  const A scale = sweep.exp_scale > sweep.exp_t_scale ? sweep.exp_scale : sweep.exp_t_scale;
  return !(fabs(logit) * scale < A(kMostScaled));
}

template <class A>
__device__ inline References<A> references_at(const Sweep<A>& sweep, A max_z, A max_v) {
  const A nan = std::numeric_limits<A>::quiet_NaN();
  const A z = anchor(max_z), v = anchor(max_v);
  const bool huge_z = is_huge(sweep, z), huge_v = is_huge(sweep, v);
  return References<A>{z, v, huge_z ? nan : z * sweep.exp_scale,
                       huge_z ? nan : z * sweep.exp_t_scale, huge_v ? nan : v * sweep.exp_t_scale};
}

// --- A thread ---

// How far a maximum may rise above its reference before the sums are rebased, as the logarithm of
// the larger exponential. exp(5) is less exact than exp(0) by the rounding of its argument, 2^-22.
constexpr float kSlack = 5.0f;

template <class A>
struct ThreadStats {
  A max_z, max_v;      // of the elements added so far
  A limit_z, limit_v;  // limits of the maxima for these references; -inf: there is no maximum
  References<A> at;
  A sum_z, sum_zt, sum_vt;
  A dot;        // of exp_vt times (its argument - exp_zt's)
  A sum_shift;  // of z - logit_z; it and count are for label smoothing only
  A count;
};

template <class A>
__device__ inline ThreadStats<A> empty_thread_stats() {
  ThreadStats<A> stats{};
  stats.max_z = stats.max_v = stats.limit_z = stats.limit_v = negative_infinity<A>();
  return stats;
}

// Makes the sums relative to other references, whose logits must not be smaller. References of NaN
// in `scaled` mean the logits themselves.
template <int kCase, class A>
__device__ inline void rebase_thread(const Sweep<A>& sweep, const References<A>& to,
                                     ThreadStats<A>& stats) {
  const References<A>& at = stats.at;
  const auto down = [](A scale, A logit, A scaled, A to_logit, A to_scaled) {
    if (to_scaled != to_scaled) return -argument(to_logit, scale, logit, scaled);
    return scaled == scaled ? scaled - to_scaled : multiply_add(logit, scale, -to_scaled);
  };
  const A down_zt = down(sweep.exp_t_scale, at.logit_z, at.scaled_zt, to.logit_z, to.scaled_zt);
  if (stats.limit_z != negative_infinity<A>()) {
    const A factor_zt = exp_unit(down_zt);
    if constexpr (kCase >= 0) {
      stats.sum_z *= squared<kCase>(factor_zt);
    } else {
      stats.sum_z *=
          exp_unit(down(sweep.exp_scale, at.logit_z, at.scaled_z, to.logit_z, to.scaled_z));
    }
    stats.sum_zt *= factor_zt;
  }
  if (kHasTeacher<kCase> && stats.limit_v != negative_infinity<A>()) {
    const A down_vt = down(sweep.exp_t_scale, at.logit_v, at.scaled_vt, to.logit_v, to.scaled_vt);
    const A factor = exp_unit(down_vt);
    // An underflowed part becomes 0 before its possibly infinite factor could turn it into NaN.
    stats.dot = factor == A(0) ? A(0) : factor * (stats.dot + stats.sum_vt * (down_vt - down_zt));
    stats.sum_vt *= factor;
  }
  stats.sum_shift += stats.count * (at.logit_z - to.logit_z);
  stats.at = to;
}

// Adds the first `inside` of kChunk vectors that fetch(c, z, v) loads. The others must repeat
// elements of the row, so that they do not raise its maximum.
template <int kCase, int kChunk, class ZVec, class VVec, class A, class Fetch>
__device__ inline void add_vectors(const Sweep<A>& sweep, int inside, Fetch fetch,
                                   ThreadStats<A>& stats) {
  constexpr int kWidth = sizeof(ZVec) / sizeof(ZVec::element[0]);
  ZVec z_vectors[kChunk];
  VVec v_vectors[kChunk];
#pragma unroll
  for (int c = 0; c < kChunk; ++c) fetch(c, z_vectors[c], v_vectors[c]);
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    stats.max_z = vector_max(z_vectors[c], stats.max_z);
    if constexpr (kHasTeacher<kCase>) stats.max_v = vector_max(v_vectors[c], stats.max_v);
  }
  if (stats.max_z > stats.limit_z || stats.max_v > stats.limit_v) {
    const References<A> to = references_at(sweep, stats.max_z, stats.max_v);
    const A none = negative_infinity<A>();
    if (stats.limit_z == none && stats.limit_v == none) {
      stats.at = to;
    } else {
      rebase_thread<kCase>(sweep, to, stats);
    }
    const A t = sweep.params.temperature;
    stats.limit_z = stats.max_z + A(kSlack) * (t < A(1) ? t : A(1));
    stats.limit_v = stats.max_v + A(kSlack) * t;
  }
  const References<A>& at = stats.at;
  A z[kWidth], v[kWidth];
  A sum_z = A(0), sum_zt = A(0), sum_vt = A(0), dot = A(0);
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    widen_vector(z_vectors[c], z);
    widen_vector(v_vectors[c], v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if constexpr (kCase < 0) {
        sum_z += exp_unit(multiply_add(z[j], sweep.exp_scale, -at.scaled_z));
      }
      if constexpr (kHasTeacher<kCase>) {
        const A x_zt = multiply_add(z[j], sweep.exp_t_scale, -at.scaled_zt);
        const A x_vt = multiply_add(v[j], sweep.exp_t_scale, -at.scaled_vt);
        const A exp_zt = exp_unit(x_zt), exp_vt = exp_unit(x_vt);
        if constexpr (kCase >= 0) sum_z += squared<kCase>(exp_zt);
        sum_zt += exp_zt;
        sum_vt += exp_vt;
        dot = multiply_add(exp_vt, x_vt - x_zt, dot);
      }
    }
  }
  const bool smooth = sweep.params.label_smoothing != A(0);
  if (inside == kChunk && !smooth &&
      fabs(kHasTeacher<kCase> ? dot : sum_z) < std::numeric_limits<A>::infinity()) {
    stats.sum_z += sum_z;
    stats.sum_zt += sum_zt;
    stats.sum_vt += sum_vt;
    stats.dot += dot;
    return;
  }
  // The end of a row, infinities, NaNs, large references and label smoothing. The vectors are
  // loaded again, so that the fast path does not keep them in registers.
#pragma unroll 1
  for (int c = 0; c < inside; ++c) {
    fetch(forget(c), z_vectors[0], v_vectors[0]);
    widen_vector(z_vectors[0], z);
    widen_vector(v_vectors[0], v);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      if (smooth) stats.sum_shift += z[j] - at.logit_z;
      if constexpr (kCase < 0) {
        stats.sum_z += exp_unit(argument(z[j], sweep.exp_scale, at.logit_z, at.scaled_z));
      }
      if constexpr (kHasTeacher<kCase>) {
        const A x_zt = argument(z[j], sweep.exp_t_scale, at.logit_z, at.scaled_zt);
        const A x_vt = argument(v[j], sweep.exp_t_scale, at.logit_v, at.scaled_vt);
        const A exp_zt = exp_unit(x_zt), exp_vt = exp_unit(x_vt);
        if constexpr (kCase >= 0) stats.sum_z += squared<kCase>(exp_zt);
        stats.sum_zt += exp_zt;
        stats.sum_vt += exp_vt;
        // Left out where exp_vt is 0, because 0 * inf = NaN.
        if (exp_vt > A(0)) stats.dot += exp_vt * (x_vt - x_zt);
      }
    }
    if (smooth) stats.count += A(kWidth);
  }
}

// Adds the thread's element outside the vectors.
template <int kCase, class A>
__device__ inline void add_edge(const Sweep<A>& sweep, A z_edge, A v_edge, ThreadStats<A>& stats) {
  using Edge = Vector<A, 1>;
  const auto fetch = [&](int, Edge& z, Edge& v) { z = {{z_edge}}, v = {{v_edge}}; };
  add_vectors<kCase, 1, Edge, Edge>(sweep, 1, fetch, stats);
}

// --- Parts of a row ---

// Statistics relative to their maxima, and the number of classes in them, which only label
// smoothing needs.
template <class A>
struct alignas(sizeof(A) * 4) OnlineStats {
  RowStats<A> row;
  A count;
};

template <class A>
__device__ inline OnlineStats<A> empty_online_stats() {
  return OnlineStats<A>{empty_row_stats<A>(), A(0)};
}

// Adds the statistics of kLanes (a power of two) lanes, which are relative to common maxima. Every
// lane of the group gets the sum.
template <int kLanes = kWarpSize, class A>
__device__ inline void add_lanes(const Sweep<A>& sweep, OnlineStats<A>& stats) {
  stats.row.sum_z = group_sum(stats.row.sum_z, kLanes);
  stats.row.sum_zt = group_sum(stats.row.sum_zt, kLanes);
  stats.row.sum_vt = group_sum(stats.row.sum_vt, kLanes);
  stats.row.dot = group_sum(stats.row.dot, kLanes);
  if (sweep.params.label_smoothing != A(0)) {
    stats.row.sum_shift = group_sum(stats.row.sum_shift, kLanes);
    stats.count = group_sum(stats.count, kLanes);
  }
}

// The statistics of the warp's threads; every thread gets the result.
template <int kCase, class A>
__device__ inline OnlineStats<A> warp_stats(const Sweep<A>& sweep, ThreadStats<A> thread) {
  const A nan = std::numeric_limits<A>::quiet_NaN();
  const A max_z = group_max(thread.max_z, kWarpSize);
  A max_v = negative_infinity<A>();
  if constexpr (kHasTeacher<kCase>) max_v = group_max(thread.max_v, kWarpSize);
  rebase_thread<kCase>(sweep, References<A>{anchor(max_z), anchor(max_v), nan, nan, nan}, thread);
  const A dot = thread.dot * logit_of_unit(sweep);
  return OnlineStats<A>{
      {max_z, thread.sum_z, thread.sum_zt, thread.sum_shift, max_v, thread.sum_vt, dot},
      thread.count};
}

// Merges the statistics of kLanes (a power of two) lanes of the warp; every lane gets the result.
template <int kLanes = kWarpSize, class A>
__device__ inline void merge_lanes(const Sweep<A>& sweep, OnlineStats<A>& stats) {
  const A max_z = group_max(stats.row.max_z, kLanes);
  const A max_v = group_max(stats.row.max_v, kLanes);
  rebase_row_stats(stats.row, max_z, max_v, stats.count, sweep.params.inv_temperature);
  add_lanes<kLanes>(sweep, stats);
}

// --- Revision at a temperature of its own ---

// The terms of sum_vr (core/kd_loss.h: revised_target) from a thread's vector of v, or one element,
// when the statistics of the whole row are known.
template <class A, class V, int kWidth>
__device__ inline A revision_part(const Sweep<A>& sweep, const RowStats<A>& stats,
                                  const Vector<V, kWidth>& v_vector) {
  A v[kWidth], sum = A(0);
  widen_vector(v_vector, v);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    sum += exp_unit((v[j] - anchor(stats.max_v)) * sweep.exp_r_scale);
  }
  return sum;
}

// The sum of the threads' terms as statistics of a warp, so that it can be merged like other sums.
template <class A>
__device__ inline OnlineStats<A> revision_stats(const RowStats<A>& stats, A part) {
  OnlineStats<A> out = empty_online_stats<A>();
  out.row.max_v = stats.max_v;
  out.row.sum_vt = group_sum(part, kWarpSize);
  return out;
}

// --- The gradient ---

// dL/dz_k without the constant at the target: coefficient_z * exp_unit(z_k * exp_scale - scaled_z)
// + ... - smoothing.
template <class A>
struct ElementGradient {
  References<A> at;
  A z, zt, vt, smoothing;
};

// with_case, or kHuge.
template <bool kSquares, class A, class Body>
__device__ inline void with_gradient_case(const Sweep<A>& sweep, bool reads_v,
                                          const RowStats<A>& stats, Body body) {
  if (is_huge(sweep, anchor(stats.max_z)) || is_huge(sweep, anchor(stats.max_v))) {
    return body(std::integral_constant<int, kHuge>());
  }
  with_case<kSquares>(sweep, reads_v, body);
}

template <int kCase, class A>
__device__ inline ElementGradient<A> element_gradient(const Sweep<A>& sweep,
                                                      const RowStats<A>& stats,
                                                      const RowResult<A>& result) {
  ElementGradient<A> out{references_at(sweep, stats.max_z, stats.max_v), result.coefficient_z,
                         result.coefficient_zt, result.coefficient_vt, result.smoothing};
  if constexpr (kCase != kHuge) {
    // The coefficients belong to exponentials relative to the maxima.
    const References<A>& at = out.at;
    const A up_zt = exp_unit(-multiply_add(at.logit_z, sweep.exp_t_scale, -at.scaled_zt));
    out.zt *= up_zt;
    if constexpr (kCase >= 0) {
      out.z *= squared<kCase>(up_zt);
    } else {
      out.z *= exp_unit(-multiply_add(at.logit_z, sweep.exp_scale, -at.scaled_z));
    }
    out.vt *= exp_unit(-multiply_add(at.logit_v, sweep.exp_t_scale, -at.scaled_vt));
  }
  return out;
}

template <int kCase, class A>
__device__ inline A gradient_at(const Sweep<A>& sweep, const ElementGradient<A>& of, A z_k, A v_k) {
  const References<A>& at = of.at;
  if constexpr (kCase == kHuge) {
    const A z = z_k - at.logit_z, v = v_k - at.logit_v;
    return of.z * exp_unit(z * sweep.exp_scale) + of.zt * exp_unit(z * sweep.exp_t_scale) -
           of.vt * exp_unit(v * sweep.exp_t_scale) - of.smoothing;
  } else {
    A exp_z = A(0), gradient = -of.smoothing;
    if constexpr (kCase < 0) exp_z = exp_unit(multiply_add(z_k, sweep.exp_scale, -at.scaled_z));
    if constexpr (kHasTeacher<kCase>) {
      const A exp_zt = exp_unit(multiply_add(z_k, sweep.exp_t_scale, -at.scaled_zt));
      const A exp_vt = exp_unit(multiply_add(v_k, sweep.exp_t_scale, -at.scaled_vt));
      if constexpr (kCase >= 0) exp_z = squared<kCase>(exp_zt);
      gradient = multiply_add(of.zt, exp_zt, gradient);
      gradient = multiply_add(-of.vt, exp_vt, gradient);
    }
    return multiply_add(of.z, exp_z, gradient);
  }
}

template <int kCase, class A, class S, class V, int kWidth>
__device__ inline Vector<S, kWidth> gradient_of_vector(const Sweep<A>& sweep,
                                                       const ElementGradient<A>& of,
                                                       const Vector<S, kWidth>& z_vector,
                                                       const Vector<V, kWidth>& v_vector) {
  A z[kWidth], v[kWidth], gradient[kWidth];
  widen_vector(z_vector, z);
  widen_vector(v_vector, v);
#pragma unroll
  for (int j = 0; j < kWidth; ++j) gradient[j] = gradient_at<kCase>(sweep, of, z[j], v[j]);
  return narrow_vector<S>(gradient);
}

}  // namespace lrds::cuda
