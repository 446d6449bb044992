// Rows of any length: a block per row, with online statistics. The first `resident` vectors of
// every thread stay in shared memory between the statistics and the gradient. The others are read
// again, in reverse order, because the last ones may still be in L2. A thread accesses only its own
// slots, so shared memory acts as more registers and needs no barrier. As soon as a slot is free,
// the block's next row is copied to it.
#pragma once

#include <cuda_pipeline.h>

#include "cuda/kd_loss_online.cuh"

namespace lrds::cuda {

// A: accumulation type. kSameTeacher: the teacher has the student's type; else load_element reads
// its type. kWidth: elements per access; 1 works for any alignment. resident: vectors per thread in
// shared memory.
template <class S, class A, bool kSameTeacher, int kWidth>
__global__ void __launch_bounds__(block_threads(std::is_same_v<A, double>),
                                  block_threads_per_multiprocessor(std::is_same_v<A, double>) /
                                      block_threads(std::is_same_v<A, double>))
    kd_loss_block(const Sweep<A> sweep, const int resident) {
  using TeacherElement =
      std::conditional_t<kSameTeacher, S, A>;  // a teacher element in shared memory
  using ZVec = Vector<S, kWidth>;
  using VVec = Vector<TeacherElement, kWidth>;
  // Vectors that a thread loads at once and adds between two updates of its running maximum.
  constexpr int kChunk = std::is_same_v<A, double> ? 1 : kWidth == 1 ? 2 : 8 / kWidth;
  // With single elements the loads dominate, so a copy of the loops per temperature would not be
  // faster.
  constexpr bool kSquares = kWidth > 1;
  constexpr int kMaxWarps = block_threads(std::is_same_v<A, double>) / kWarpSize;
  static_assert(kWidth == 1 || kSameTeacher, "vectors of two types are not aligned alike");

  const int threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  const int classes = sweep.classes;
  ZVec* const z_slots = reinterpret_cast<ZVec*>(dynamic_shared());
  VVec* const v_slots = reinterpret_cast<VVec*>(z_slots + resident * threads);
  // Two sets, used alternately: a warp may be one row ahead of the slowest reader, never two.
  __shared__ OnlineStats<A> packets[2][kMaxWarps];

  __shared__ CountScratch count_scratch;

  const auto student_row = [&](std::int64_t index) {
    return static_cast<const S*>(sweep.student) + index * sweep.student_stride;
  };
  const auto teacher_row = [&](std::int64_t index) {
    return static_cast<const char*>(sweep.teacher) +
           index * sweep.teacher_stride * element_size(sweep.teacher_type);
  };
  const auto load_v = [&](const char* v_row, int k) -> VVec {
    if constexpr (kSameTeacher) {
      return *reinterpret_cast<const VVec*>(reinterpret_cast<const S*>(v_row) + k);
    } else {
      return VVec{{load_element<A>(v_row, sweep.teacher_type, k)}};
    }
  };
  const auto load_one_v = [&](const char* v_row, int k) -> A {
    if constexpr (kSameTeacher) {
      return widen<A>(reinterpret_cast<const S*>(v_row)[k]);
    } else {
      return load_element<A>(v_row, sweep.teacher_type, k);
    }
  };
  // Copies vector i of this thread from a row to its slot.
  const auto stage = [&](const Row<A>& row, const S* z_row, const char* v_row,
                         const Layout<S, kWidth>& layout, int i) {
    const int n = i * threads + thread;
    if (n >= layout.vectors) return;
    const int k = layout.head + n * kWidth;
    if constexpr (kWidth > 1) {
      if (row.reads_student(sweep)) __pipeline_memcpy_async(z_slots + n, z_row + k, sizeof(ZVec));
      if (row.reads_teacher(sweep)) {
        __pipeline_memcpy_async(v_slots + n, reinterpret_cast<const S*>(v_row) + k, sizeof(VVec));
      }
    } else {
      if (row.reads_student(sweep)) z_slots[n].element[0] = z_row[k];
      if (row.reads_teacher(sweep)) v_slots[n] = load_v(v_row, k);
    }
  };

  GradientScale<A> scale(sweep);
  Row<A> row = open_row(sweep, blockIdx.x);
  {
    const S* const z_row = student_row(blockIdx.x);
    const char* const v_row = teacher_row(row.reads_teacher(sweep) ? blockIdx.x : 0);
    const Layout<S, kWidth> layout(z_row, classes);
    for (int i = 0; i < resident; ++i) stage(row, z_row, v_row, layout, i);
    __pipeline_commit();
  }
  // Counts while the first row is copied.
  ValidRowCount<A> valid_rows;
  valid_rows.start(sweep, count_scratch);

  int turn = 0;
  for (std::int64_t index = blockIdx.x; index < sweep.rows; index += gridDim.x) {
    const bool reads_z = row.reads_student(sweep);
    const bool reads_v = row.reads_teacher(sweep);
    const S* const z_row = student_row(index);
    const char* const v_row = teacher_row(reads_v ? index : 0);
    const Layout<S, kWidth> layout(z_row, classes);
    // The number of this thread's vectors.
    const int slots = max(0, layout.vectors - thread + threads - 1) / threads;

    const Row<A> next = open_row(sweep, index + gridDim.x);
    const bool has_edge = kWidth > 1 && thread < layout.edges && reads_z;
    A z_edge = A(0), v_edge = A(0);
    if (has_edge) {
      z_edge = widen<A>(z_row[layout.edge(thread)]);
      if (reads_v) v_edge = load_one_v(v_row, layout.edge(thread));
    }
    // Loads vector i of this thread from shared or global memory. A teacher that is not read is 0.
    const auto fetch_v = [&](int i) -> VVec {
      const int n = i * threads + thread;
      const int k = layout.head + n * kWidth;
      const bool kept = i < resident;
      if constexpr (kSameTeacher) {
        return load_either(kept, v_slots + n,
                           reinterpret_cast<const VVec*>(reinterpret_cast<const S*>(v_row) + k));
      } else {
        return kept ? v_slots[n] : load_v(v_row, k);
      }
    };
    const auto fetch = [&](auto case_of, int i, ZVec& z, VVec& v) {
      const int n = i * threads + thread;
      const int k = layout.head + n * kWidth;
      z = load_either(i < resident, z_slots + n, reinterpret_cast<const ZVec*>(z_row + k));
      v = VVec{};
      if (decltype(case_of)::value == kHuge ? reads_v : kHasTeacher<decltype(case_of)::value>) {
        v = fetch_v(i);
      }
    };

    // Merges the statistics of the block's warps.
    const auto merge_block = [&](const OnlineStats<A>& part) {
      const int lane = thread % kWarpSize, warps = threads / kWarpSize;
      if (lane == 0) packets[turn][thread / kWarpSize] = part;
      __syncthreads();
      OnlineStats<A> whole = lane < warps ? packets[turn][lane] : empty_online_stats<A>();
      merge_lanes(sweep, whole);
      turn ^= 1;
      return whole;
    };

    OnlineStats<A> stats = empty_online_stats<A>();
    A z_y = A(0), v_y = A(0), sum_vr = A(0);
    __pipeline_wait_prior(0);
    if (reads_z) {
      with_case<kSquares>(sweep, reads_v, [&](auto case_of) {
        constexpr int kCase = decltype(case_of)::value;
        ThreadStats<A> thread_stats = empty_thread_stats<A>();
        if (has_edge) add_edge<kCase>(sweep, z_edge, v_edge, thread_stats);
#pragma unroll 1
        for (int i = 0; i < slots; i += kChunk) {
          const auto fetch_next = [&](int c, ZVec& z, VVec& v) {
            fetch(case_of, min(i + c, slots - 1), z, v);
          };
          add_vectors<kCase, kChunk, ZVec, VVec>(sweep, min(kChunk, slots - i), fetch_next,
                                                 thread_stats);
        }
        stats = warp_stats<kCase>(sweep, thread_stats);
      });
      add_lanes(sweep, stats);

      // Loaded here, so that the merge hides the latency.
      z_y = widen<A>(z_row[row.y]);
      if (reads_v) v_y = load_one_v(v_row, row.y);
      stats = merge_block(stats);
      if (reads_v && needs_sum_vr(sweep.params, v_y, stats.row.max_v)) {
        A part = has_edge ? revision_part(sweep, stats.row, Vector<A, 1>{{v_edge}}) : A(0);
#pragma unroll 1
        for (int i = 0; i < slots; ++i) part += revision_part(sweep, stats.row, fetch_v(i));
        sum_vr = merge_block(revision_stats(stats.row, part)).row.sum_vt;
      }
    }

    const RowResult<A> result =
        close_row(sweep, row, stats.row, z_y, v_y, sum_vr, scale.get(sweep, valid_rows), index);
    if (thread == 0) write_row(sweep, row, result, index);

    const std::int64_t next_index = index + gridDim.x;
    const S* const next_z = student_row(next_index);
    const char* const next_v = teacher_row(next.reads_teacher(sweep) ? next_index : 0);
    const Layout<S, kWidth> next_layout(next_z, classes);
    const auto stage_next = [&](int i) { stage(next, next_z, next_v, next_layout, i); };
    if (sweep.gradient == nullptr) {
      for (int i = 0; i < resident; ++i) stage_next(i);
    } else {
      S* const gradient = static_cast<S*>(sweep.gradient) + index * classes;
      ZVec* const out = reinterpret_cast<ZVec*>(gradient + layout.head) + thread;
      const auto put = [&](int i, const ZVec& g) {
        store_vector(reinterpret_cast<S*>(out + i * threads), g);
      };
      if (!reads_z) {
        // Zeros, or NaN for an invalid row.
        ZVec g;
#pragma unroll
        for (int j = 0; j < kWidth; ++j) g.element[j] = narrow<S>(A(0) - result.smoothing);
        for (int i = 0; i < slots; ++i) put(i, g);
        if (kWidth > 1 && thread < layout.edges) gradient[layout.edge(thread)] = g.element[0];
        for (int i = 0; i < resident; ++i) stage_next(i);
      } else {
        with_gradient_case<kSquares>(sweep, reads_v, stats.row, [&](auto case_of) {
          constexpr int kCase = decltype(case_of)::value;
          const ElementGradient<A> of = element_gradient<kCase>(sweep, stats.row, result);
          const auto finish = [&](int i, const ZVec& z, const VVec& v) {
            put(i, gradient_of_vector<kCase>(sweep, of, z, v));
          };
          int i = slots;
#pragma unroll 1
          while (i > resident) {
            // Stops at `resident`: the next loop refills the slots below.
            const int end = i;
            i = max(i - kChunk, resident);
            ZVec z[kChunk];
            VVec v[kChunk];
#pragma unroll
            for (int c = 0; c < kChunk; ++c) fetch(case_of, min(i + c, end - 1), z[c], v[c]);
#pragma unroll
            for (int c = 0; c < kChunk; ++c) {
              if (i + c < end) finish(i + c, z[c], v[c]);
            }
          }
#pragma unroll 1
          for (i = 0; i < resident; ++i) {
            if (i < slots) {
              ZVec z;
              VVec v;
              fetch(case_of, i, z, v);
              finish(i, z, v);
            }
            stage_next(i);
          }
          if (has_edge) {
            gradient[layout.edge(thread)] =
                narrow<S>(gradient_at<kCase>(sweep, of, z_edge, v_edge));
          }
        });
        // The thread that stored this element stores it again, so the two stores are in program
        // order.
        if (layout.owner(row.y, threads) == thread) {
          gradient[row.y] = narrow<S>(gradient_at_target(
              sweep, result, z_y - anchor(stats.row.max_z), v_y - anchor(stats.row.max_v)));
        }
      }
    }
    __pipeline_commit();
    row = next;
  }
}

}  // namespace lrds::cuda
