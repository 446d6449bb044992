// Rows of up to 1024 classes: 1 to 32 lanes hold a row in registers. Each logit is read once; its
// exponentials replace it, and the gradient is computed from them.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/kd_loss_row.cuh"

namespace lrds::cuda {

// Up to this distance of the maximum from 0, (x - max) * scale is computed as x * scale - max *
// scale by one multiply-add. The rounding of max * scale is then a common factor near 1 of all
// exponentials of the row.
constexpr float kNear = 65536;

// A vector as 32-bit words if its elements have 16 bits: separate elements cost two instructions
// each.
template <class S, int kWidth>
constexpr bool kPacks = sizeof(S) == 2 && kWidth % 2 == 0;
template <class S, int kWidth>
using Words =
    std::conditional_t<kPacks<S, kWidth>, Vector<unsigned, (kWidth + 1) / 2>, Vector<S, kWidth>>;

template <class S, int kWidth>
__device__ inline void widen_words(const Words<S, kWidth>& x, float (&out)[kWidth]) {
#pragma unroll
  for (int j = 0; j < kWidth; ++j) {
    if constexpr (!kPacks<S, kWidth>) {
      out[j] = widen<float>(x.element[j]);
    } else if (j % 2 == 0) {
      widen_pair<S>(x.element[j / 2], out[j], out[j + 1]);
    }
  }
}

// The largest element of a lane's vectors inside the row; NaNs are ignored.
template <class S, int kWidth, int kVectors, class Inside>
__device__ inline float lane_max(const Words<S, kWidth> (&x)[kVectors], Inside inside) {
  float top = -std::numeric_limits<float>::infinity();
  if constexpr (kPacks<S, kWidth>) {
    float second = top;
    unsigned tops = pack_pair<S>(top, top);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!inside(i)) continue;
#pragma unroll
      for (int j = 0; j < kWidth / 2; ++j) tops = pair_max<S>(tops, x[i].element[j]);
    }
    widen_pair<S>(tops, top, second);
    return fmaxf(top, second);
  } else {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!inside(i)) continue;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) top = fmaxf(top, widen<float>(x[i].element[j]));
    }
    return top;
  }
}

// Both maxima over a group of lanes. If both types have 16 bits, one shuffle exchanges both.
template <class S, bool kSameTeacher>
__device__ inline void group_maxima(float& max_z, float& max_v, int lanes) {
  if constexpr (sizeof(S) == 2 && kSameTeacher) {
    unsigned tops = pack_pair<S>(max_z, max_v);
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      tops = pair_max<S>(tops, __shfl_xor_sync(kWholeWarp, tops, offset));
    }
    widen_pair<S>(tops, max_z, max_v);
  } else {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      max_z = fmaxf(max_z, __shfl_xor_sync(kWholeWarp, max_z, offset));
      max_v = fmaxf(max_v, __shfl_xor_sync(kWholeWarp, max_v, offset));
    }
  }
}

// exp(z - max z) from root = exp((z - max z) / T) and the exponent of the root.
template <int kSquarings>
__device__ inline float power(float exponent, float root, const Sweep<float>& sweep) {
  if constexpr (kSquarings >= 0) return squared<kSquarings>(root);
  return exp2_approximate(exponent * sweep.params.temperature);
}

// Computes one row. The lanes that call it hold the row in registers; it is read from z_row and
// v_row, and the gradient is written to gradient_row (null: not at all), which may be z_row itself.
// All lanes of a warp call it together. exists: whether the row is one of the call's. scale_of()
// returns the scale of the gradient; it is called after the statistics are computed.
//
// kSameTeacher: the teacher has the student's type; else load_element reads it from v_any. kWidth:
// elements per access; 1 works for any alignment. A lane holds kVectors * kWidth elements, and with
// kWidth > 1 one more from outside the aligned vectors, which needs lanes >= 2 * (kWidth - 1) or
// rows of whole vectors.
template <class S, bool kSameTeacher, int kWidth, int kVectors, class ScaleOf>
__device__ inline void sweep_row(const Sweep<float>& sweep, const Row<float>& row,
                                 std::int64_t index, bool exists, const S* z_row, const S* v_row,
                                 const void* v_any, S* gradient_row, int lanes, ScaleOf scale_of) {
  using A = float;
  using TeacherElement = std::conditional_t<kSameTeacher, S, A>;  // a teacher element in registers
  using ZVec = Words<S, kWidth>;
  using VVec = Words<TeacherElement, kWidth>;
  static_assert(kWidth == 1 || kSameTeacher, "vectors of two types are not aligned alike");
  constexpr A kLn2 = 0.693147181f;
  const int lane = threadIdx.x & (lanes - 1);
  const RowWeights<A> weights = row.weights(sweep);
  const bool reads_v = weights.kd != A(0);
  const bool reads_z = reads_v || weights.ce != A(0);
  const Layout<S, kWidth> layout(z_row, sweep.classes);
  const auto inside = [&](int i) { return i * lanes + lane < layout.vectors; };
  const bool has_edge = kWidth > 1 && lane < layout.edges;

  // Logits that are not read are 0; the coefficients of their exponentials are 0, too.
  ZVec z_in[kVectors];
  VVec v_in[kVectors];
  S z_edge_in = narrow<S>(A(0));
  TeacherElement v_edge_in = narrow<TeacherElement>(A(0));
  A z_y = A(0), v_y = A(0);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    z_in[i] = ZVec{};
    v_in[i] = VVec{};
  }
  const int begin = layout.head + lane * kWidth;
  const auto load = [&](bool reads, const S* from, auto& x, A& at_y) {
    const int vectors = reads ? layout.vectors : 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i * lanes + lane < vectors) {
        x[i] = *reinterpret_cast<const ZVec*>(from + begin + i * lanes * kWidth);
      }
    }
    if (reads) at_y = widen<A>(from[row.y]);
  };
  load(reads_z, z_row, z_in, z_y);
  if constexpr (kSameTeacher) {
    load(reads_v, v_row, v_in, v_y);
  } else if (reads_v) {
    with_element_type<A>(sweep.teacher_type, [&](auto typed) {
      const auto* const v_typed = static_cast<const decltype(typed)*>(v_any);
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (inside(i)) v_in[i].element[0] = widen<A>(v_typed[lane + i * lanes]);
      }
      v_y = widen<A>(v_typed[row.y]);
    });
  }
  if constexpr (kWidth > 1) {
    if (has_edge) {
      const int k = layout.edge(lane);
      if (reads_z) z_edge_in = z_row[k];
      if (reads_v) v_edge_in = v_row[k];
    }
  }

  RowStats<A> stats = empty_row_stats<A>();
  stats.max_z = lane_max<S, kWidth>(z_in, inside);
  stats.max_v = lane_max<TeacherElement, kWidth>(v_in, inside);
  if (has_edge) {
    stats.max_z = fmaxf(stats.max_z, widen<A>(z_edge_in));
    stats.max_v = fmaxf(stats.max_v, widen<A>(v_edge_in));
  }
  group_maxima<S, kSameTeacher>(stats.max_z, stats.max_v, lanes);
  const bool wrong = sweep.params.revise != Revise::kNone && teacher_is_wrong(v_y, stats.max_v);
  A shift_z = anchor(stats.max_z), shift_v = anchor(stats.max_v);

  A z[kVectors][kWidth], v[kVectors][kWidth];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    widen_words<S>(z_in[i], z[i]);
    widen_words<TeacherElement>(v_in[i], v[i]);
  }
  A z_edge = widen<A>(z_edge_in), v_edge = widen<A>(v_edge_in);
  const auto each = [&](auto body) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!inside(i)) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) body(z[i][j], v[i][j]);
    }
    if (has_edge) body(z_edge, v_edge);
  };
  // Exponents are (x - max) / T in units of log 2, so that max need not be subtracted first if it
  // is near 0.
  const A scale = sweep.exp_t_scale;
  const A reach = fmaxf(scale, A(1));
  if (!(fmaxf(fabsf(shift_z), fabsf(shift_v)) * reach < kNear)) {
    each([&](A& z_k, A& v_k) {
      z_k -= shift_z;
      v_k -= shift_v;
    });
    z_y -= shift_z;
    v_y -= shift_v;
    shift_z = shift_v = A(0);
  }
  const A base_z = shift_z * scale, base_v = shift_v * scale;
  const A unit = kLn2 * sweep.params.temperature;
  if (sweep.params.label_smoothing != A(0)) {
    each([&](A z_k, A) { stats.sum_shift += fmaf(z_k, scale, -base_z); });
    stats.sum_shift = group_sum(stats.sum_shift, lanes) * unit;
  }

  A sum_vr = A(0);
  if (sweep.exp_r_scale != A(0) && __any_sync(kWholeWarp, wrong)) {
    each([&](A, A v_k) { sum_vr += exp2_approximate((v_k - shift_v) * sweep.exp_r_scale); });
    sum_vr = group_sum(sum_vr, lanes);
  }

  // z and v become exp((z - max z) / T) and exp((v - max v) / T). Where exp(z - max z) is not a
  // power of the former, z becomes the exponent.
  with_squarings(sweep, [&](auto squarings) {
    constexpr int kSquarings = decltype(squarings)::value;
    each([&](A& z_k, A& v_k) {
      const A e_z = fmaf(z_k, scale, -base_z), e_v = fmaf(v_k, scale, -base_v);
      const A exp_zt = exp2_approximate(e_z);
      const A exp_vt = exp2_approximate(e_v);
      stats.sum_z += power<kSquarings>(e_z, exp_zt, sweep);
      stats.sum_zt += exp_zt;
      stats.sum_vt += exp_vt;
      if (exp_vt > A(0)) stats.dot += exp_vt * (e_v - e_z);
      z_k = kSquarings >= 0 ? exp_zt : e_z;
      v_k = exp_vt;
    });
  });
  stats.dot *= unit;
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    stats.sum_z += __shfl_xor_sync(kWholeWarp, stats.sum_z, offset);
    stats.sum_zt += __shfl_xor_sync(kWholeWarp, stats.sum_zt, offset);
    stats.sum_vt += __shfl_xor_sync(kWholeWarp, stats.sum_vt, offset);
    stats.dot += __shfl_xor_sync(kWholeWarp, stats.dot, offset);
  }

  const A e_z_y = fmaf(z_y, scale, -base_z), e_v_y = fmaf(v_y, scale, -base_v);
  const A exp_vt_y = exp2_approximate(e_v_y);
  RowTarget<A> target{e_z_y * unit, e_v_y * unit,
                      exp_vt_y,     exp2_approximate(fmaf(shift_v, scale, -base_v)),
                      A(0),         wrong};
  if (sweep.exp_r_scale != A(0) && wrong) {
    target.revised_shift = revised_target(v_y - shift_v, sum_vr, sweep.params);
  }
  const RowResult<A> result =
      close_row(sweep, row, weights, stats, target, scale_of(), index, exists);
  if (!exists) return;
  if (lane == 0) write_row(sweep, row, result, index);
  if (gradient_row == nullptr) return;
  with_squarings(sweep, [&](auto squarings) {
    constexpr int kSquarings = decltype(squarings)::value;
    const auto gradient_of = [&](A z_k, A v_k) {
      const A exp_zt = kSquarings >= 0 ? z_k : exp2_approximate(z_k);
      return gradient_from(result, power<kSquarings>(z_k, exp_zt, sweep), exp_zt, v_k);
    };
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (!inside(i)) break;
      A g[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) g[j] = gradient_of(z[i][j], v[i][j]);
      store_vector(gradient_row + begin + i * lanes * kWidth, narrow_vector<S>(g));
    }
    if (has_edge) gradient_row[layout.edge(lane)] = narrow<S>(gradient_of(z_edge, v_edge));
  });
  // The lane that stored this element stores it again, so the two stores are in program order.
  if (reads_z && layout.owner(row.y, lanes) == lane) {
    gradient_row[row.y] =
        narrow<S>(gradient_from(result, exp2_approximate(e_z_y * sweep.params.temperature),
                                exp2_approximate(e_z_y), exp_vt_y) +
                  result.at_target);
  }
}

// Rows at any address. kLanes: lanes per row; 0: run_time_lanes.
template <class S, bool kSameTeacher, int kWidth, int kVectors, int kLanes>
__global__ void __launch_bounds__(kWarpThreads, kWarpBlocksPerMultiprocessor)
    kd_loss_warp(const Sweep<float> sweep, const int run_time_lanes) {
  __shared__ CountScratch count_scratch;
  const int lanes = kLanes > 0 ? kLanes : run_time_lanes;
  const std::int64_t thread = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x / lanes;
  std::int64_t index = thread / lanes;
  // The lanes of a warp loop together, because they share shuffles: the warp's first row decides.
  const int in_warp = static_cast<int>(threadIdx.x) % kWarpSize / lanes;
  Row<float> row = open_row(sweep, index);
  // Prefetches the first row while the targets are counted.
  const int lane = threadIdx.x & (lanes - 1);
  if (index < sweep.rows) {
    prefetch_row(static_cast<const S*>(sweep.student) + index * sweep.student_stride,
                 sweep.classes * static_cast<int>(sizeof(S)), lane, lanes);
  }
  if (index < sweep.teacher_rows) {
    const int size = element_size(sweep.teacher_type);
    prefetch_row(static_cast<const char*>(sweep.teacher) + index * sweep.teacher_stride * size,
                 sweep.classes * size, lane, lanes);
  }
  ValidRowCount<float> valid_rows;
  valid_rows.start(sweep, count_scratch);
  GradientScale<float> scale(sweep);
  for (; index - in_warp < sweep.rows; index += step) {
    const S* const z_row = static_cast<const S*>(sweep.student) + index * sweep.student_stride;
    const std::int64_t v_at = row.reads_teacher(sweep) ? index * sweep.teacher_stride : 0;
    const S* const v_row = static_cast<const S*>(sweep.teacher) + (kSameTeacher ? v_at : 0);
    const void* const v_any =
        static_cast<const char*>(sweep.teacher) + v_at * element_size(sweep.teacher_type);
    S* const gradient_row = sweep.gradient == nullptr
                                ? nullptr
                                : static_cast<S*>(sweep.gradient) + index * sweep.classes;
    const Row<float> next = open_row(sweep, index + step);
    sweep_row<S, kSameTeacher, kWidth, kVectors>(
        sweep, row, index, kLanes == kWarpSize || index < sweep.rows, z_row, v_row, v_any,
        gradient_row, lanes, [&] { return scale.get(sweep, valid_rows); });
    row = next;
  }
}

// Rows of up to kShortClasses classes without gaps between them. A block copies the tile of its
// rows to shared memory in 16-byte vectors, wherever rows begin, and the next tile while it
// computes this one. Shared memory: two stages of student and teacher, kFlatStageElements<S> each.
// The gradient replaces the student's tile before it is copied to global memory.
template <class S>
__global__ void __launch_bounds__(kWarpThreads, kFlatBlocksPerMultiprocessor)
    kd_loss_flat(const Sweep<float> sweep, const int lanes) {
  constexpr int kWidth = 16 / sizeof(S);
  using Vec = Vector<S, kWidth>;
  __shared__ CountScratch count_scratch;
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int classes = sweep.classes;
  const std::int64_t tile_rows = threads / lanes;
  const int local = thread / lanes;
  S* const stages = reinterpret_cast<S*>(dynamic_shared());
  const auto rows_of = [&](std::int64_t first, std::int64_t rows) {
    const std::int64_t left = rows - first;
    return static_cast<int>(left < 0 ? 0 : left < tile_rows ? left : tile_rows);
  };
  // The offset of a tile from the 16-byte boundary before it, in elements. It is the same in global
  // and in shared memory.
  const auto past = [&](const S* tile) {
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(tile) % 16 / sizeof(S));
  };
  const auto copy_in = [&](S* to, const S* from, int elements) {
    to += past(from);
    const Layout<S, kWidth> layout(from, elements);
    for (int n = thread; n < layout.vectors; n += threads) {
      const int k = layout.head + n * kWidth;
      __pipeline_memcpy_async(to + k, from + k, sizeof(Vec));
    }
    if (thread < layout.edges) to[layout.edge(thread)] = from[layout.edge(thread)];
  };
  const auto stage_of = [&](int turn, bool teacher) {
    return stages + (2 * turn + (teacher ? 1 : 0)) * kFlatStageElements<S>;
  };
  // The address of the tile that begins with row `first`. A tile past the end has none.
  const auto student_tile = [&](std::int64_t first) {
    return static_cast<const S*>(sweep.student) + first * classes;
  };
  const auto teacher_tile = [&](std::int64_t first) {
    return static_cast<const S*>(sweep.teacher) + first * classes;
  };
  const auto stage = [&](std::int64_t first, int turn) {
    const int z_rows = rows_of(first, sweep.rows);
    const int v_rows = rows_of(first, sweep.teacher_rows);
    if (z_rows > 0) copy_in(stage_of(turn, false), student_tile(first), z_rows * classes);
    if (v_rows > 0) copy_in(stage_of(turn, true), teacher_tile(first), v_rows * classes);
    __pipeline_commit();
  };

  const std::int64_t step = gridDim.x * tile_rows;
  std::int64_t first = blockIdx.x * tile_rows;
  // Copies the first tile while the targets are counted.
  stage(first, 0);
  Row<float> row = open_row(sweep, first + local);
  ValidRowCount<float> valid_rows;
  valid_rows.start(sweep, count_scratch);
  GradientScale<float> scale(sweep);
  for (int turn = 0; first < sweep.rows; first += step, turn ^= 1) {
    __pipeline_wait_prior(0);
    __syncthreads();
    stage(first + step, turn ^ 1);
    const Row<float> next = open_row(sweep, first + step + local);
    const S* const tile = student_tile(first);
    const int begin = past(tile);
    S* const z_tile = stage_of(turn, false) + begin;
    S* const z_row = z_tile + local * classes;
    const S* const v_row = stage_of(turn, true) + begin + local * classes;
    sweep_row<S, true, 1, kShortElements>(sweep, row, first + local, first + local < sweep.rows,
                                          z_row, v_row, nullptr,
                                          sweep.gradient == nullptr ? nullptr : z_row, lanes,
                                          [&] { return scale.get(sweep, valid_rows); });
    row = next;
    if (sweep.gradient == nullptr) continue;
    __syncthreads();
    S* const gradient = static_cast<S*>(sweep.gradient) + first * classes;
    const Layout<S, kWidth> layout(gradient, rows_of(first, sweep.rows) * classes);
    for (int n = thread; n < layout.vectors; n += threads) {
      const int k = layout.head + n * kWidth;
      *reinterpret_cast<Vec*>(gradient + k) = *reinterpret_cast<const Vec*>(z_tile + k);
    }
    if (thread < layout.edges) gradient[layout.edge(thread)] = z_tile[layout.edge(thread)];
  }
}

}  // namespace lrds::cuda
