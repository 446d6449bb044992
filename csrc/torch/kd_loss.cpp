// The operators kd_loss_forward, kd_loss_forward_, kd_loss_backward and kd_logit_gradient, which
// run the row kernels. kd_loss_autograd.cpp has kd_loss, which calls them.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <string>
#include <tuple>

#include "core/kd_loss.h"
#include "torch/problem.h"

#if defined(LRDS_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kd_loss.h"
#endif

namespace lrds {
namespace {

// at::empty without the operator call, which on the CPU costs more than the allocation.
Tensor empty(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (options.device().is_cpu()) return Tensor(at::detail::empty_cpu(sizes, options));
  return at::empty(sizes, options);
}

// The first write to new memory costs one page fault per 4 KiB, for a large gradient several times
// the time of the sweep; with huge pages it is one per 2 MiB. The memory is usable whether or not
// the operating system follows the advice.
void advise_huge_pages(const Tensor& tensor) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{1} << 21;
  char* const data = static_cast<char*>(tensor.mutable_data_ptr());
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(data);
  const std::uintptr_t end = begin + tensor.nbytes();
  const std::uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const std::uintptr_t last = end & ~(kHugePage - 1);
  if (first < last) madvise(data + (first - begin), last - first, MADV_HUGEPAGE);
#endif
}

void set_gradient(Call& call, const Tensor& student) {
  call.gradient = empty(student.sizes(), student.options());
  if (student.device().is_cpu()) advise_huge_pages(call.gradient);
  call.args.gradient = call.gradient.mutable_data_ptr();
}

void set_grad_output(Call& call, const Tensor& grad_output) {
  TORCH_CHECK_VALUE(grad_output.numel() == 1 || grad_output.numel() == call.args.rows,
                    "grad_output must be a scalar or one number per row; got shape ",
                    grad_output.sizes());
  call.grad_output = grad_output.to(call.accumulate).contiguous();
  call.args.grad_output = call.grad_output.const_data_ptr();
  call.args.grad_output_stride = call.args.reduction == Reduction::kNone ? 1 : 0;
}

#if defined(LRDS_WITH_CUDA)
void run_cuda(const Call& call) {
  const c10::cuda::CUDAGuard guard(call.student.device());
  KdLossArgs args = call.args;
  Tensor workspace;
  if (const std::size_t doubles = cuda::kd_loss_workspace_doubles(args); doubles > 0) {
    workspace =
        at::empty({static_cast<std::int64_t>(doubles)}, call.student.options().dtype(at::kDouble));
    args.workspace = workspace.mutable_data_ptr<double>();
  }
  C10_CUDA_CHECK(cuda::kd_loss(args, c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Allocates the outputs of a call, whose gradient is already set, and runs it.
Loss run_for_loss(Call& call, const Problem& problem, Run run) {
  KdLossArgs& args = call.args;
  const at::TensorOptions accumulate = problem.student.options().dtype(call.accumulate);
  const auto rows = problem.student.sizes().slice(0, problem.student.dim() - 1);
  const bool per_row = args.reduction == Reduction::kNone;
  const auto output = [&] { return per_row ? empty(rows, accumulate) : empty({}, accumulate); };
  const Tensor loss = output(), ce = output(), kd = output();
  const Tensor counts = empty({3}, accumulate.dtype(at::kLong));
  // One allocation for the row flags and, if the terms of each row are not outputs, those terms.
  const auto term_bytes =
      per_row ? 0 : args.rows * static_cast<std::int64_t>(elementSize(call.accumulate));
  const Tensor terms = empty({2 * term_bytes + args.rows}, accumulate.dtype(at::kByte));
  std::uint8_t* const bytes = terms.mutable_data_ptr<std::uint8_t>();
  args.ce = per_row ? ce.mutable_data_ptr() : bytes;
  args.kd = per_row ? kd.mutable_data_ptr() : bytes + term_bytes;
  args.flags = bytes + 2 * term_bytes;
  args.loss = loss.mutable_data_ptr();
  args.loss_ce = ce.mutable_data_ptr();
  args.loss_kd = kd.mutable_data_ptr();
  args.counts = counts.mutable_data_ptr<std::int64_t>();
  run(call);
  return {loss, ce, kd, counts};
}

template <Run run>
struct Kernels {
  template <class... P>
  struct Of {
    static Forward forward(P... parameters, bool with_gradient) {
      const Problem problem = make_problem(parameters...);
      Call call = make_call(problem);
      Tensor gradient = with_gradient ? Tensor() : empty({0}, problem.student.options());
      if (with_gradient) {
        set_gradient(call, problem.student);
        gradient = call.gradient;
      }
      auto [loss, ce, kd, counts] = run_for_loss(call, problem, run);
      return {loss, ce, kd, counts, gradient};
    }

    // Overwrites the student's logits with their gradient.
    static Loss forward_in_place(P... parameters) {
      const Problem problem = make_problem(parameters...);
      TORCH_CHECK_VALUE(problem.student.is_contiguous(), "student must be contiguous");
      Call call = make_call(problem);
      call.args.gradient = call.student.mutable_data_ptr();
      return run_for_loss(call, problem, run);
    }

    // Computes the gradient in the backward pass, from the logits: grad_output multiplies it before
    // it is rounded to the student's type.
    static Tensor backward(const Tensor& grad_output, P... parameters) {
      const Problem problem = make_problem(parameters...);
      Call call = make_call(problem);
      set_gradient(call, problem.student);
      set_grad_output(call, grad_output);
      run(call);
      return call.gradient;
    }

    // The gradient in the accumulation type: influence scores need more than 16 bits of it.
    static Tensor logit_gradient(P... parameters) {
      Problem problem = make_problem(parameters...);
      const bool wide = problem.student.scalar_type() == at::kDouble ||
                        problem.teacher.scalar_type() == at::kDouble;
      problem.student = problem.student.to(wide ? at::kDouble : at::kFloat);
      Call call = make_call(problem);
      set_gradient(call, problem.student);
      run(call);
      return call.gradient;
    }
  };
};

using CpuOps = WithParameters<Kernels<run_cpu>::Of>;
#if defined(LRDS_WITH_CUDA)
using CudaOps = WithParameters<Kernels<run_cuda>::Of>;
#endif

template <class Ops>
void implement(torch::Library& m) {
  m.impl("kd_loss_forward", &Ops::forward);
  m.impl("kd_loss_forward_", &Ops::forward_in_place);
  m.impl("kd_loss_backward", &Ops::backward);
  m.impl("kd_logit_gradient", &Ops::logit_gradient);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lrds_fast, m) {
  const std::string parameters = schema_parameters();
  const std::string loss = "Tensor loss, Tensor ce, Tensor kd, Tensor counts";
  m.def(
      ("kd_loss_forward(" + parameters + ", bool with_gradient) -> (" + loss + ", Tensor gradient)")
          .c_str());
  m.def(("kd_loss_forward_(Tensor(a!) student, " + schema_parameters(1) + ") -> (" + loss + ")")
            .c_str());
  m.def(("kd_loss_backward(Tensor grad_output, " + parameters + ") -> Tensor").c_str());
  m.def(("kd_logit_gradient(" + parameters + ") -> Tensor").c_str());
}

TORCH_LIBRARY_IMPL(lrds_fast, CPU, m) { implement<CpuOps>(m); }
#if defined(LRDS_WITH_CUDA)
TORCH_LIBRARY_IMPL(lrds_fast, CUDA, m) { implement<CudaOps>(m); }
#endif

}  // namespace lrds
