#include "cuda/device.cuh"
#include "cuda/kd_loss.h"
#include "cuda/launch.h"

namespace lrds::cuda {
namespace {

constexpr int kScaleThreads = 256;
constexpr int kScaleBlocksPerMultiprocessor = 8;

// A: the type of the product. aligned: gradient and out have their 16-byte boundaries at the same
// element.
template <class S, class A>
__global__ void __launch_bounds__(kScaleThreads)
    scale(const S* gradient, S* out, const std::int64_t count, const void* grad_output,
          const void* grad_scale, const bool factor_is_double, const bool aligned) {
  constexpr int kWidth = 16 / sizeof(S);
  using Vec = Vector<S, kWidth>;
  A factor;
  if (factor_is_double) {
    double f = *static_cast<const double*>(grad_output);
    if (grad_scale != nullptr) f /= *static_cast<const double*>(grad_scale);
    factor = static_cast<A>(f);
  } else {
    float f = *static_cast<const float*>(grad_output);
    if (grad_scale != nullptr) f /= *static_cast<const float*>(grad_scale);
    factor = static_cast<A>(f);
  }
  if (factor == A(1) && gradient == out) return;

  const std::int64_t thread = std::int64_t{blockIdx.x} * kScaleThreads + threadIdx.x;
  const std::int64_t threads = std::int64_t{gridDim.x} * kScaleThreads;
  const auto one = [&](std::int64_t i) { out[i] = narrow<S>(widen<A>(gradient[i]) * factor); };
  if (!aligned) {
    for (std::int64_t i = thread; i < count; i += threads) one(i);
    return;
  }
  const unsigned past = static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(gradient) % 16);
  std::int64_t head = (16 - past) % 16 / sizeof(S);
  head = head < count ? head : count;
  const std::int64_t vectors = (count - head) / kWidth;
  const std::int64_t edges = count - vectors * kWidth;
  for (std::int64_t n = thread; n < vectors; n += threads) {
    const Vec raw = *reinterpret_cast<const Vec*>(gradient + head + n * kWidth);
    A x[kWidth];
#pragma unroll
    for (int j = 0; j < kWidth; ++j) x[j] = widen<A>(raw.element[j]) * factor;
    store_vector(out + head + n * kWidth, narrow_vector<S>(x));
  }
  if (thread < edges) one(thread < head ? thread : vectors * kWidth + thread);
}

template <class S, class A>
cudaError_t launch_scale(const void* gradient, void* out, std::int64_t count,
                         const void* grad_output, const void* grad_scale, bool factor_is_double,
                         int multiprocessors, cudaStream_t stream) {
  const bool aligned =
      reinterpret_cast<std::uintptr_t>(gradient) % 16 == reinterpret_cast<std::uintptr_t>(out) % 16;
  const std::int64_t per_block = std::int64_t{kScaleThreads} * (16 / sizeof(S));
  const std::int64_t blocks = (count + per_block - 1) / per_block;
  const std::int64_t most = std::int64_t{multiprocessors} * kScaleBlocksPerMultiprocessor;
  return launch(scale<S, A>, static_cast<unsigned>(blocks < most ? blocks : most), kScaleThreads, 0,
                stream, static_cast<const S*>(gradient), static_cast<S*>(out), count, grad_output,
                grad_scale, factor_is_double, aligned);
}

}  // namespace

cudaError_t scale_gradient(const void* gradient, void* out, std::int64_t count, DType type,
                           const void* grad_output, const void* grad_scale, bool factor_is_double,
                           cudaStream_t stream) {
  if (count <= 0) return count == 0 ? cudaSuccess : cudaErrorInvalidValue;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  DeviceFacts facts;
  error = device_facts(device, &facts);
  if (error != cudaSuccess) return error;
  const auto run = [&](auto launcher) {
    return launcher(gradient, out, count, grad_output, grad_scale, factor_is_double,
                    facts.multiprocessors, stream);
  };
  switch (type) {
    case DType::kFloat64:
      return run(launch_scale<double, double>);
    case DType::kFloat32:
      return run(launch_scale<float, float>);
    case DType::kBFloat16:
      return run(launch_scale<__nv_bfloat16, float>);
    default:
      return run(launch_scale<__half, float>);
  }
}

}  // namespace lrds::cuda
