// The operators scale_gradient and scale_gradient_: gradient * (grad_output / grad_scale), which is
// all that the backward pass of kd_loss does where the forward pass computed the gradient.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <cstdint>

#include "cpu/scale_gradient.h"
#include "torch/problem.h"

#if defined(LRDS_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kd_loss.h"
#endif

namespace lrds {
namespace {

// grad_output in the type that the product is computed in.
Tensor factor_of(const Tensor& gradient, const Tensor& grad_output) {
  const at::ScalarType accumulate =
      gradient.scalar_type() == at::kDouble || grad_output.scalar_type() == at::kDouble
          ? at::kDouble
          : at::kFloat;
  return grad_output.to(accumulate).contiguous();
}

void check_scale_gradient(const Tensor& gradient, const Tensor& grad_output) {
  TORCH_CHECK_VALUE(grad_output.numel() == 1, "grad_output must be a scalar; got shape ",
                    grad_output.sizes());
  TORCH_CHECK_VALUE(gradient.is_contiguous(), "gradient must be contiguous");
}

void scale_into_cpu(const Tensor& gradient, const Tensor& out, const Tensor& grad_output,
                    const OptionalTensor& grad_scale) {
  check_scale_gradient(gradient, grad_output);
  const Tensor factor_tensor = factor_of(gradient, grad_output);
  const Tensor divisor = scalar_on(grad_scale, "grad_scale", gradient, factor_tensor.scalar_type());
  double factor = host_scalar(factor_tensor);
  if (divisor.defined()) factor /= host_scalar(divisor);
  const void* const in = gradient.const_data_ptr();
  void* const to = out.mutable_data_ptr();
  if (factor == 1.0 && in == to) return;
  const DType type = dtype_of(gradient, "gradient");
  at::parallel_for(0, gradient.numel(), 32768, [&](std::int64_t begin, std::int64_t end) {
    cpu::scale_gradient(type, in, to, begin, end, factor);
  });
}

#if defined(LRDS_WITH_CUDA)
void scale_into_cuda(const Tensor& gradient, const Tensor& out, const Tensor& grad_output,
                     const OptionalTensor& grad_scale) {
  check_scale_gradient(gradient, grad_output);
  const c10::cuda::CUDAGuard guard(gradient.device());
  const Tensor factor = factor_of(gradient, grad_output);
  const Tensor divisor = scalar_on(grad_scale, "grad_scale", gradient, factor.scalar_type());
  C10_CUDA_CHECK(cuda::scale_gradient(
      gradient.const_data_ptr(), out.mutable_data_ptr(), gradient.numel(),
      dtype_of(gradient, "gradient"), factor.const_data_ptr(),
      divisor.defined() ? divisor.const_data_ptr() : nullptr, factor.scalar_type() == at::kDouble,
      c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

using ScaleInto = void (*)(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&);

template <ScaleInto scale_into>
Tensor scale_gradient(const Tensor& gradient, const Tensor& grad_output,
                      const OptionalTensor& grad_scale) {
  const Tensor out = at::empty(gradient.sizes(), gradient.options());
  scale_into(gradient, out, grad_output, grad_scale);
  return out;
}

template <ScaleInto scale_into>
void scale_gradient_(Tensor& gradient, const Tensor& grad_output,
                     const OptionalTensor& grad_scale) {
  scale_into(gradient, gradient, grad_output, grad_scale);
}

template <ScaleInto scale_into>
void implement(torch::Library& m) {
  m.impl("scale_gradient", &scale_gradient<scale_into>);
  m.impl("scale_gradient_", &scale_gradient_<scale_into>);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lrds_fast, m) {
  m.def("scale_gradient(Tensor gradient, Tensor grad_output, Tensor? grad_scale) -> Tensor");
  m.def("scale_gradient_(Tensor(a!) gradient, Tensor grad_output, Tensor? grad_scale) -> ()");
}

TORCH_LIBRARY_IMPL(lrds_fast, Autograd, m) {
  m.impl("scale_gradient", torch::autograd::autogradNotImplementedFallback());
  m.impl("scale_gradient_", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(lrds_fast, CPU, m) { implement<scale_into_cpu>(m); }
#if defined(LRDS_WITH_CUDA)
TORCH_LIBRARY_IMPL(lrds_fast, CUDA, m) { implement<scale_into_cuda>(m); }
#endif

}  // namespace lrds
