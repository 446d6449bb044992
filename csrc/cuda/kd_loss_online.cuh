// Statistics of a row whose maxima are not known beforehand: exponentials relative to the maxima so
// far, of a thread, then of a warp, then of all who share the row.
#pragma once

#include "cuda/kd_loss_row.cuh"

namespace lrds::cuda {

// Statistics, and the classes behind them.
template <class A>
struct alignas(sizeof(A) * 4) OnlineStats {
  RowStats<A> row;
  A count;
};

template <class A>
__device__ inline OnlineStats<A> empty_online_stats() {
  return OnlineStats<A>{empty_row_stats<A>(), A(0)};
}

template <int kSquarings, class A>
__device__ inline void add_element(const Sweep<A>& sweep, bool reads_v, A z_k, A v_k,
                                   RowStats<A>& stats) {
  const A dz = z_k - anchor(stats.max_z), dv = v_k - anchor(stats.max_v);
  const A exp_zt = exp_scaled(dz, sweep.exp_t_scale);
  stats.sum_z += exp_from<kSquarings>(dz, exp_zt, sweep);
  stats.sum_zt += exp_zt;
  if (reads_v) {
    const A exp_vt = exp_scaled(dv, sweep.exp_t_scale);
    stats.sum_vt += exp_vt;
    if (exp_vt > A(0)) stats.dot += exp_vt * (dv - dz);
  }
}

// The first element, of a thread that has seen none.
template <int kSquarings, class A>
__device__ inline void begin_with(const Sweep<A>& sweep, bool reads_v, A z_k, A v_k,
                                  OnlineStats<A>& stats) {
  const A infinity = std::numeric_limits<A>::infinity();
  // A NaN must not become the maximum.
  stats.row.max_z = z_k > -infinity ? z_k : -infinity;
  stats.row.max_v = v_k > -infinity ? v_k : -infinity;
  stats.count = A(1);
  stats.row.sum_shift = z_k - anchor(stats.row.max_z);
  add_element<kSquarings>(sweep, reads_v, z_k, v_k, stats.row);
}

// kChunk vectors, of which the first `inside` lie in the row; the others are -inf.
template <int kSquarings, class A, class ZVec, class VVec, int kChunk>
__device__ inline void add_vectors(const Sweep<A>& sweep, bool reads_v, const ZVec (&z)[kChunk],
                                   const VVec (&v)[kChunk], int inside, OnlineStats<A>& stats) {
  constexpr int kWidth = sizeof(ZVec) / sizeof(z[0].element[0]);
  A max_z = stats.row.max_z, max_v = stats.row.max_v;
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
    max_z = vector_max(z[c], max_z);
    max_v = vector_max(v[c], max_v);
  }
  if (max_z > stats.row.max_z || max_v > stats.row.max_v) {
    rebase_row_stats(stats.row, max_z, max_v, stats.count, sweep.params.inv_temperature);
  }
  if (sweep.params.label_smoothing != A(0)) {
    const A shift_z = anchor(stats.row.max_z);
#pragma unroll
    for (int c = 0; c < kChunk; ++c) {
      if (c >= inside) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        stats.row.sum_shift += widen<A>(z[c].element[j]) - shift_z;
      }
    }
  }
  stats.count += static_cast<A>(inside * kWidth);
#pragma unroll
  for (int c = 0; c < kChunk; ++c) {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      add_element<kSquarings>(sweep, reads_v, widen<A>(z[c].element[j]), widen<A>(v[c].element[j]),
                          stats.row);
    }
  }
}

template <class A>
__device__ inline void merge(const Sweep<A>& sweep, OnlineStats<A> part, OnlineStats<A>& stats) {
  const A max_z = part.row.max_z > stats.row.max_z ? part.row.max_z : stats.row.max_z;
  const A max_v = part.row.max_v > stats.row.max_v ? part.row.max_v : stats.row.max_v;
  rebase_row_stats(stats.row, max_z, max_v, stats.count, sweep.params.inv_temperature);
  rebase_row_stats(part.row, max_z, max_v, part.count, sweep.params.inv_temperature);
  add_row_stats(stats.row, part.row);
  stats.count += part.count;
}

// Of the warp's lanes; all of them get the result.
template <class A>
__device__ inline void warp_merge(const Sweep<A>& sweep, OnlineStats<A>& stats) {
  const A max_z = group_max(stats.row.max_z, kWarpSize);
  const A max_v = group_max(stats.row.max_v, kWarpSize);
  rebase_row_stats(stats.row, max_z, max_v, stats.count, sweep.params.inv_temperature);
  stats.row.sum_z = group_sum(stats.row.sum_z, kWarpSize);
  stats.row.sum_zt = group_sum(stats.row.sum_zt, kWarpSize);
  stats.row.sum_shift = group_sum(stats.row.sum_shift, kWarpSize);
  stats.row.sum_vt = group_sum(stats.row.sum_vt, kWarpSize);
  stats.row.dot = group_sum(stats.row.dot, kWarpSize);
  stats.count = group_sum(stats.count, kWarpSize);
}

// dL/dz_k without the target's constant.
template <int kSquarings, class A>
__device__ inline A online_gradient(const Sweep<A>& sweep, const RowResult<A>& result, bool reads_v,
                                    A z_k, A v_k, A shift_z, A shift_v) {
  const A dz = z_k - shift_z;
  const A exp_zt = exp_scaled(dz, sweep.exp_t_scale);
  const A exp_vt = reads_v ? exp_scaled(v_k - shift_v, sweep.exp_t_scale) : A(0);
  return gradient_from(result, exp_from<kSquarings>(dz, exp_zt, sweep), exp_zt, exp_vt);
}

}  // namespace lrds::cuda
