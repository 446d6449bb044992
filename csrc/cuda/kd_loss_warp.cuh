// Rows of up to 1024 classes: 1 to 32 lanes hold a row in registers. Each logit is read once; its
// exponentials replace it and are what the gradient is made of.
#pragma once

#include "cuda/kd_loss_row.cuh"

namespace lrds::cuda {

// kSameTeacher: the teacher has the student's type, else any type through load_element.
// kWidth: elements per access; 1 has no alignment to care for. A lane holds kVectors * kWidth
// elements, and with kWidth > 1 one more from outside the aligned vectors, which takes lanes >= 2 *
// (kWidth - 1).
template <class S, bool kSameTeacher, int kWidth, int kVectors>
__global__ void __launch_bounds__(kWarpThreads, kWarpBlocksPerMultiprocessor)
    kd_loss_warp(const Sweep<float> sweep, const int lanes) {
  using A = float;
  using Vec = Vector<S, kWidth>;
  static_assert(kWidth == 1 || kSameTeacher, "vectors of two types are not aligned alike");
  constexpr int kElements = kVectors * kWidth;
  const A infinity = std::numeric_limits<A>::infinity();

  ValidRowCount<A> valid_rows;
  valid_rows.start(sweep);

  const int classes = sweep.classes;
  const int lane = threadIdx.x & (lanes - 1);
  const int slots = min(kVectors, (classes / kWidth + lanes - 1) / lanes);
  const std::int64_t thread = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x / lanes;
  // The first row of the warp decides whether it goes on: its lanes stay together for the shuffles.
  std::int64_t warp_row = thread / kWarpSize * kWarpSize / lanes;
  std::int64_t index = thread / lanes;
  Row<A> row = open_row(sweep, index);
  A scale = A(0);
  bool scale_known = sweep.gradient == nullptr;

  for (; warp_row < sweep.rows; warp_row += step, index += step) {
    const bool reads_z = row.reads_student(sweep);
    const bool reads_v = row.reads_teacher(sweep);
    const S* const z_row = static_cast<const S*>(sweep.student) + index * sweep.student_stride;
    const std::int64_t teacher_offset = reads_v ? index * sweep.teacher_stride : 0;
    const S* const v_row =
        static_cast<const S*>(sweep.teacher) + (kSameTeacher ? teacher_offset : 0);
    const void* const v_any =
        static_cast<const char*>(sweep.teacher) + teacher_offset * element_size(sweep.teacher_type);
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
    const Row<A> next = open_row(sweep, index + step);

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
    with_power(sweep, [&](auto power) {
      constexpr bool kPower = decltype(power)::value;
      const auto absorb = [&](A& z_k, A& v_k) {
        const A dz = z_k - shift_z, dv = v_k - shift_v;
        const A exp_zt = exp_scaled(dz, sweep.exp_t_scale);
        const A exp_vt = exp_scaled(dv, sweep.exp_t_scale);
        stats.sum_z += exp_from<kPower>(dz, exp_zt, sweep);
        stats.sum_zt += exp_zt;
        stats.sum_vt += exp_vt;
        if (exp_vt > A(0)) stats.dot += exp_vt * (dv - dz);
        z_k = kPower ? exp_zt : dz;
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

    if (!scale_known) {
      scale = valid_rows.gradient_scale(sweep);
      scale_known = true;
    }
    const RowResult<A> result = close_row(sweep, row, stats, z_y, v_y, scale, index);
    if (index < sweep.rows) {
      if (lane == 0) write_row(sweep, row, result, index);
      if (sweep.gradient != nullptr) {
        S* const gradient = static_cast<S*>(sweep.gradient) + index * classes;
        with_power(sweep, [&](auto power) {
          constexpr bool kPower = decltype(power)::value;
          const auto gradient_of = [&](A z_k, A v_k) {
            const A exp_zt = kPower ? z_k : exp_scaled(z_k, sweep.exp_t_scale);
            return gradient_from(result, exp_from<kPower>(z_k, exp_zt, sweep), exp_zt, v_k);
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
              *reinterpret_cast<Vec*>(gradient + layout.head + n * kWidth) = narrow_vector<S>(g);
            }
          }
          if (has_edge) gradient[layout.edge(lane)] = narrow<S>(gradient_of(z_edge, v_edge));
        });
        // The lane that stored this element stores it again, so the order is the program's.
        if (has_y && layout.owner(row.y, lanes) == lane) {
          gradient[row.y] =
              narrow<S>(gradient_at_target(sweep, result, z_y - shift_z, v_y - shift_v));
        }
      }
    }
    row = next;
  }
}

}  // namespace lrds::cuda
