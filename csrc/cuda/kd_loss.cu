// kd_loss on CUDA: which rows kernel, then the sum over rows.
#include <atomic>

#include "cuda/kd_loss.h"
#include "cuda/kd_loss_rows.cuh"

namespace lrds::cuda {
namespace {

constexpr int kFinalizeThreads = 1024;
constexpr int kMaxDevices = 64;

// One block adds all rows in a fixed order, in double: the same bits on every run.
template <class A>
__global__ void __launch_bounds__(kFinalizeThreads) kd_loss_finalize(KdLossArgs args) {
  double sums[2] = {0.0, 0.0};
  std::int64_t counts[3] = {0, 0, 0};
  for (std::int64_t row = threadIdx.x; row < args.rows; row += blockDim.x) {
    sums[0] += static_cast<double>(static_cast<const A*>(args.ce)[row]);
    sums[1] += static_cast<double>(static_cast<const A*>(args.kd)[row]);
    const int flags = args.flags[row];
    counts[0] += (flags & kRowValid) != 0 ? 1 : 0;
    counts[1] += (flags & kRowSelected) != 0 ? 1 : 0;
    counts[2] += (flags & kRowRevised) != 0 ? 1 : 0;
  }
  block_reduce(sums, 0.0, Add(), reinterpret_cast<double*>(dynamic_shared()));
  block_reduce(counts, std::int64_t{0}, Add(), reinterpret_cast<std::int64_t*>(dynamic_shared()));
  if (threadIdx.x != 0) return;
  for (int i = 0; i < 3; ++i) args.counts[i] = counts[i];
  if (args.reduction == Reduction::kNone) return;
  const double valid = args.num_valid != nullptr
                           ? static_cast<double>(*static_cast<const A*>(args.num_valid))
                           : static_cast<double>(counts[0]);
  const double scale = reduction_scale(args.reduction, valid, static_cast<double>(args.classes));
  *static_cast<A*>(args.loss_ce) = static_cast<A>(sums[0] * scale);
  *static_cast<A*>(args.loss_kd) = static_cast<A>(sums[1] * scale);
  *static_cast<A*>(args.loss) = static_cast<A>(sums[0] * scale + sums[1] * scale);
}

template <class T, class A>
__global__ void scale_gradient_kernel(const T* gradient, T* out, std::int64_t count,
                                      const A* grad_output, const A* grad_scale) {
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  const A factor = grad_scale != nullptr ? *grad_output / *grad_scale : *grad_output;
  if (factor == A(1) && gradient == out) return;
  const bool aligned = reinterpret_cast<std::uintptr_t>(gradient) % 16 == 0 &&
                       reinterpret_cast<std::uintptr_t>(out) % 16 == 0;
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const std::int64_t stride = static_cast<std::int64_t>(gridDim.x) * blockDim.x * kChunk;
  for (std::int64_t i = thread * kChunk; i < count; i += stride) {
    if (aligned && i + kChunk <= count) {
      union {
        uint4 bits;
        T values[kChunk];
      } chunk;
      chunk.bits = *reinterpret_cast<const uint4*>(gradient + i);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        narrow(widen<A>(chunk.values[j]) * factor, &chunk.values[j]);
      }
      *reinterpret_cast<uint4*>(out + i) = chunk.bits;
    } else {
      for (int j = 0; j < kChunk && i + j < count; ++j) {
        narrow(widen<A>(gradient[i + j]) * factor, out + i + j);
      }
    }
  }
}

template <class T, class A>
cudaError_t scale_typed(const void* gradient, void* out, std::int64_t count,
                        const void* grad_output, const void* grad_scale, cudaStream_t stream) {
  constexpr int kThreads = 256;
  constexpr int kChunk = 16 / static_cast<int>(sizeof(T));
  DeviceLimits limits;
  const cudaError_t asked = device_limits(&limits);
  if (asked != cudaSuccess) return asked;
  const std::int64_t blocks = (count + kThreads * kChunk - 1) / (kThreads * kChunk);
  return launch(scale_gradient_kernel<T, A>, grid_of(blocks, limits.multiprocessors, 8), kThreads,
                std::size_t{0}, stream, static_cast<const T*>(gradient), static_cast<T*>(out),
                count, static_cast<const A*>(grad_output), static_cast<const A*>(grad_scale));
}

template <class T>
cudaError_t scale(const void* gradient, void* out, std::int64_t count, const void* grad_output,
                  const void* grad_scale, bool factor_is_double, cudaStream_t stream) {
  return factor_is_double
             ? scale_typed<T, double>(gradient, out, count, grad_output, grad_scale, stream)
             : scale_typed<T, float>(gradient, out, count, grad_output, grad_scale, stream);
}

}  // namespace

cudaError_t device_limits(DeviceLimits* limits) {
  static DeviceLimits known[kMaxDevices];
  static std::atomic<bool> asked[kMaxDevices];
  int device = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (!asked[device].load(std::memory_order_acquire)) {
    // Two threads that ask at once write the same numbers.
    const struct {
      cudaDeviceAttr attribute;
      int* value;
    } questions[] = {
        {cudaDevAttrMultiProcessorCount, &known[device].multiprocessors},
        {cudaDevAttrMaxSharedMemoryPerBlockOptin, &known[device].shared_per_block},
        {cudaDevAttrMaxSharedMemoryPerMultiprocessor, &known[device].shared_per_multiprocessor},
    };
    for (const auto& question : questions) {
      status = cudaDeviceGetAttribute(question.value, question.attribute, device);
      if (status != cudaSuccess) return status;
    }
    asked[device].store(true, std::memory_order_release);
  }
  *limits = known[device];
  return cudaSuccess;
}

cudaError_t kd_loss(const KdLossArgs& args, cudaStream_t stream) {
  DeviceLimits limits;
  cudaError_t status = device_limits(&limits);
  if (status != cudaSuccess) return status;
  if (args.rows > 0) {
    const auto rows = args.accumulate == DType::kFloat64      ? kd_loss_rows_double
                      : args.student_type == DType::kFloat32  ? kd_loss_rows_float32
                      : args.student_type == DType::kBFloat16 ? kd_loss_rows_bfloat16
                                                              : kd_loss_rows_float16;
    status = rows(args, limits, stream);
    if (status != cudaSuccess) return status;
  }
  if (args.counts == nullptr) return cudaSuccess;
  const auto finalize =
      args.accumulate == DType::kFloat64 ? kd_loss_finalize<double> : kd_loss_finalize<float>;
  return launch(finalize, 1u, static_cast<unsigned>(kFinalizeThreads), kScratchBytes, stream, args);
}

cudaError_t scale_gradient(const void* gradient, void* out, std::int64_t count, DType type,
                           const void* grad_output, const void* grad_scale, bool factor_is_double,
                           cudaStream_t stream) {
  if (count == 0) return cudaSuccess;
  switch (type) {
    case DType::kFloat64:
      return scale<double>(gradient, out, count, grad_output, grad_scale, factor_is_double, stream);
    case DType::kFloat32:
      return scale<float>(gradient, out, count, grad_output, grad_scale, factor_is_double, stream);
    case DType::kBFloat16:
      return scale<__nv_bfloat16>(gradient, out, count, grad_output, grad_scale, factor_is_double,
                                  stream);
    default:
      return scale<__half>(gradient, out, count, grad_output, grad_scale, factor_is_double, stream);
  }
}

}  // namespace lrds::cuda
