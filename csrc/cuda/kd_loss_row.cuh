// What all row kernels share: reading a row's target and weight, the denominator of the reduction,
// turning statistics into coefficients, and writing the terms of a row.
#pragma once

#include "core/kd_loss.h"
#include "cuda/device.cuh"
#include "cuda/kd_loss_plan.h"

namespace lrds::cuda {

// For T = 1, 2 and 4, exp(x) is computed from exp(x / T), with a copy of the loops for each.
constexpr int kMaxSquarings = 2;

// KdLossArgs for the kernels, with hyperparameters rounded to A on the host.
template <class A>
struct Sweep {
  std::int64_t rows;
  int classes;
  const void* student;
  std::int64_t student_stride;
  const void* teacher;
  std::int64_t teacher_stride;
  std::int64_t teacher_rows;
  DType teacher_type;
  const void* target;
  bool target_is_int64;
  std::int64_t ignore_index;
  const void* selected;
  SelectedType selected_type;
  RowParams<A> params;
  A exp_scale;    // exp_scaled(x, exp_scale) = exp(x)
  A exp_t_scale;  // exp_scaled(x, exp_t_scale) = exp(x / T)
  A exp_r_scale;  // exp_scaled(x, exp_r_scale) = exp(x / R), for label revision at R; 0 if R = T
  int squarings;  // T = 2^squarings: exp(x) is exp(x / T) squared as often; -1: any other T
  Reduction reduction;
  const A* num_valid;
  const A* grad_scale;
  const A* grad_output;
  std::int64_t grad_output_stride;
  ValidRows valid_rows;
  unsigned long long* shared_count;  // ValidRows::kShared: zeroed before the launch
  void* gradient;
  A* ce;  // null: the call computes no loss
  A* kd;
  std::uint8_t* flags;
  A* loss;  // (rows,) with Reduction::kNone, else null
};

template <class A>
Sweep<A> make_sweep(const KdLossArgs& args, ValidRows valid_rows) {
  constexpr double kLog2E = 1.4426950408889634;
  constexpr double kUnit = std::is_same_v<A, float> ? kLog2E : 1.0;
  int squarings = -1;
  if (std::is_same_v<A, float>) {
    for (int s = 0; s <= kMaxSquarings; ++s) {
      if (args.temperature == static_cast<double>(1 << s)) squarings = s;
    }
  }
  const bool loss = args.counts != nullptr;
  return Sweep<A>{
      args.rows,
      static_cast<int>(args.classes),
      args.student,
      args.student_stride,
      args.teacher,
      args.teacher_stride,
      args.teacher_rows,
      args.teacher_type,
      args.target,
      args.target_is_int64,
      args.ignore_index,
      args.selected,
      args.selected_type,
      row_params<A>(args),
      static_cast<A>(kUnit),
      static_cast<A>(kUnit / args.temperature),
      static_cast<A>(revises_elsewhere(args, args.temperature) ? kUnit / args.revise_temperature
                                                               : 0.0),
      squarings,
      args.reduction,
      static_cast<const A*>(args.num_valid),
      static_cast<const A*>(args.grad_scale),
      static_cast<const A*>(args.grad_output),
      args.grad_output_stride,
      valid_rows,
      reinterpret_cast<unsigned long long*>(args.counts),
      args.gradient,
      loss ? static_cast<A*>(args.ce) : nullptr,
      static_cast<A*>(args.kd),
      args.flags,
      loss && args.reduction == Reduction::kNone ? static_cast<A*>(args.loss) : nullptr};
}

template <class A>
__device__ inline std::int64_t target_of(const Sweep<A>& sweep, std::int64_t row) {
  return sweep.target_is_int64 ? static_cast<const std::int64_t*>(sweep.target)[row]
                               : static_cast<const std::int32_t*>(sweep.target)[row];
}

// --- The number of valid rows ---

// Shared memory of block_count_valid.
struct CountScratch {
  unsigned long long partial[kMaxThreads / kWarpSize];
};

// The number of valid rows in [begin, end), counted by the first `threads` threads of the block,
// which all get the sum. All of them must call it together, and once. meet() must make what each
// has stored visible to all of them.
template <class A, class Meet>
__device__ unsigned long long block_count_valid(const Sweep<A>& sweep, std::int64_t begin,
                                                std::int64_t end, CountScratch& scratch,
                                                unsigned threads, Meet meet) {
  unsigned long long* const partial = scratch.partial;
  unsigned long long count = 0;
#pragma unroll 4
  for (std::int64_t row = begin + threadIdx.x; row < end; row += threads) {
    count += target_of(sweep, row) != sweep.ignore_index;
  }
  count = group_sum(count, kWarpSize);
  if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = count;
  meet();
  count = 0;
  for (unsigned warp = 0; warp < threads / kWarpSize; ++warp) count += partial[warp];
  return count;
}

// The number of valid rows, for the denominator of the gradient. The whole block, or its first
// `threads` threads with meet() as in block_count_valid, call start() before the first row; whole
// warps call get().
//
// kShared: every block counts its share of the targets and adds (1 << 32 | its count) to one zeroed
// word. get() waits until all blocks have added theirs, which is long done when the statistics of
// the first row are. The wait is bounded: if some blocks do not run (the grid is not resident at
// once), a warp counts all targets itself. So no block depends on another, and the integer is the
// same in both cases.
template <class A>
struct ValidRowCount {
  A block_count;

  __device__ void start(const Sweep<A>& sweep, CountScratch& scratch) {
    start(sweep, scratch, blockDim.x, [] { __syncthreads(); });
  }
  template <class Meet>
  __device__ void start(const Sweep<A>& sweep, CountScratch& scratch, unsigned threads, Meet meet) {
    block_count = A(0);
    if (sweep.valid_rows == ValidRows::kPerBlock) {
      block_count = static_cast<A>(block_count_valid(sweep, 0, sweep.rows, scratch, threads, meet));
    }
    if (sweep.valid_rows == ValidRows::kShared) {
      const std::int64_t share = (sweep.rows + gridDim.x - 1) / gridDim.x;
      const std::int64_t begin = share * blockIdx.x;
      const std::int64_t end = begin + share < sweep.rows ? begin + share : sweep.rows;
      const unsigned long long count = block_count_valid(sweep, begin, end, scratch, threads, meet);
      if (threadIdx.x == 0) atomicAdd(sweep.shared_count, (1ull << 32) | count);
    }
  }

  __device__ A get(const Sweep<A>& sweep) const {
    if (sweep.valid_rows == ValidRows::kNotNeeded) return A(0);
    if (sweep.valid_rows == ValidRows::kFromArgument) return *sweep.num_valid;
    if (sweep.valid_rows == ValidRows::kPerBlock) return block_count;
    unsigned long long word_value = 0;
    if (threadIdx.x % kWarpSize == 0) {
      const volatile unsigned long long* const word = sweep.shared_count;
      // More than counting would take; each try is at most a microsecond.
      const std::int64_t tries = 32 + sweep.rows / 1024;
      for (std::int64_t i = 0; i < tries && (word_value >> 32) != gridDim.x; ++i) {
        if (i > 0) __nanosleep(100);
        word_value = *word;
      }
    }
    word_value = __shfl_sync(kWholeWarp, word_value, 0);
    if ((word_value >> 32) == gridDim.x) return static_cast<A>(word_value & 0xffffffffu);
    int count = 0;
#pragma unroll 4
    for (std::int64_t row = threadIdx.x % kWarpSize; row < sweep.rows; row += kWarpSize) {
      count += target_of(sweep, row) != sweep.ignore_index;
    }
    return static_cast<A>(group_sum(count, kWarpSize));
  }

  // The factor of every row's gradient.
  __device__ A gradient_scale(const Sweep<A>& sweep) const {
    A scale = reduction_scale<A>(sweep.reduction, get(sweep), static_cast<A>(sweep.classes));
    if (sweep.grad_scale != nullptr) scale *= *sweep.grad_scale;
    return scale;
  }
};

// ValidRowCount::gradient_scale, computed when the first row needs it.
template <class A>
struct GradientScale {
  A scale = A(0);
  bool known;

  __device__ explicit GradientScale(const Sweep<A>& sweep) : known(sweep.gradient == nullptr) {}
  __device__ A get(const Sweep<A>& sweep, const ValidRowCount<A>& valid_rows) {
    if (!known) {
      scale = valid_rows.gradient_scale(sweep);
      known = true;
    }
    return scale;
  }
};

// --- A row ---

// The target and selection weight of a row, in two registers. Those of the next row are loaded
// while this one is computed.
template <class A>
struct Row {
  int y;  // kIgnored, kBad or the class
  A w;

  static constexpr int kIgnored = -1;
  static constexpr int kBad = -2;  // target or weight out of range: the row becomes NaN

  __device__ RowWeights<A> weights(const Sweep<A>& sweep) const {
    return y >= 0 ? row_weights(sweep.params, w) : RowWeights<A>{A(0), A(0)};
  }
  __device__ bool reads_student(const Sweep<A>& sweep) const {
    const RowWeights<A> both = weights(sweep);
    return both.ce != A(0) || both.kd != A(0);
  }
  __device__ bool reads_teacher(const Sweep<A>& sweep) const { return weights(sweep).kd != A(0); }
};

// A row past the end is an ignored row.
template <class A>
__device__ inline Row<A> open_row(const Sweep<A>& sweep, std::int64_t row) {
  Row<A> out{Row<A>::kIgnored, A(0)};
  if (row >= sweep.rows) return out;
  const std::int64_t y = target_of(sweep, row);
  switch (sweep.selected_type) {
    case SelectedType::kPrefix:
      out.w = row < sweep.teacher_rows ? A(1) : A(0);
      break;
    case SelectedType::kBool:
      out.w = static_cast<const std::uint8_t*>(sweep.selected)[row] != 0 ? A(1) : A(0);
      break;
    case SelectedType::kFloat32:
      out.w = static_cast<A>(static_cast<const float*>(sweep.selected)[row]);
      break;
    case SelectedType::kFloat64:
      out.w = static_cast<A>(static_cast<const double*>(sweep.selected)[row]);
      break;
  }
  if (y == sweep.ignore_index) return out;
  const bool good = y >= 0 && y < sweep.classes && out.w >= A(0) && out.w <= A(1);
  out.y = good ? static_cast<int>(y) : Row<A>::kBad;
  return out;
}

// finish_row; zeros for a row without terms, and NaN for an invalid row.
template <class A>
__device__ inline RowResult<A> close_row(const Sweep<A>& sweep, const Row<A>& row,
                                         RowWeights<A> weights, const RowStats<A>& stats,
                                         const RowTarget<A>& target, A scale, std::int64_t index,
                                         bool exists) {
  if (sweep.grad_output != nullptr && exists) {
    scale *= sweep.grad_output[sweep.grad_output_stride != 0 ? index : 0];
  }
  RowResult<A> result =
      finish_row(stats, target, sweep.params, weights, static_cast<A>(sweep.classes), scale);
  if (row.y == Row<A>::kBad) {
    const A nan = std::numeric_limits<A>::quiet_NaN();
    result = RowResult<A>{nan, nan, nan, nan, nan, nan, nan, false};
  }
  return result;
}
template <class A>
__device__ inline RowResult<A> close_row(const Sweep<A>& sweep, const Row<A>& row,
                                         const RowStats<A>& stats, A z_y, A v_y, A sum_vr, A scale,
                                         std::int64_t index) {
  return close_row(sweep, row, row.weights(sweep), stats,
                   row_target(stats, z_y, v_y, sum_vr, sweep.params), scale, index,
                   index < sweep.rows);
}

template <class A>
__device__ inline void write_row(const Sweep<A>& sweep, const Row<A>& row,
                                 const RowResult<A>& result, std::int64_t index) {
  if (sweep.ce == nullptr) return;
  unsigned flags = 0;
  if (row.y != Row<A>::kIgnored) flags |= kRowValid | (row.w > A(0) ? kRowSelected : 0);
  if (result.revised) flags |= kRowRevised;
  sweep.ce[index] = result.ce;
  sweep.kd[index] = result.kd;
  sweep.flags[index] = static_cast<std::uint8_t>(flags);
  if (sweep.loss != nullptr) sweep.loss[index] = result.ce + result.kd;
}

// x to the power 2^kSquarings: exp(x) from exp(x / T), where T = 2^kSquarings.
template <int kSquarings, class A>
__device__ inline A squared(A x) {
#pragma unroll
  for (int i = 0; i < kSquarings; ++i) x *= x;
  return x;
}

// Calls body with squarings as std::integral_constant, so that no element branches on it.
template <class Body>
__device__ inline void with_squarings(int squarings, Body body) {
  static_assert(kMaxSquarings == 2, "one case each");
  if (squarings == 2) return body(std::integral_constant<int, 2>());
  if (squarings == 1) return body(std::integral_constant<int, 1>());
  if (squarings == 0) return body(std::integral_constant<int, 0>());
  body(std::integral_constant<int, -1>());
}

// with_squarings for a call. Only float has these cases.
template <class A, class Body>
__device__ inline void with_squarings(const Sweep<A>& sweep, Body body) {
  if constexpr (std::is_same_v<A, float>) {
    with_squarings(sweep.squarings, body);
  } else {
    body(std::integral_constant<int, -1>());
  }
}

// dL/dz_k without the constant at the target, from the exponentials.
template <class A>
__device__ inline A gradient_from(const RowResult<A>& result, A exp_z, A exp_zt, A exp_vt) {
  // This compiles to three multiply-adds.
  return result.coefficient_z * exp_z +
         (result.coefficient_zt * exp_zt + (-result.coefficient_vt * exp_vt - result.smoothing));
}

// The complete element at the target. z_y and v_y are relative to the anchors.
template <class A>
__device__ inline A gradient_at_target(const Sweep<A>& sweep, const RowResult<A>& result, A z_y,
                                       A v_y) {
  return gradient_from(result, exp_scaled(z_y, sweep.exp_scale), exp_scaled(z_y, sweep.exp_t_scale),
                       exp_scaled(v_y, sweep.exp_t_scale)) +
         result.at_target;
}

// How a row is divided into aligned vectors: `head` elements, then `vectors` of kWidth elements,
// then the tail.
template <class S, int kWidth>
struct Layout {
  int head;
  int vectors;
  int edges;  // elements outside the vectors, head and tail: fewer than 2 * kWidth

  __device__ Layout(const S* row, int classes) {
    head = 0;
    if constexpr (kWidth > 1) {
      constexpr unsigned kBytes = sizeof(S) * kWidth;
      const unsigned past = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(row) % kBytes);
      head = static_cast<int>((kBytes - past) % kBytes / sizeof(S));
      head = head < classes ? head : classes;
    }
    vectors = (classes - head) / kWidth;
    edges = classes - vectors * kWidth;
  }
  __device__ int edge(int i) const { return i < head ? i : vectors * kWidth + i; }
  // The thread, of `threads` that stride over vectors and edges, that holds class k.
  __device__ int owner(int k, int threads) const {
    const int inside = k - head;
    if (inside < 0) return k;
    const int vector = inside / kWidth;
    return vector < vectors ? vector % threads : (k - vectors * kWidth) % threads;
  }
};

}  // namespace lrds::cuda
