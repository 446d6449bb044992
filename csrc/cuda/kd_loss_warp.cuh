// Rows of up to 1024 classes: 1 to 32 lanes hold a row in registers. Each logit is read once; its
// exponentials replace it and are what the gradient is made of.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/kd_loss_row.cuh"

namespace lrds::cuda {

// Sweeps one row: the caller's lanes hold it in registers, z_row and v_row are where it is read,
// gradient_row where it is written (null: nowhere), which may be z_row itself. All lanes of a warp
// call it together. scale_of() is asked for the gradient's scale once the statistics are there.
//
// kSameTeacher: the teacher has the student's type, else any type through load_element, at v_any.
// kWidth: elements per access; 1 has no alignment to care for. A lane holds kVectors * kWidth
// elements, and with kWidth > 1 one more from outside the aligned vectors, which takes lanes >= 2 *
// (kWidth - 1), or rows of whole vectors.
template <class S, bool kSameTeacher, int kWidth, int kVectors, class ScaleOf>
__device__ inline void sweep_row(const Sweep<float>& sweep, const Row<float>& row,
                                 std::int64_t index, const S* z_row, const S* v_row,
                                 const void* v_any, S* gradient_row, int lanes, ScaleOf scale_of) {
  using A = float;
  using Vec = Vector<S, kWidth>;
  static_assert(kWidth == 1 || kSameTeacher, "vectors of two types are not aligned alike");
  constexpr int kElements = kVectors * kWidth;
  const A infinity = std::numeric_limits<A>::infinity();
  const int classes = sweep.classes;
  const int lane = threadIdx.x & (lanes - 1);
  const int slots = min(kVectors, (classes / kWidth + lanes - 1) / lanes);
  const bool reads_z = row.reads_student(sweep);
  const bool reads_v = row.reads_teacher(sweep);
  const Layout<S, kWidth> layout(z_row, classes);

  // Unread logits count as 0, whose exponentials then meet coefficients of 0; slots past the row
  // count as -inf.
  A z[kElements], v[kElements];
  A z_edge = -infinity, v_edge = -infinity;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i >= slots) break;
    const int n = i * lanes + lane;
    const bool inside = n < layout.vectors;
    const A fill_z = inside && !reads_z ? A(0) : -infinity;
    const A fill_v = inside && !reads_v ? A(0) : -infinity;
    const int k = layout.head + n * kWidth;
    if (inside && reads_z) {
      const Vec raw = *reinterpret_cast<const Vec*>(z_row + k);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) z[i * kWidth + j] = widen<A>(raw.element[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) z[i * kWidth + j] = fill_z;
    }
    if (kSameTeacher && inside && reads_v) {
      const Vec raw = *reinterpret_cast<const Vec*>(v_row + k);
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v[i * kWidth + j] = widen<A>(raw.element[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) v[i * kWidth + j] = fill_v;
    }
  }
  if constexpr (!kSameTeacher) {
    if (reads_v) {
      with_element_type<A>(sweep.teacher_type, [&](auto typed) {
        const auto* const v_typed = static_cast<const decltype(typed)*>(v_any);
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          if (i >= slots) break;
          const int k = i * lanes + lane;
          if (k < classes) v[i] = widen<A>(v_typed[k]);
        }
      });
    }
  }
  const bool has_edge = kWidth > 1 && lane < layout.edges;
  if constexpr (kWidth > 1) {
    if (has_edge) {
      z_edge = reads_z ? widen<A>(z_row[layout.edge(lane)]) : A(0);
      v_edge = reads_v ? widen<A>(v_row[layout.edge(lane)]) : A(0);
    }
  }
  const bool has_y = row.y >= 0;
  A z_y = reads_z && has_y ? widen<A>(z_row[row.y]) : A(0);
  A v_y = A(0);
  if (reads_v && has_y) {
    if constexpr (kSameTeacher) {
      v_y = widen<A>(v_row[row.y]);
    } else {
      v_y = load_element<A>(v_any, sweep.teacher_type, row.y);
    }
  }
  RowStats<A> stats = empty_row_stats<A>();
  stats.max_z = fmaxf(z_edge, -infinity);  // a NaN must not become the maximum
  stats.max_v = fmaxf(v_edge, -infinity);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (i >= slots) break;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      stats.max_z = fmaxf(stats.max_z, z[i * kWidth + j]);
      stats.max_v = fmaxf(stats.max_v, v[i * kWidth + j]);
    }
  }
  stats.max_z = group_max(stats.max_z, lanes);
  stats.max_v = group_max(stats.max_v, lanes);
  const A shift_z = anchor(stats.max_z), shift_v = anchor(stats.max_v);

  if (sweep.params.label_smoothing != A(0)) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i >= slots || i * lanes + lane >= layout.vectors) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) stats.sum_shift += z[i * kWidth + j] - shift_z;
    }
    if (has_edge) stats.sum_shift += z_edge - shift_z;
    stats.sum_shift = group_sum(stats.sum_shift, lanes);
  }

  // z and v become exp((z - max z) / T) and exp((v - max v) / T); exp_one keeps exp(z - max z)
  // where it is no power.
  with_squarings(sweep, [&](auto squarings) {
    constexpr int kSquarings = decltype(squarings)::value;
    const auto absorb = [&](A& z_k, A& v_k) {
      const A dz = z_k - shift_z, dv = v_k - shift_v;
      const A exp_zt = exp_scaled(dz, sweep.exp_t_scale);
      const A exp_vt = exp_scaled(dv, sweep.exp_t_scale);
      stats.sum_z += exp_from<kSquarings>(dz, exp_zt, sweep);
      stats.sum_zt += exp_zt;
      stats.sum_vt += exp_vt;
      if (exp_vt > A(0)) stats.dot += exp_vt * (dv - dz);
      z_k = kSquarings >= 0 ? exp_zt : dz;
      v_k = exp_vt;
    };
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i >= slots) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) absorb(z[i * kWidth + j], v[i * kWidth + j]);
    }
    if constexpr (kWidth > 1) absorb(z_edge, v_edge);
  });
  stats.sum_z = group_sum(stats.sum_z, lanes);
  stats.sum_zt = group_sum(stats.sum_zt, lanes);
  stats.sum_vt = group_sum(stats.sum_vt, lanes);
  stats.dot = group_sum(stats.dot, lanes);

  const RowResult<A> result = close_row(sweep, row, stats, z_y, v_y, scale_of(), index);
  if (index < sweep.rows) {
    if (lane == 0) write_row(sweep, row, result, index);
    if (gradient_row != nullptr) {
      with_squarings(sweep, [&](auto squarings) {
        constexpr int kSquarings = decltype(squarings)::value;
        const auto gradient_of = [&](A z_k, A v_k) {
          const A exp_zt = kSquarings >= 0 ? z_k : exp_scaled(z_k, sweep.exp_t_scale);
          return gradient_from(result, exp_from<kSquarings>(z_k, exp_zt, sweep), exp_zt, v_k);
        };
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          if (i >= slots) break;
          const int n = i * lanes + lane;
          if (n < layout.vectors) {
            A g[kWidth];
#pragma unroll
            for (int j = 0; j < kWidth; ++j) {
              g[j] = gradient_of(z[i * kWidth + j], v[i * kWidth + j]);
            }
            store_vector(gradient_row + layout.head + n * kWidth, narrow_vector<S>(g));
          }
        }
        if (has_edge) gradient_row[layout.edge(lane)] = narrow<S>(gradient_of(z_edge, v_edge));
      });
      // The lane that stored this element stores it again, so the order is the program's.
      if (has_y && layout.owner(row.y, lanes) == lane) {
        gradient_row[row.y] =
            narrow<S>(gradient_at_target(sweep, result, z_y - shift_z, v_y - shift_v));
      }
    }
  }
}

// Rows anywhere.
template <class S, bool kSameTeacher, int kWidth, int kVectors>
__global__ void __launch_bounds__(kWarpThreads, kWarpBlocksPerMultiprocessor)
    kd_loss_warp(const Sweep<float> sweep, const int lanes) {
  __shared__ CountScratch count_scratch;
  ValidRowCount<float> valid_rows;
  valid_rows.start(sweep, count_scratch);

  const std::int64_t thread = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x / lanes;
  // The first row of the warp decides whether it goes on: its lanes stay together for the shuffles.
  std::int64_t warp_row = thread / kWarpSize * kWarpSize / lanes;
  std::int64_t index = thread / lanes;
  Row<float> row = open_row(sweep, index);
  GradientScale<float> scale(sweep);
  for (; warp_row < sweep.rows; warp_row += step, index += step) {
    const S* const z_row = static_cast<const S*>(sweep.student) + index * sweep.student_stride;
    const std::int64_t v_at = row.reads_teacher(sweep) ? index * sweep.teacher_stride : 0;
    const S* const v_row = static_cast<const S*>(sweep.teacher) + (kSameTeacher ? v_at : 0);
    const void* const v_any =
        static_cast<const char*>(sweep.teacher) + v_at * element_size(sweep.teacher_type);
    S* const gradient_row = sweep.gradient == nullptr
                                ? nullptr
                                : static_cast<S*>(sweep.gradient) + index * sweep.classes;
    const Row<float> next = open_row(sweep, index + step);
    sweep_row<S, kSameTeacher, kWidth, kVectors>(sweep, row, index, z_row, v_row, v_any,
                                                 gradient_row, lanes,
                                                 [&] { return scale.get(sweep, valid_rows); });
    row = next;
  }
}

// Rows of up to kShortClasses classes, back to back: a block copies the tile of its rows through
// shared memory, in 16-byte vectors wherever the rows begin, and the next tile while it computes.
// Shared memory: two stages of student and teacher, kFlatStageElements<S> each; the gradient
// replaces the student there on its way out.
template <class S>
__global__ void __launch_bounds__(kWarpThreads, kFlatBlocksPerMultiprocessor)
    kd_loss_flat(const Sweep<float> sweep, const int lanes) {
  constexpr int kWidth = 16 / sizeof(S);
  using Vec = Vector<S, kWidth>;
  __shared__ CountScratch count_scratch;
  ValidRowCount<float> valid_rows;
  valid_rows.start(sweep, count_scratch);

  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int classes = sweep.classes;
  const std::int64_t tile_rows = threads / lanes;
  const int local = thread / lanes;
  S* const stages = reinterpret_cast<S*>(dynamic_shared());
  const auto rows_of = [&](std::int64_t first, std::int64_t rows) {
    const std::int64_t left = rows - first;
    return static_cast<int>(left < 0 ? 0 : left < tile_rows ? left : tile_rows);
  };
  // Elements between the 16-byte boundary before a tile and the tile, in global as in shared
  // memory.
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
  // Where the tile that begins with row `first` is read. A tile past the end has no address.
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
  stage(first, 0);
  Row<float> row = open_row(sweep, first + local);
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
    sweep_row<S, true, 1, kShortElements>(sweep, row, first + local, z_row, v_row, nullptr,
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
