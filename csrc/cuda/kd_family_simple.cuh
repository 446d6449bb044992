// Most calls of the family: accumulation in float, a dense teacher, and is_simple(). 1 to 32 lanes
// of a warp, or a block, keep a row in shared memory, converted to float, and process four classes
// at a time. A thread sees the same vectors in every pass, so that rows of whole vectors need no
// barrier between the copy and the passes.
#pragma once

#include <cuda_pipeline.h>

#include <algorithm>
#include <limits>

#include "core/divergences.h"
#include "core/kd_row.h"
#include "cuda/device.cuh"
#include "cuda/kd_family.cuh"
#include "cuda/kd_loss_row.cuh"
#include "cuda/launch.h"

namespace lrds::cuda {

constexpr int kQuad = 4;
// Quads per thread of a row, as long as a block has threads.
constexpr int kQuadsOfThread = 8;
constexpr int kSimpleThreads = 512;
// Leaves 96 registers to each thread: five blocks of kSimpleGroupThreads.
constexpr int kSimpleBound = 640;
// Threads of a block that holds several rows.
constexpr int kSimpleGroupThreads = 128;

// Four classes.
struct alignas(16) Quad {
  float x[kQuad];

  template <class F>
  __device__ static Quad of(F f) {
    Quad out;
#pragma unroll
    for (int j = 0; j < kQuad; ++j) out.x[j] = f(j);
    return out;
  }
  __device__ Quad& operator+=(const Quad& b) { return *this = *this + b; }
  __device__ Quad& operator-=(const Quad& b) { return *this = *this - b; }
  __device__ friend Quad operator+(const Quad& a, const Quad& b) {
    return of([&](int j) { return a.x[j] + b.x[j]; });
  }
  __device__ friend Quad operator-(const Quad& a, const Quad& b) {
    return of([&](int j) { return a.x[j] - b.x[j]; });
  }
  __device__ friend Quad operator*(const Quad& a, const Quad& b) {
    return of([&](int j) { return a.x[j] * b.x[j]; });
  }
  __device__ friend Quad operator+(const Quad& a, float b) {
    return of([&](int j) { return a.x[j] + b; });
  }
  __device__ friend Quad operator-(const Quad& a, float b) {
    return of([&](int j) { return a.x[j] - b; });
  }
  __device__ friend Quad operator*(const Quad& a, float b) {
    return of([&](int j) { return a.x[j] * b; });
  }
  __device__ friend Quad operator*(float b, const Quad& a) {
    return of([&](int j) { return b * a.x[j]; });
  }
};

// The mathematical functions of core/divergence.h on a quad.
struct QuadMath {
  using A = float;
  using X = Quad;
  using Lane = LaneMath<float>;
  __device__ static X exp(const X& x, A scale) {
    return X::of([&](int j) { return Lane::exp(x.x[j], scale); });
  }
  __device__ static X log(const X& x) {
    return X::of([&](int j) { return Lane::log(x.x[j]); });
  }
  __device__ static X divide(const X& a, const X& b) {
    return X::of([&](int j) { return Lane::divide(a.x[j], b.x[j]); });
  }
  __device__ static X where_positive(const X& condition, const X& x) {
    return X::of([&](int j) { return Lane::where_positive(condition.x[j], x.x[j]); });
  }
  __device__ static X where_less(const X& a, A b, const X& x, const X& otherwise) {
    return X::of([&](int j) { return Lane::where_less(a.x[j], b, x.x[j], otherwise.x[j]); });
  }
  __device__ static X difference(const X& a, const X& b) {
    return X::of([&](int j) { return Lane::difference(a.x[j], b.x[j]); });
  }
};

// The layout of rows in a launch. The number of threads per row depends on the number of classes
// only.
struct SimplePlan {
  int threads;  // of a row: a power of two
  // Quads per row in shared memory: odd, so that rows of one lane have no bank conflicts.
  int stride;
  RowParams<float> weights;
  bool logits_aligned;    // every row of student and teacher begins at a quad
  bool gradient_aligned;  // every row of the gradient begins at a quad and consists of whole quads
};

// The executor of core/kd_row.h. Position n is the classes 4n to 4n + 3.
class SimpleRow {
 public:
  using M = QuadMath;
  using A = float;
  using X = Quad;

  Quad* z_row;
  Quad* v_row;
  int quads;
  int thread;  // index among the row's `threads`
  int threads;
  // Partial sums of the block's warps. Reductions alternate between the two halves, so that each
  // needs only one barrier.
  FamilyShared<A>* shared;
  int turn;
  void* gradient;
  DType type;   // of the gradient
  bool silent;  // stores nothing
  // Writes the gradient at once; else it replaces the student's logits in shared memory.
  bool direct;

  __device__ Quad z(int n) const { return z_row[n]; }
  __device__ Quad v(int n) const { return v_row[n]; }

  template <class F>
  __device__ A max(F f) {
    A top = negative_infinity<A>();
#pragma unroll 1
    for (int n = thread; n < quads; n += threads) {
      const Quad x = f(n);
#pragma unroll
      for (int j = 0; j < kQuad; ++j) top = fmaxf(top, x.x[j]);
    }
    reduce<1>(&top, [](A a, A b) { return fmaxf(a, b); });
    return top;
  }
  template <int N, class F>
  __device__ void sum(F f, A* out) {
    static_assert(N <= kFamilySums, "FamilyShared::sums");
    Quad sums[N] = {};
#pragma unroll 1
    for (int n = thread; n < quads; n += threads) f(n, sums);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float (&x)[kQuad] = sums[i].x;
      out[i] = (x[0] + x[1]) + (x[2] + x[3]);
    }
    reduce<N>(out, [](A a, A b) { return a + b; });
  }
  template <class F>
  __device__ void each(F f) const {
#pragma unroll 1
    for (int n = thread; n < quads; n += threads) f(n);
  }
  __device__ void store(int n, const Quad& g) const {
    if (silent) return;
    if (!direct) {
      z_row[n] = g;
      return;
    }
    with_element_type<A>(type, [&](auto typed) {
      using T = decltype(typed);
      store_vector(static_cast<T*>(gradient) + kQuad * n, narrow_vector<T>(g.x));
    });
  }
  __device__ bool any(bool x) const { return __any_sync(kWholeWarp, x) != 0; }
  __device__ bool owns(int k) const { return (k / kQuad & (threads - 1)) == thread; }
  __device__ void sync() const {
    if (threads > kWarpSize) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // Copies a row into shared memory. Unless it is aligned, other threads than the copying one read
  // it.
  __device__ void copy_in(const void* from, DType of, int classes, bool aligned, Quad* to) const {
    float* const elements = reinterpret_cast<float*>(to);
    with_element_type<A>(of, [&](auto typed) {
      const auto* const row = static_cast<const decltype(typed)*>(from);
      if (!aligned) {
        copy_vectors<1>(row, classes, elements);
        return;
      }
      const int whole = classes / kQuad;
      copy_vectors<kQuad>(row, whole, elements);
      if (owns(classes - 1)) {
#pragma unroll 1
        for (int k = kQuad * whole; k < classes; ++k) elements[k] = widen<A>(row[k]);
      }
    });
  }

  // Masks the target and the positions past the end. Each is done by the thread that owns it.
  __device__ void close(Quad* to, int classes, int y) const {
    float* const elements = reinterpret_cast<float*>(to);
    if (owns(y)) elements[y] = negative_infinity<A>();
    if (owns(classes - 1)) {
#pragma unroll 1
      for (int k = classes; k < kQuad * quads; ++k) elements[k] = negative_infinity<A>();
    }
  }

  // k counts the row's quads, not the thread's.
  template <class F>
  __device__ void write_elements(int classes, F f) const {
    with_element_type<A>(type, [&](auto typed) {
      using T = decltype(typed);
#pragma unroll 1
      for (int k = thread; k < classes; k += threads) {
        static_cast<T*>(gradient)[k] = narrow<T>(f(k));
      }
    });
  }

 private:
  // Copies vectors of kWidth elements; float is copied asynchronously.
  template <int kWidth, class T>
  __device__ void copy_vectors(const T* from, int count, float* to) const {
    if constexpr (std::is_same_v<T, float>) {
#pragma unroll 1
      for (int n = thread; n < count; n += threads) {
        // NOLINTNEXTLINE(bugprone-implicit-widening-of-multiplication-result): in shared memory
        __pipeline_memcpy_async(to + kWidth * n, from + kWidth * n, kWidth * sizeof(float));
      }
    } else {
      using Vec = Vector<T, kWidth>;
      // All loads come before the first store, so that they overlap.
      constexpr int kBatch = 8;
#pragma unroll 1
      for (int first = thread; first < count; first += kBatch * threads) {
        // Past the end, the last vector is loaded again: a conditional load would keep its
        // registers live in the whole kernel.
        Vec batch[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int n = min(first + i * threads, count - 1);
          batch[i] = *reinterpret_cast<const Vec*>(from + kWidth * n);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int n = first + i * threads;
          if (n >= count) continue;
          Vector<float, kWidth> wide;
#pragma unroll
          for (int j = 0; j < kWidth; ++j) wide.element[j] = widen<A>(batch[i].element[j]);
          // NOLINTNEXTLINE(bugprone-implicit-widening-of-multiplication-result): in shared memory
          *reinterpret_cast<Vector<float, kWidth>*>(to + kWidth * n) = wide;
        }
      }
    }
  }

  template <int N, class Op>
  __device__ void reduce(A* x, Op op) {
#pragma unroll 1
    for (int offset = (threads < kWarpSize ? threads : kWarpSize) / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = op(x[i], __shfl_xor_sync(kWholeWarp, x[i], offset));
    }
    if (threads <= kWarpSize) return;
    FamilyShared<A>& half = shared[turn];
    turn ^= 1;
    if (thread % kWarpSize == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) half.sums[i][thread / kWarpSize] = x[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[i] = half.sums[i][0];
#pragma unroll 1
      for (int warp = 1; warp < threads / kWarpSize; ++warp) x[i] = op(x[i], half.sums[i][warp]);
    }
  }
};

__device__ inline Row<float> open_simple_row(const KdLossArgs& args, std::int64_t row) {
  const FamilyRow<float> open = open_family_row<float>(args, row);
  return Row<float>{open.bad     ? Row<float>::kBad
                    : open.valid ? static_cast<int>(open.y)
                                 : Row<float>::kIgnored,
                    open.w};
}

template <class D>
__global__ void __launch_bounds__(kSimpleBound, 1)
    kd_family_simple(const __grid_constant__ KdLossArgs args,
                     const __grid_constant__ DistillParams<float> params,
                     const __grid_constant__ SimplePlan plan) {
  using A = float;
  __shared__ FamilyShared<A> shared[2];
  const int classes = static_cast<int>(args.classes);
  const int local = static_cast<int>(threadIdx.x) / plan.threads;
  const std::int64_t rows_of_block = static_cast<int>(blockDim.x) / plan.threads;

  double by = args.grad_scale != nullptr
                  ? static_cast<double>(*static_cast<const A*>(args.grad_scale))
                  : 1.0;
  const bool scaled =
      args.reduction == Reduction::kMean || args.reduction == Reduction::kElementMean;
  const A ce_by = static_cast<A>(by * (scaled ? args.workspace[0] : 1.0));
  const A kd_by = static_cast<A>(by * (scaled ? args.workspace[1] : 1.0));

  SimpleRow exec;
  // NOLINTNEXTLINE(bugprone-implicit-widening-of-multiplication-result): in shared memory
  exec.z_row = reinterpret_cast<Quad*>(dynamic_shared()) + 2 * local * plan.stride;
  exec.v_row = exec.z_row + plan.stride;
  exec.quads = (classes + kQuad - 1) / kQuad;
  exec.threads = plan.threads;
  exec.thread = static_cast<int>(threadIdx.x) & (plan.threads - 1);
  exec.shared = shared;
  exec.turn = 0;
  exec.type = args.student_type;
  exec.direct = plan.gradient_aligned;
  const int student_size = element_size(args.student_type);
  const int teacher_size = element_size(args.teacher_type);

  const std::int64_t step = gridDim.x * rows_of_block;
  std::int64_t index = blockIdx.x * rows_of_block + local;
  // The lanes of a warp loop together, because they share shuffles: the warp's first row decides.
  const int past =
      plan.threads < kWarpSize ? static_cast<int>(threadIdx.x) % kWarpSize / plan.threads : 0;
  // The target of the next row is loaded while this row is computed.
  Row<float> next{Row<float>::kIgnored, A(0)};
  if (index < args.rows) next = open_simple_row(args, index);
  for (; index - past < args.rows; index += step) {
    const Row<float> open = next;
    const bool inside = index < args.rows;
    next.y = Row<float>::kIgnored;
    if (index + step < args.rows) next = open_simple_row(args, index + step);
    const RowWeights<A> weights =
        open.y >= 0 ? row_weights(plan.weights, open.w) : RowWeights<A>{A(0), A(0)};
    const bool has_kd = weights.kd != A(0);
    const bool swept = weights.ce != A(0) || has_kd;
    exec.gradient = static_cast<char*>(args.gradient) + index * args.classes * student_size;
    RowTask<A> task{};
    task.ce_weight = weights.ce;
    task.kd_weight = weights.kd;
    task.t_y = task.t_margin = task.t_sum = task.w_y = A(1);
    const int y = swept ? open.y : 0;
    if (swept) {
      const char* const student =
          static_cast<const char*>(args.student) + index * args.student_stride * student_size;
      const char* const teacher =
          static_cast<const char*>(args.teacher) + index * args.teacher_stride * teacher_size;
#pragma unroll 1
      for (int second = 0; second <= static_cast<int>(has_kd); ++second) {
        exec.copy_in(second ? teacher : student, second ? args.teacher_type : args.student_type,
                     classes, plan.logits_aligned, second ? exec.v_row : exec.z_row);
      }
      __pipeline_commit();
      task.z_y = load_element<A>(student, args.student_type, y);
      if (has_kd) task.v_y = load_element<A>(teacher, args.teacher_type, y);
      const A scale = args.grad_output != nullptr
                          ? static_cast<const A*>(args.grad_output)[index * args.grad_output_stride]
                          : A(1);
      task.ce_scale = ce_by * scale;
      task.kd_scale = kd_by * scale;
      __pipeline_wait_prior(0);
    }
    if (!plan.logits_aligned) exec.sync();
    if (swept) {
      exec.close(exec.z_row, classes, y);
      if (has_kd) exec.close(exec.v_row, classes, y);
    }
    RowTerms<A> terms{};
    if (exec.any(swept)) {
      // A row that is not computed still takes part in the reductions, with any values, and stores
      // nothing.
      exec.silent = !swept;
      terms = RowProgram<D, SimpleRow, true>(exec, params, task).run();
      if (!exec.direct) exec.sync();
      if (args.gradient != nullptr && swept) {
        if (!exec.direct) {
          const float* const g = reinterpret_cast<const float*>(exec.z_row);
          exec.write_elements(classes, [&](int k) { return k == y ? terms.at_target : g[k]; });
        } else if (exec.owns(y)) {
          with_element_type<A>(exec.type, [&](auto typed) {
            using T = decltype(typed);
            static_cast<T*>(exec.gradient)[y] = narrow<T>(terms.at_target);
          });
        }
      }
    }
    // The next row overwrites shared memory that other threads have read.
    if (!plan.logits_aligned || !exec.direct) exec.sync();
    if (!inside) continue;
    if (!swept) {
      const A value = open.y == Row<float>::kBad ? std::numeric_limits<A>::quiet_NaN() : A(0);
      terms = RowTerms<A>{value, value, value, false};
      if (args.gradient != nullptr) exec.write_elements(classes, [&](int) { return value; });
    }
    if (args.counts == nullptr || exec.thread != 0) continue;
    unsigned flags = 0;
    if (open.y != Row<float>::kIgnored) flags |= kRowValid | (open.w > A(0) ? kRowSelected : 0);
    if (terms.revised) flags |= kRowRevised;
    static_cast<A*>(args.ce)[index] = terms.ce;
    static_cast<A*>(args.kd)[index] = terms.kd;
    args.flags[index] = static_cast<std::uint8_t>(flags);
    if (args.reduction == Reduction::kNone) static_cast<A*>(args.loss)[index] = terms.ce + terms.kd;
  }
}

// Whether every row of `elements` begins at a vector of four elements.
inline bool quads_aligned(const void* rows, std::int64_t stride, DType type) {
  const auto bytes = std::uintptr_t{kQuad} * static_cast<std::uintptr_t>(element_size(type));
  return reinterpret_cast<std::uintptr_t>(rows) % bytes == 0 && stride % kQuad == 0;
}

// Launches kd_family_simple if the call is simple and its rows fit in shared memory.
template <class D>
cudaError_t launch_family_simple(const KdLossArgs& args, int device, cudaStream_t stream,
                                 bool* launched) {
  constexpr auto kernel = kd_family_simple<D>;
  *launched = false;
  const DistillParams<float> params = distill_params<float>(args);
  if (!is_simple(params) || args.kept_classes > 0 ||
      (D::kRevised && args.revise == Revise::kSwap)) {
    return cudaSuccess;
  }
  DeviceFacts facts;
  cudaError_t error = device_facts(device, &facts);
  if (error != cudaSuccess) return error;
  const std::int64_t quads = (args.classes + kQuad - 1) / kQuad;
  int threads = 1;
  while (threads < kSimpleThreads && std::int64_t{threads} * kQuadsOfThread < quads) threads *= 2;
  const int block = threads > kWarpSize ? threads : kSimpleGroupThreads;
  const std::int64_t stride = quads | 1;
  const std::int64_t together = block / threads;
  const std::int64_t shared_bytes = together * 2 * stride * static_cast<std::int64_t>(sizeof(Quad));
  const std::int64_t most_shared = facts.shared_per_block - kFamilyStaticBytes;
  if (shared_bytes > most_shared) return cudaSuccess;
  static OncePerDevice once;
  error = once(device, [most_shared](int) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(most_shared));
  });
  if (error != cudaSuccess) return error;
  std::int64_t resident = 0;
  error = resident_blocks(device, kernel, static_cast<unsigned>(block), 0,
                          static_cast<std::size_t>(shared_bytes), &resident);
  if (error != cudaSuccess) return error;
  const SimplePlan plan{threads, static_cast<int>(stride), row_params<float>(args),
                        quads_aligned(args.student, args.student_stride, args.student_type) &&
                            quads_aligned(args.teacher, args.teacher_stride, args.teacher_type),
                        quads_aligned(args.gradient, args.classes, args.student_type)};
  *launched = true;
  return launch(kernel,
                static_cast<unsigned>(std::min((args.rows + together - 1) / together, resident)),
                static_cast<unsigned>(block), static_cast<std::size_t>(shared_bytes), stream, args,
                params, plan);
}

}  // namespace lrds::cuda
