// A block per row, for every divergence and option: core/kd_row.h with a block as its executor
// (kd_family_simple.cuh is faster and takes most calls). The row is read once, converted and kept
// in shared memory for its passes. If two rows do not fit, every pass reads the row again, at best
// from L2.
#pragma once

#include <algorithm>
#include <limits>

#include "core/divergences.h"
#include "core/kd_row.h"
#include "cuda/device.cuh"
#include "cuda/kd_family.h"
#include "cuda/launch.h"

namespace lrds::cuda {

// The blocks of the double kernels are limited by registers.
template <class A>
constexpr int kFamilyThreads = std::is_same_v<A, double> ? 256 : 512;
constexpr int kFamilyWarps = 16;
constexpr int kFamilySums = 4;
// Static shared memory of a block, rounded up.
constexpr int kFamilyStaticBytes = 1024;

// The mathematical functions of core/divergence.h on a scalar.
template <class Accumulate>
struct LaneMath {
  using A = Accumulate;
  using X = Accumulate;
  // The scale, which is the same for a whole row, includes log2(e).
  __device__ static A exp(A x, A scale) {
    return exp_scaled(x, std::is_same_v<A, float> ? scale * static_cast<A>(1.44269504) : scale);
  }
  __device__ static A log(A x) { return row_log(x); }
  __device__ static A divide(A a, A b) { return row_divide(a, b); }
  __device__ static A where_positive(A condition, A x) { return condition > A(0) ? x : A(0); }
  __device__ static A where_positive(A condition, A x, A otherwise) {
    return condition > A(0) ? x : otherwise;
  }
  __device__ static A where_less(A a, A b, A x, A otherwise) { return a < b ? x : otherwise; }
  __device__ static A difference(A a, A b) { return a == b ? A(0) : a - b; }
};

// Shared memory of a block.
template <class A>
struct FamilyShared {
  A sums[kFamilySums][kFamilyWarps];
  int indices[kFamilyWarps];
};

// A row as a thread of the block sees it: thread t holds the classes t, t + blockDim.x, ...
template <class Accumulate>
class BlockRow {
 public:
  using M = LaneMath<Accumulate>;
  using A = Accumulate;

  const void* student;
  DType student_type;
  const void* teacher;  // dense: the row; cached: the kept logits
  DType teacher_type;
  const A* soft_target;
  const A* class_weight;
  void* gradient;
  int classes;
  int target;
  // Both rows in shared memory, or null.
  A* z_row;
  A* v_row;
  // For a cached teacher that is not in shared memory: one bit per class, set for kept classes.
  const std::int64_t* kept_indices;
  int kept;
  const unsigned* kept_bits;
  A rest;
  // Revise::kSwap: the class that holds the target's logit after the swap; -1 for none.
  int swapped;
  A swapped_logit;
  FamilyShared<A>* shared;

  __device__ A z(int k) const {
    if (z_row != nullptr) return z_row[k];
    return k == target ? negative_infinity<A>() : load_element<A>(student, student_type, k);
  }
  __device__ A v(int k) const {
    if (v_row != nullptr) return v_row[k];
    if (k == target) return negative_infinity<A>();
    return k == swapped ? swapped_logit : teacher_logit(k);
  }
  __device__ A t(int k) const { return soft_target[k]; }
  __device__ A w(int k) const { return class_weight[k]; }
  __device__ A others(int k, A x) const { return k == target ? A(0) : x; }

  // The teacher's logit from global memory, before a swap.
  __device__ A teacher_logit(int k) const {
    if (kept_indices == nullptr) return load_element<A>(teacher, teacher_type, k);
    if (!(kept_bits[k / 32] >> (k % 32) & 1u)) return rest;
    for (int i = 0; i < kept; ++i) {
      if (kept_indices[i] == k) return load_element<A>(teacher, teacher_type, i);
    }
    return rest;
  }

  template <class F>
  __device__ A max(F f) const {
    A top = negative_infinity<A>();
    for (int k = static_cast<int>(threadIdx.x); k < classes; k += static_cast<int>(blockDim.x)) {
      const A x = f(k);
      top = x > top ? x : top;
    }
    top = group_max(top, kWarpSize);
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    if (warps == 1) return top;
    if (threadIdx.x % kWarpSize == 0) shared->sums[0][threadIdx.x / kWarpSize] = top;
    __syncthreads();
    for (int warp = 0; warp < warps; ++warp) {
      const A x = shared->sums[0][warp];
      top = x > top ? x : top;
    }
    __syncthreads();
    return top;
  }

  template <int N, class F>
  __device__ void sum(F f, A* out) const {
    static_assert(N <= kFamilySums, "FamilyShared::sums");
    A sums[N] = {};
    for (int k = static_cast<int>(threadIdx.x); k < classes; k += static_cast<int>(blockDim.x)) {
      f(k, sums);
    }
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = group_sum(sums[i], kWarpSize);
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    if (warps > 1) {
      if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
        for (int i = 0; i < N; ++i) shared->sums[i][threadIdx.x / kWarpSize] = sums[i];
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[i] = A(0);
        for (int warp = 0; warp < warps; ++warp) sums[i] += shared->sums[i][warp];
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = sums[i];
  }

  // The lowest index at which f is largest.
  template <class F>
  __device__ int argmax(F f) const {
    const A top = max(f);
    int first = classes;
    for (int k = static_cast<int>(threadIdx.x); k < classes; k += static_cast<int>(blockDim.x)) {
      if (first == classes && f(k) == top) first = k;
    }
    first = -group_max(-first, kWarpSize);
    const int warps = static_cast<int>(blockDim.x) / kWarpSize;
    if (warps > 1) {
      if (threadIdx.x % kWarpSize == 0) shared->indices[threadIdx.x / kWarpSize] = first;
      __syncthreads();
      for (int warp = 0; warp < warps; ++warp) {
        first = shared->indices[warp] < first ? shared->indices[warp] : first;
      }
      __syncthreads();
    }
    // A row of NaN has no maximum that is equal to itself.
    return first < classes ? first : 0;
  }

  template <class F>
  __device__ void each(F f) const {
    for (int k = static_cast<int>(threadIdx.x); k < classes; k += static_cast<int>(blockDim.x)) {
      f(k);
    }
  }

  __device__ void store(int k, A x) const {
    with_element_type<A>(student_type, [&](auto typed) {
      using T = decltype(typed);
      static_cast<T*>(gradient)[k] = narrow<T>(x);
    });
  }
  __device__ bool owns(int k) const {
    return k % static_cast<int>(blockDim.x) == static_cast<int>(threadIdx.x);
  }
};

// The target, weight and validity of a row.
template <class A>
struct FamilyRow {
  std::int64_t y;
  A w;
  bool valid;
  bool bad;
};

template <class A>
__device__ inline FamilyRow<A> open_family_row(const KdLossArgs& args, std::int64_t row) {
  FamilyRow<A> out{0, A(1), true, false};
  const bool soft = args.soft_target != nullptr;
  if (!soft) {
    out.y = args.target_is_int64 ? static_cast<const std::int64_t*>(args.target)[row]
                                 : static_cast<const std::int32_t*>(args.target)[row];
    out.valid = out.y != args.ignore_index;
  }
  switch (args.selected_type) {
    case SelectedType::kPrefix:
      out.w = row < args.teacher_rows ? A(1) : A(0);
      break;
    case SelectedType::kBool:
      out.w = static_cast<const std::uint8_t*>(args.selected)[row] != 0 ? A(1) : A(0);
      break;
    case SelectedType::kFloat32:
      out.w = static_cast<A>(static_cast<const float*>(args.selected)[row]);
      break;
    case SelectedType::kFloat64:
      out.w = static_cast<A>(static_cast<const double*>(args.selected)[row]);
      break;
  }
  const bool in_range = soft || (out.y >= 0 && out.y < args.classes);
  out.bad = out.valid && !(in_range && out.w >= A(0) && out.w <= A(1));
  return out;
}

// Loads a cached teacher's rest logit and, unless the row is in shared memory, its bitmap. Returns
// whether every index is in range. The whole block calls it.
template <class A>
__device__ inline bool open_cached_teacher(const KdLossArgs& args, std::int64_t row,
                                           BlockRow<A>& exec, unsigned* bits) {
  const int kept = static_cast<int>(args.kept_classes);
  const std::int64_t* const indices = args.teacher_indices + row * kept;
  const int words = (exec.classes + 31) / 32;
  if (bits != nullptr) {
    for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x))
      bits[i] = 0;
  }
  __syncthreads();
  bool good = true;
  for (int i = 0; i < kept; ++i) {
    const std::int64_t k = indices[i];
    good = good && k >= 0 && k < exec.classes;
    if (bits != nullptr && good && exec.owns(i)) atomicOr(&bits[k / 32], 1u << (k % 32));
  }
  exec.rest = cached_filler(args.temperature, static_cast<const A*>(args.teacher_rest)[row],
                            exec.classes - kept);
  exec.kept_indices = indices;
  exec.kept = kept;
  exec.kept_bits = bits;
  __syncthreads();
  return good;
}

// Writes the gradient of a row without terms: zeros, or NaN for an invalid row.
template <class A>
__device__ inline void fill_gradient(const KdLossArgs& args, const BlockRow<A>& exec, A value) {
  if (args.gradient != nullptr) exec.each([&](int k) { exec.store(k, value); });
}

// resident: both rows are in shared memory. The coefficients of the temperatures are an array that
// is indexed in a loop, so it is in local memory; the passes over the row hide its latency.
template <class D, class A>
__global__ void __launch_bounds__(kFamilyThreads<A>, 1)
    kd_family_rows(const __grid_constant__ KdLossArgs args,
                   const __grid_constant__ DistillParams<A> params, const bool resident) {
  __shared__ FamilyShared<A> shared;
  const int classes = static_cast<int>(args.classes);
  const RowParams<A> row_weights_of = row_params<A>(args);
  A* const rows = reinterpret_cast<A*>(dynamic_shared());
  unsigned* const bits = resident ? nullptr : reinterpret_cast<unsigned*>(dynamic_shared());
  const bool scaled =
      args.reduction == Reduction::kMean || args.reduction == Reduction::kElementMean;

  for (std::int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const FamilyRow<A> open = open_family_row<A>(args, row);
    const RowWeights<A> weights =
        open.valid && !open.bad ? row_weights(row_weights_of, open.w) : RowWeights<A>{A(0), A(0)};
    const std::int64_t element = element_size(args.student_type);
    BlockRow<A> exec{};
    exec.student = static_cast<const char*>(args.student) + row * args.student_stride * element;
    exec.student_type = args.student_type;
    exec.teacher_type = args.teacher_type;
    exec.classes = classes;
    exec.swapped = -1;
    exec.shared = &shared;
    if (args.gradient != nullptr) {
      exec.gradient = static_cast<char*>(args.gradient) + row * args.classes * element;
    }
    if (args.soft_target != nullptr) {
      exec.soft_target = static_cast<const A*>(args.soft_target) + row * args.classes;
    }
    exec.class_weight = static_cast<const A*>(args.class_weight);

    RowTerms<A> terms{};
    bool bad = open.bad;
    const bool has_kd = weights.kd != A(0);
    if (weights.ce != A(0) || has_kd) {
      RowTask<A> task{};
      task.ce_weight = weights.ce;
      task.kd_weight = weights.kd;
      task.t_y = task.t_margin = task.t_sum = task.w_y = A(1);
      int y = static_cast<int>(open.y);
      if (exec.soft_target != nullptr) {
        y = exec.argmax([&](int k) { return exec.soft_target[k]; });
        exec.target = y;
        const A next = exec.max([&](int k) { return exec.others(k, exec.soft_target[k]); });
        A others[1];
        exec.template sum<1>(
            [&](int k, A* into) {
              const A t = exec.others(k, exec.soft_target[k]);
              into[0] += t < A(0) ? A(0) : t;
            },
            others);
        task.t_y = exec.soft_target[y];
        task.t_margin = task.t_y - next;
        task.t_sum = task.t_y + others[0];
      }
      exec.target = y;
      if (exec.class_weight != nullptr) task.w_y = exec.class_weight[y];
      task.z_y = load_element<A>(exec.student, exec.student_type, y);
      if (has_kd) {
        exec.teacher = static_cast<const char*>(args.teacher) +
                       row * args.teacher_stride * element_size(args.teacher_type);
        if (args.kept_classes > 0) bad = !open_cached_teacher(args, row, exec, bits);
        if (resident) {
          A* const v_row = rows + classes;
          if (args.kept_classes > 0) {
            exec.each([&](int k) { v_row[k] = exec.rest; });
            __syncthreads();
            for (int i = static_cast<int>(threadIdx.x); !bad && i < exec.kept;
                 i += static_cast<int>(blockDim.x)) {
              v_row[exec.kept_indices[i]] = load_element<A>(exec.teacher, exec.teacher_type, i);
            }
          } else {
            exec.each(
                [&](int k) { v_row[k] = load_element<A>(exec.teacher, exec.teacher_type, k); });
          }
          __syncthreads();
          task.v_y = v_row[y];
          if (D::kRevised && args.revise == Revise::kSwap) {
            exec.v_row = v_row;
            const int top = exec.argmax([&](int k) { return v_row[k]; });
            if (task.v_y < v_row[top]) {
              exec.swapped = top;
              exec.swapped_logit = task.v_y;
              task.v_y = v_row[top];
            }
          }
          __syncthreads();
          if (exec.swapped >= 0 && exec.owns(exec.swapped))
            v_row[exec.swapped] = exec.swapped_logit;
          if (exec.owns(y)) v_row[y] = negative_infinity<A>();
          exec.v_row = v_row;
        } else {
          task.v_y = exec.teacher_logit(y);
          if (D::kRevised && args.revise == Revise::kSwap) {
            const int top = exec.argmax([&](int k) { return exec.teacher_logit(k); });
            const A v_top = exec.teacher_logit(top);
            if (task.v_y < v_top) {
              exec.swapped = top;
              exec.swapped_logit = task.v_y;
              task.v_y = v_top;
            }
          }
        }
      }
      if (resident) {
        exec.each([&](int k) {
          rows[k] =
              k == y ? negative_infinity<A>() : load_element<A>(exec.student, exec.student_type, k);
        });
        exec.z_row = rows;
      }
      double by = args.grad_scale != nullptr
                      ? static_cast<double>(*static_cast<const A*>(args.grad_scale))
                      : 1.0;
      if (args.grad_output != nullptr) {
        by *= static_cast<double>(
            static_cast<const A*>(args.grad_output)[row * args.grad_output_stride]);
      }
      task.ce_scale = static_cast<A>(by * (scaled ? args.workspace[0] : 1.0));
      task.kd_scale = static_cast<A>(by * (scaled ? args.workspace[1] : 1.0));
      if (!bad) {
        terms = RowProgram<D, BlockRow<A>>(exec, params, task).run();
        if (args.gradient != nullptr && exec.owns(y)) exec.store(y, terms.at_target);
      }
      // The next row reuses the shared memory.
      __syncthreads();
    }
    if (bad) {
      const A nan = std::numeric_limits<A>::quiet_NaN();
      terms = RowTerms<A>{nan, nan, nan, false};
      fill_gradient(args, exec, nan);
    } else if (weights.ce == A(0) && !has_kd) {
      fill_gradient(args, exec, A(0));
    }
    if (args.counts == nullptr || threadIdx.x != 0) continue;
    unsigned flags = 0;
    if (open.valid) flags |= kRowValid | (open.w > A(0) ? kRowSelected : 0);
    if (terms.revised || exec.swapped >= 0) flags |= kRowRevised;
    static_cast<A*>(args.ce)[row] = terms.ce;
    static_cast<A*>(args.kd)[row] = terms.kd;
    args.flags[row] = static_cast<std::uint8_t>(flags);
    if (args.reduction == Reduction::kNone) static_cast<A*>(args.loss)[row] = terms.ce + terms.kd;
  }
}

template <class D, class A>
cudaError_t launch_family_rows(const KdLossArgs& args, int device, cudaStream_t stream) {
  constexpr auto kernel = kd_family_rows<D, A>;
  static OncePerDevice once;
  DeviceFacts facts;
  cudaError_t error = device_facts(device, &facts);
  if (error != cudaSuccess) return error;
  error = once(device, [](int d) {
    DeviceFacts known;
    const cudaError_t status = device_facts(d, &known);
    if (status != cudaSuccess) return status;
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                known.shared_per_block - kFamilyStaticBytes);
  });
  if (error != cudaSuccess) return error;

  const std::int64_t most_shared = facts.shared_per_block - kFamilyStaticBytes;
  std::int64_t shared_bytes = 2 * args.classes * static_cast<std::int64_t>(sizeof(A));
  const bool resident = shared_bytes <= most_shared;
  if (!resident) {
    shared_bytes = args.kept_classes > 0 ? (args.classes + 31) / 32 * 4 : 0;
    if (shared_bytes > most_shared) return cudaErrorInvalidValue;
  }
  // About eight classes per thread, because reductions dominate where a thread has fewer.
  int threads = kWarpSize;
  while (threads < kFamilyThreads<A> && std::int64_t{threads} * 8 < args.classes) threads *= 2;
  std::int64_t blocks = 0;
  error = resident_blocks(device, kernel, static_cast<unsigned>(threads), 0,
                          static_cast<std::size_t>(shared_bytes), &blocks);
  if (error != cudaSuccess) return error;
  return launch(kernel, static_cast<unsigned>(std::min(args.rows, blocks)),
                static_cast<unsigned>(threads), static_cast<std::size_t>(shared_bytes), stream,
                args, distill_params<A>(args), resident);
}

}  // namespace lrds::cuda
