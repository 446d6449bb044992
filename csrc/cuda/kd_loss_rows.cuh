// The row kernels of kd_loss. Three ways to hold a row, one mathematics (core/kd_loss.h):
//   warp      a warp per row, the pair of rows in registers                        C <= 1024
//   resident  a block per row, the pair of rows in shared memory after one read    while it fits
//   streaming a block per row, the rows read twice (the second time mostly from L2)  any C
// All run on a grid that is at most a few blocks per multiprocessor and stride over rows, so that
// what a block must know of the whole batch (how many targets are valid) is counted once per block,
// not once per row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/kd_loss.h"
#include "cuda/launch.h"

namespace lrds::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kWarpSize = 32;
constexpr int kWarpThreads = 128;  // threads of a block of the warp kernel: 4 rows at a time
// Threads of a block of the resident and streaming kernels, at most; doubles take twice the
// registers.
template <class A>
constexpr int kBlockThreads = sizeof(A) == 8 ? 256 : 512;
constexpr int kWarpMaxClasses = 1024;

// --- Types --------------------------------------------------------------------------------------

// A teacher whose type is known only at run time: the uniform branch costs little beside the load.
struct AnyType {};

template <class A>
__device__ __forceinline__ A widen(double x) {
  return static_cast<A>(x);
}
template <class A>
__device__ __forceinline__ A widen(float x) {
  return static_cast<A>(x);
}
template <class A>
__device__ __forceinline__ A widen(__nv_bfloat16 x) {
  return static_cast<A>(__bfloat162float(x));
}
template <class A>
__device__ __forceinline__ A widen(__half x) {
  return static_cast<A>(__half2float(x));
}
template <class A>
__device__ __forceinline__ void narrow(A x, double* out) {
  *out = static_cast<double>(x);
}
template <class A>
__device__ __forceinline__ void narrow(A x, float* out) {
  *out = static_cast<float>(x);
}
template <class A>
__device__ __forceinline__ void narrow(A x, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(static_cast<float>(x));
}
template <class A>
__device__ __forceinline__ void narrow(A x, __half* out) {
  *out = __float2half_rn(static_cast<float>(x));
}

// A row of logits in global memory: read by element or in 16-byte pieces where its address allows.
template <class T, class A>
struct RowReader {
  const T* row;
  bool aligned;

  __device__ RowReader(const void* base, std::int64_t offset, DType)
      : row(static_cast<const T*>(base) + offset),
        aligned(reinterpret_cast<std::uintptr_t>(row) % 16 == 0) {}

  __device__ A at(int k) const { return widen<A>(row[k]); }

  // Elements k .. k + kCount - 1, those at or past `classes` as -inf.
  template <int kCount>
  __device__ __forceinline__ void load(int k, int classes, A (&out)[kCount]) const {
    static_assert(kCount * sizeof(T) == 16, "a chunk is 16 bytes");
    if (aligned && k + kCount <= classes) {
      union {
        uint4 bits;
        T values[kCount];
      } chunk;
      chunk.bits = *reinterpret_cast<const uint4*>(row + k);
#pragma unroll
      for (int j = 0; j < kCount; ++j) out[j] = widen<A>(chunk.values[j]);
      return;
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      out[j] = k + j < classes ? widen<A>(row[k + j]) : negative_infinity<A>();
    }
  }
};

template <class A>
struct RowReader<AnyType, A> {
  const void* base;
  std::int64_t offset;
  DType type;

  __device__ RowReader(const void* base_, std::int64_t offset_, DType type_)
      : base(base_), offset(offset_), type(type_) {}

  __device__ A at(int k) const {
    switch (type) {
      case DType::kFloat64:
        return widen<A>(static_cast<const double*>(base)[offset + k]);
      case DType::kFloat32:
        return widen<A>(static_cast<const float*>(base)[offset + k]);
      case DType::kBFloat16:
        return widen<A>(static_cast<const __nv_bfloat16*>(base)[offset + k]);
      default:
        return widen<A>(static_cast<const __half*>(base)[offset + k]);
    }
  }

  template <int kCount>
  __device__ __forceinline__ void load(int k, int classes, A (&out)[kCount]) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) out[j] = k + j < classes ? at(k + j) : negative_infinity<A>();
  }
};

// Writes elements k .. k + kCount - 1 of a gradient row, as one 16-byte store where the address
// allows.
template <class T, class A, int kCount>
__device__ __forceinline__ void store_chunk(T* row, bool aligned, int k, int classes,
                                            const A (&values)[kCount]) {
  if (aligned && k + kCount <= classes) {
    union {
      uint4 bits;
      T values[kCount];
    } chunk;
#pragma unroll
    for (int j = 0; j < kCount; ++j) narrow(values[j], &chunk.values[j]);
    *reinterpret_cast<uint4*>(row + k) = chunk.bits;
    return;
  }
#pragma unroll
  for (int j = 0; j < kCount; ++j) {
    if (k + j < classes) narrow(values[j], row + k + j);
  }
}

// --- Reductions
// -----------------------------------------------------------------------------------

struct Add {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
struct Max {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};

// Every lane gets the result, formed in the same order in every lane.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value = op(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

// Reduces kCount values over the block; every thread gets the results. `scratch` holds 32 * kCount
// values.
template <int kCount, class T, class Op>
__device__ __forceinline__ void block_reduce(T (&values)[kCount], T identity, Op op, T* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int warps = static_cast<int>(blockDim.x) / kWarpSize;
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = warp_reduce(values[i], op);
  __syncthreads();  // the previous reduction's readers are done with scratch
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) scratch[warp * kCount + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = warp_reduce(lane < warps ? scratch[lane * kCount + i] : identity, op);
  }
}

// --- What stands beside the logits
// ------------------------------------------------------------------

__device__ __forceinline__ std::int64_t target_of(const KdLossArgs& args, std::int64_t row) {
  return args.target_is_int64 ? static_cast<const std::int64_t*>(args.target)[row]
                              : static_cast<const std::int32_t*>(args.target)[row];
}

template <class A>
__device__ __forceinline__ A selected_of(const KdLossArgs& args, std::int64_t row) {
  switch (args.selected_type) {
    case SelectedType::kPrefix:
      return row < args.teacher_rows ? A(1) : A(0);
    case SelectedType::kBool:
      return static_cast<const std::uint8_t*>(args.selected)[row] != 0 ? A(1) : A(0);
    case SelectedType::kFloat32:
      return static_cast<A>(static_cast<const float*>(args.selected)[row]);
    default:
      return static_cast<A>(static_cast<const double*>(args.selected)[row]);
  }
}

// What a row is before its logits are read.
template <class A>
struct RowHead {
  std::int64_t y;
  RowWeights<A> weights;
  int flags;
  bool poisoned;  // a target or a weight out of range: NaN instead of a host synchronisation

  __device__ bool reads_nothing() const { return weights.ce == A(0) && weights.kd == A(0); }
};

template <class A>
__device__ __forceinline__ RowHead<A> row_head(const KdLossArgs& args, const RowParams<A>& params,
                                               std::int64_t row) {
  RowHead<A> head{target_of(args, row), {A(0), A(0)}, 0, false};
  if (head.y == args.ignore_index) return head;
  const A w = selected_of<A>(args, row);
  head.weights = row_weights(params, w);
  head.flags = kRowValid | (w > A(0) ? kRowSelected : 0);
  head.poisoned = head.y < 0 || head.y >= args.classes || !(w >= A(0) && w <= A(1));
  return head;
}

// Valid targets of the batch, counted by the whole block; the same number in every thread.
__device__ inline std::int64_t count_valid(const KdLossArgs& args, std::int64_t* scratch) {
  std::int64_t valid[1] = {0};
  for (std::int64_t row = threadIdx.x; row < args.rows; row += blockDim.x) {
    valid[0] += target_of(args, row) != args.ignore_index ? 1 : 0;
  }
  block_reduce(valid, std::int64_t{0}, Add(), scratch);
  return valid[0];
}

// 1 / denominator, with the batch's own count unless the caller brought one.
template <class A>
__device__ __forceinline__ A loss_scale(const KdLossArgs& args, std::int64_t* scratch) {
  const bool mean = args.reduction == Reduction::kMean || args.reduction == Reduction::kElementMean;
  A valid = A(0);
  if (mean) {
    valid = args.num_valid != nullptr ? *static_cast<const A*>(args.num_valid)
                                      : static_cast<A>(count_valid(args, scratch));
  }
  return reduction_scale(args.reduction, valid, static_cast<A>(args.classes));
}

// What every row's gradient is multiplied with, its own grad_output aside.
template <class A>
__device__ __forceinline__ A gradient_scale(const KdLossArgs& args, std::int64_t* scratch) {
  if (args.gradient == nullptr) return A(1);
  const A scale = loss_scale<A>(args, scratch);
  return args.grad_scale != nullptr ? scale * *static_cast<const A*>(args.grad_scale) : scale;
}

template <class A>
__device__ __forceinline__ A row_gradient_scale(const KdLossArgs& args, std::int64_t row, A scale) {
  if (args.gradient == nullptr || args.grad_output == nullptr) return scale;
  return scale * static_cast<const A*>(args.grad_output)[row * args.grad_output_stride];
}

template <class A>
__device__ __forceinline__ void put_row(const KdLossArgs& args, std::int64_t row, A ce, A kd,
                                        int flags) {
  if (args.counts == nullptr) return;
  static_cast<A*>(args.ce)[row] = ce;
  static_cast<A*>(args.kd)[row] = kd;
  args.flags[row] = static_cast<std::uint8_t>(flags);
  if (args.reduction == Reduction::kNone) static_cast<A*>(args.loss)[row] = ce + kd;
}

template <class A>
__device__ __forceinline__ A nan_of() {
  return static_cast<A>(NAN);
}

// dL/dz_k from the row's result; e* are relative to the anchors.
template <class A>
__device__ __forceinline__ A gradient_of(const RowResult<A>& result, const RowWeights<A>& weights,
                                         const RowParams<A>& params, A dz, A dv) {
  A g = -result.smoothing;
  if (weights.ce != A(0)) g += result.coefficient_z * row_exp(dz);
  if (weights.kd != A(0)) {
    g += result.coefficient_zt * row_exp(dz * params.inv_temperature) -
         result.coefficient_vt * row_exp(dv * params.inv_temperature);
  }
  return g;
}

// --- A warp per row
// ---------------------------------------------------------------------------------

// kItems elements per lane live in registers: as many 16-byte chunks, chunk c of lane l starting at
// element (c * 32 + l) * kChunk.
template <class Z, class V, class A, int kItems>
__global__ void __launch_bounds__(kWarpThreads) kd_loss_warp(KdLossArgs args) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(Z));
  constexpr int kChunks = kItems / kChunk;
  std::int64_t* const scratch = reinterpret_cast<std::int64_t*>(dynamic_shared());
  const A batch_scale = gradient_scale<A>(args, scratch);
  const RowParams<A> params = row_params<A>(args);
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int classes = static_cast<int>(args.classes);
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * (kWarpThreads / kWarpSize);
  std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * (kWarpThreads / kWarpSize) +
                     static_cast<int>(threadIdx.x) / kWarpSize;

  for (; row < args.rows; row += stride) {
    const RowHead<A> head = row_head(args, params, row);
    Z* const gradient =
        args.gradient == nullptr ? nullptr : static_cast<Z*>(args.gradient) + row * args.classes;
    const bool gradient_aligned = reinterpret_cast<std::uintptr_t>(gradient) % 16 == 0;
    if (head.poisoned || head.reads_nothing()) {
      const A fill = head.poisoned ? nan_of<A>() : A(0);
      if (gradient != nullptr) {
        for (int k = lane; k < classes; k += kWarpSize) narrow(fill, gradient + k);
      }
      if (lane == 0) put_row(args, row, fill, fill, head.flags);
      continue;
    }
    const bool has_ce = head.weights.ce != A(0), has_kd = head.weights.kd != A(0);
    const int y = static_cast<int>(head.y);
    const RowReader<Z, A> z(args.student, row * args.student_stride, args.student_type);

    A dz[kItems], dv[kItems];
    RowStats<A> stats = empty_row_stats<A>();
    A z_y = A(0), v_y = A(0);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      A chunk[kChunk];
      z.load((c * kWarpSize + lane) * kChunk, classes, chunk);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        dz[c * kChunk + j] = chunk[j];
        stats.max_z = chunk[j] > stats.max_z ? chunk[j] : stats.max_z;
      }
    }
    stats.max_z = warp_reduce(stats.max_z, Max());
    z_y = z.at(y);
    if (has_kd) {
      const RowReader<V, A> v(args.teacher, row * args.teacher_stride, args.teacher_type);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        A chunk[kChunk];
        v.load((c * kWarpSize + lane) * kChunk, classes, chunk);
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          dv[c * kChunk + j] = chunk[j];
          stats.max_v = chunk[j] > stats.max_v ? chunk[j] : stats.max_v;
        }
      }
      stats.max_v = warp_reduce(stats.max_v, Max());
      v_y = v.at(y);
    }

    const A shift_z = anchor(stats.max_z), shift_v = anchor(stats.max_v);
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const int i = c * kChunk + j;
        dz[i] -= shift_z;
        if (has_ce) {
          stats.sum_z += row_exp(dz[i]);
          // Past the row's end dz is -inf: nothing to the exponentials, but it has no place in this
          // sum.
          if ((c * kWarpSize + lane) * kChunk + j < classes) stats.sum_shift += dz[i];
        }
        if (has_kd) {
          dv[i] -= shift_v;
          const A ev = row_exp(dv[i] * params.inv_temperature);
          stats.sum_zt += row_exp(dz[i] * params.inv_temperature);
          stats.sum_vt += ev;
          if (ev > A(0)) stats.dot += ev * (dv[i] - dz[i]);
        } else {
          dv[i] = A(0);
        }
      }
    }
    if (has_ce) {
      stats.sum_z = warp_reduce(stats.sum_z, Add());
      if (params.label_smoothing != A(0)) stats.sum_shift = warp_reduce(stats.sum_shift, Add());
    }
    if (has_kd) {
      stats.sum_zt = warp_reduce(stats.sum_zt, Add());
      stats.sum_vt = warp_reduce(stats.sum_vt, Add());
      stats.dot = warp_reduce(stats.dot, Add());
    }
    const RowResult<A> result =
        finish_row(stats, z_y, v_y, params, head.weights, static_cast<A>(classes),
                   row_gradient_scale(args, row, batch_scale));
    if (lane == 0) {
      put_row(args, row, result.ce, result.kd, head.flags | (result.revised ? kRowRevised : 0));
    }
    if (gradient == nullptr) continue;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int k = (c * kWarpSize + lane) * kChunk;
      A chunk[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        const int i = c * kChunk + j;
        chunk[j] = gradient_of(result, head.weights, params, dz[i], dv[i]) +
                   (k + j == y ? result.at_target : A(0));
      }
      store_chunk(gradient, gradient_aligned, k, classes, chunk);
    }
  }
}

// --- A block per row
// --------------------------------------------------------------------------------

// Bytes of shared memory in front of the rows: what the reductions exchange.
constexpr int kReduceValues = 5;
constexpr std::size_t kScratchBytes = 32 * kReduceValues * sizeof(double);

template <class T, class A>
struct SharedType {
  using Type = T;
};
template <class A>
struct SharedType<AnyType, A> {
  using Type = A;
};

// Adds one element to a thread's running statistics, moving them to a new maximum where the element
// is one.
template <class A>
__device__ __forceinline__ void accumulate(RowStats<A>& stats, A z, A v, A& count, bool has_ce,
                                           bool has_kd, const RowParams<A>& params) {
  if (z > stats.max_z || (has_kd && v > stats.max_v)) {
    rebase_row_stats(stats, z > stats.max_z ? z : stats.max_z,
                     has_kd && v > stats.max_v ? v : stats.max_v, count, params.inv_temperature);
  }
  count += A(1);
  const A dz = z - anchor(stats.max_z);
  if (has_ce) {
    stats.sum_z += row_exp(dz);
    stats.sum_shift += dz;
  }
  if (has_kd) {
    const A dv = v - anchor(stats.max_v);
    const A ev = row_exp(dv * params.inv_temperature);
    stats.sum_zt += row_exp(dz * params.inv_temperature);
    stats.sum_vt += ev;
    if (ev > A(0)) stats.dot += ev * (dv - dz);
  }
}

template <class Z, class V, class A, bool kResident>
__global__ void __launch_bounds__(kBlockThreads<A>) kd_loss_block(KdLossArgs args) {
  using SharedV = typename SharedType<V, A>::Type;
  constexpr int kChunk = 16 / static_cast<int>(sizeof(Z));
  A* const scratch = reinterpret_cast<A*>(dynamic_shared());
  const A batch_scale = gradient_scale<A>(args, reinterpret_cast<std::int64_t*>(dynamic_shared()));
  const RowParams<A> params = row_params<A>(args);
  const int classes = static_cast<int>(args.classes);
  const int threads = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  // Only the resident kernel touches these; each starts on 16 bytes.
  Z* const shared_z = reinterpret_cast<Z*>(dynamic_shared() + kScratchBytes);
  SharedV* const shared_v = reinterpret_cast<SharedV*>(dynamic_shared() + kScratchBytes +
                                                       (args.classes * sizeof(Z) + 15) / 16 * 16);

  for (std::int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const RowHead<A> head = row_head(args, params, row);
    Z* const gradient =
        args.gradient == nullptr ? nullptr : static_cast<Z*>(args.gradient) + row * args.classes;
    const bool gradient_aligned = reinterpret_cast<std::uintptr_t>(gradient) % 16 == 0;
    if (head.poisoned || head.reads_nothing()) {
      const A fill = head.poisoned ? nan_of<A>() : A(0);
      if (gradient != nullptr) {
        for (int k = thread; k < classes; k += threads) narrow(fill, gradient + k);
      }
      if (thread == 0) put_row(args, row, fill, fill, head.flags);
      continue;
    }
    const bool has_ce = head.weights.ce != A(0), has_kd = head.weights.kd != A(0);
    const int y = static_cast<int>(head.y);
    const RowReader<Z, A> z(args.student, row * args.student_stride, args.student_type);
    // A row without teacher may lie past the teacher's end.
    const RowReader<V, A> v(args.teacher, has_kd ? row * args.teacher_stride : 0,
                            args.teacher_type);

    RowStats<A> stats = empty_row_stats<A>();
    A count = A(0);
    for (int k = thread * kChunk; k < classes; k += threads * kChunk) {
      A chunk_z[kChunk], chunk_v[kChunk];
      z.load(k, classes, chunk_z);
      if (has_kd) v.load(k, classes, chunk_v);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (k + j >= classes) break;
        if constexpr (kResident) {
          narrow(chunk_z[j], shared_z + k + j);
          if (has_kd) narrow(chunk_v[j], shared_v + k + j);
        }
        accumulate(stats, chunk_z[j], has_kd ? chunk_v[j] : A(0), count, has_ce, has_kd, params);
      }
    }
    A maxima[2] = {stats.max_z, stats.max_v};
    block_reduce(maxima, negative_infinity<A>(), Max(), scratch);
    rebase_row_stats(stats, maxima[0], maxima[1], count, params.inv_temperature);
    A sums[kReduceValues] = {stats.sum_z, stats.sum_zt, stats.sum_shift, stats.sum_vt, stats.dot};
    block_reduce(sums, A(0), Add(), scratch);
    stats = RowStats<A>{maxima[0], sums[0], sums[1], sums[2], maxima[1], sums[3], sums[4]};

    const RowResult<A> result =
        finish_row(stats, z.at(y), has_kd ? v.at(y) : A(0), params, head.weights,
                   static_cast<A>(classes), row_gradient_scale(args, row, batch_scale));
    if (thread == 0) {
      put_row(args, row, result.ce, result.kd, head.flags | (result.revised ? kRowRevised : 0));
    }
    if (gradient == nullptr) continue;
    const A shift_z = anchor(stats.max_z), shift_v = anchor(stats.max_v);
    // A thread reads back from shared memory only what it wrote itself: no barrier is needed.
    for (int k = thread * kChunk; k < classes; k += threads * kChunk) {
      A chunk_z[kChunk], chunk_v[kChunk];
      if constexpr (kResident) {
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
          if (k + j >= classes) break;
          chunk_z[j] = widen<A>(shared_z[k + j]);
          chunk_v[j] = has_kd ? widen<A>(shared_v[k + j]) : A(0);
        }
      } else {
        z.load(k, classes, chunk_z);
        if (has_kd) v.load(k, classes, chunk_v);
      }
      A out[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        out[j] = A(0);
        if (k + j >= classes) break;
        out[j] = gradient_of(result, head.weights, params, chunk_z[j] - shift_z,
                             has_kd ? chunk_v[j] - shift_v : A(0)) +
                 (k + j == y ? result.at_target : A(0));
      }
      store_chunk(gradient, gradient_aligned, k, classes, out);
    }
  }
}

// --- Launch
// -----------------------------------------------------------------------------------------

struct DeviceLimits {
  int multiprocessors;
  int shared_per_block;           // with the opt-in
  int shared_per_multiprocessor;  //
};

// Asked once per device.
cudaError_t device_limits(DeviceLimits* limits);

inline unsigned grid_of(std::int64_t wanted, int multiprocessors, int per_multiprocessor) {
  const std::int64_t most = static_cast<std::int64_t>(multiprocessors) * per_multiprocessor;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

template <class Z, class V, class A, int kItems>
cudaError_t launch_warp(const KdLossArgs& args, const DeviceLimits& limits, cudaStream_t stream) {
  constexpr int kRows = kWarpThreads / kWarpSize;
  const unsigned grid = grid_of((args.rows + kRows - 1) / kRows, limits.multiprocessors, 8);
  return launch(kd_loss_warp<Z, V, A, kItems>, grid, kWarpThreads, kScratchBytes, stream, args);
}

template <class A>
unsigned block_threads(std::int64_t classes) {
  if (classes <= 4096) return 128;
  return classes <= 16384 ? 256 : kBlockThreads<A>;
}

template <class Z, class V, class A>
cudaError_t launch_streaming(const KdLossArgs& args, const DeviceLimits& limits,
                             cudaStream_t stream) {
  const unsigned threads = block_threads<A>(args.classes);
  const unsigned grid =
      grid_of(args.rows, limits.multiprocessors, static_cast<int>(2048 / threads));
  return launch(kd_loss_block<Z, V, A, false>, grid, threads, kScratchBytes, stream, args);
}

template <class Z, class V, class A>
std::size_t resident_bytes(std::int64_t classes) {
  using SharedV = typename SharedType<V, A>::Type;
  return kScratchBytes + (classes * sizeof(Z) + 15) / 16 * 16 + classes * sizeof(SharedV);
}

template <class Z, class V, class A>
cudaError_t launch_resident(const KdLossArgs& args, const DeviceLimits& limits,
                            cudaStream_t stream) {
  const std::size_t bytes = resident_bytes<Z, V, A>(args.classes);
  const auto kernel = kd_loss_block<Z, V, A, true>;
  // Cheap, not a synchronisation, and legal while a graph is being captured.
  const cudaError_t raised = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block);
  if (raised != cudaSuccess) return raised;
  const unsigned threads = block_threads<A>(args.classes);
  const int by_threads = static_cast<int>(2048 / threads);
  const int by_shared = static_cast<int>(limits.shared_per_multiprocessor / (bytes + 1024));
  const int per_multiprocessor = by_shared < 1            ? 1
                                 : by_shared < by_threads ? by_shared
                                                          : by_threads;
  const unsigned grid = grid_of(args.rows, limits.multiprocessors, per_multiprocessor);
  return launch(kernel, grid, threads, bytes, stream, args);
}

// The dispatch of float accumulation, for a student of type Z:
//   C <= 256 and C <= 1024   warp, 8 and 32 elements a lane
//   while two rows fit       resident
//   else                     streaming
template <class Z, class V>
cudaError_t launch_rows(const KdLossArgs& args, const DeviceLimits& limits, cudaStream_t stream) {
  if (args.classes <= 8 * kWarpSize) return launch_warp<Z, V, float, 8>(args, limits, stream);
  if (args.classes <= kWarpMaxClasses) return launch_warp<Z, V, float, 32>(args, limits, stream);
  if (resident_bytes<Z, V, float>(args.classes) <=
      static_cast<std::size_t>(limits.shared_per_block)) {
    return launch_resident<Z, V, float>(args, limits, stream);
  }
  return launch_streaming<Z, V, float>(args, limits, stream);
}

template <class Z>
cudaError_t launch_rows_of(const KdLossArgs& args, const DeviceLimits& limits,
                           cudaStream_t stream) {
  return args.teacher_type == args.student_type ? launch_rows<Z, Z>(args, limits, stream)
                                                : launch_rows<Z, AnyType>(args, limits, stream);
}

// One translation unit each: they compile side by side.
cudaError_t kd_loss_rows_float32(const KdLossArgs& args, const DeviceLimits& limits,
                                 cudaStream_t stream);
cudaError_t kd_loss_rows_bfloat16(const KdLossArgs& args, const DeviceLimits& limits,
                                  cudaStream_t stream);
cudaError_t kd_loss_rows_float16(const KdLossArgs& args, const DeviceLimits& limits,
                                 cudaStream_t stream);
// Double accumulation, whatever the student's type: streaming only, for gradient checks and
// references.
cudaError_t kd_loss_rows_double(const KdLossArgs& args, const DeviceLimits& limits,
                                cudaStream_t stream);

}  // namespace lrds::cuda
