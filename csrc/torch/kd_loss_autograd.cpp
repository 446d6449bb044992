// The operator kd_loss: the forward and backward passes by the operators of kd_loss.cpp.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/set.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/kd_loss.h"
#include "torch/problem.h"

namespace lrds {
namespace {

using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor>;             // loss, ce, kd, counts
using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // and the gradient

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <class... P>
struct OperatorsOf {
  static const auto& forward() {
    static const auto op = find<Forward(P..., bool)>("lrds_fast::kd_loss_forward");
    return op;
  }
  static const auto& backward() {
    static const auto op = find<Tensor(const Tensor&, P...)>("lrds_fast::kd_loss_backward");
    return op;
  }
  static const auto& logit_gradient() {
    static const auto op = find<Tensor(P...)>("lrds_fast::kd_logit_gradient");
    return op;
  }
  static const auto& composite() {
    static const auto op = find<Loss(P...)>("lrds_fast::kd_loss_composite");
    return op;
  }
};
using Operators = WithParameters<OperatorsOf>;

Forward call_forward(const Problem& problem, bool with_gradient) {
  return apply_to_fields(problem, [&](const auto&... fields) {
    return Operators::forward().call(fields..., with_gradient);
  });
}

Tensor call_backward(const Tensor& grad_output, const Problem& problem) {
  return apply_to_fields(problem, [&](const auto&... fields) {
    return Operators::backward().call(grad_output, fields...);
  });
}

Tensor call_logit_gradient(const Problem& problem) {
  return apply_to_fields(
      problem, [](const auto&... fields) { return Operators::logit_gradient().call(fields...); });
}

// The loss as PyTorch ops (lrds_fast/functional.py), which PyTorch differentiates to any order.
Loss call_composite(const Problem& problem) {
  return apply_to_fields(
      problem, [](const auto&... fields) { return Operators::composite().call(fields...); });
}

bool has_tangent(const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// Whether autograd cannot save a tensor: one made under inference_mode, as a teacher's logits are,
// has no version counter. A copy has one. So has a new tensor on the same storage, which costs no
// copy but does not detect later changes of the original.
bool lacks_version_counter(const Tensor& tensor) {
  return tensor.defined() && tensor.is_inference();
}

bool is_traced(const Tensor& tensor) { return tensor.key_set().has(c10::DispatchKey::Python); }

Tensor view_of_storage(const Tensor& tensor) {
  return at::empty({0}, tensor.options())
      .set_(tensor.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
}

// A problem without grad_scale that autograd keeps for the backward pass. Unlike the variables of
// save_for_backward, its tensors are unpacked, and checked for in-place changes, only if they are
// used.
class SavedProblem : public torch::CustomClassHolder {
 public:
  // copies: whether to copy tensors that lack a version counter, so that later changes of the
  // original do no harm. Traced tensors have no storage to share and are always copied.
  SavedProblem(Problem&& problem, bool copies) : rest_(std::move(problem)) {
    rest_.grad_scale.reset();
    tensors_.reserve(3);  // of most calls
    for_each_tensor(rest_, [&](Tensor& tensor) {
      if (lacks_version_counter(tensor)) {
        const bool copy = copies || is_traced(tensor);
        shares_storage_ |= !copy;
        tensor = copy ? tensor.clone() : view_of_storage(tensor);
      }
      tensors_.emplace_back(tensor, /*is_output=*/false);
      tensor.reset();
    });
  }

  Problem unpack() const {
    Problem problem = rest_;
    auto saved = tensors_.begin();
    for_each_tensor(problem, [&](Tensor& tensor) { tensor = saved++->unpack(); });
    return problem;
  }

  void release() { tensors_.clear(); }

  // Whether a tensor is saved without detection of later changes.
  bool shares_storage() const { return shares_storage_; }

 private:
  std::vector<torch::autograd::SavedVariable> tensors_;
  Problem rest_;  // the numbers, and an undefined tensor for each of tensors_
  bool shares_storage_ = false;
};

class KdLossFunction : public torch::autograd::Function<KdLossFunction> {
 public:
  // The student is an argument of its own because it is the only input that gets a gradient. The
  // loss is the only output that has one; the others are returned through `outputs`.
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& student,
                        Problem& problem, Loss& outputs) {
    // The backward pass computes the gradient where the forward pass cannot: with one loss per row,
    // grad_output has one factor per row; and a float16 gradient of a mean, without its loss scale,
    // would underflow.
    const bool recompute = problem.reduction == static_cast<std::int64_t>(Reduction::kNone) ||
                           (student.scalar_type() == at::kHalf && !problem.grad_scale.has_value());
    auto [loss, ce, kd, counts, gradient] = [&] {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      return call_forward(problem, !recompute);
    }();
    if (!recompute) {
      const Tensor scale = problem.grad_scale.value_or(Tensor());
      ctx->save_for_backward({gradient, lacks_version_counter(scale) ? scale.clone() : scale});
    }
    ctx->saved_data["problem"] = c10::IValue::make_capsule(
        c10::make_intrusive<SavedProblem>(std::move(problem), /*copies=*/recompute));
    ctx->set_materialize_grads(false);
    outputs = {Tensor(), ce, kd, counts};
    return loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    torch::autograd::variable_list inputs(3);
    if (!grads[0].defined()) return inputs;
    const bool keep_graph = torch::autograd::get_current_graph_task_keep_graph();
    const torch::autograd::variable_list gradient = ctx->get_saved_variables();
    const c10::intrusive_ptr<torch::CustomClassHolder> capsule =
        ctx->saved_data["problem"].toCapsule();
    SavedProblem& saved = static_cast<SavedProblem&>(*capsule);
    if (c10::GradMode::is_enabled()) {
      inputs[0] = differentiable_gradient(saved, gradient, grads[0]);
    } else if (is_wrapped(grads[0])) {
      inputs[0] = linear_gradient(saved, gradient, grads[0]);
    } else {
      inputs[0] = plain_gradient(saved, gradient, grads[0], keep_graph);
    }
    if (!keep_graph) saved.release();
    return inputs;
  }

 private:
  // What save_for_backward keeps: the gradient and its grad_scale, or nothing where the backward
  // pass computes the gradient.
  using SavedGradient = torch::autograd::variable_list;

  // Whether grad_output is batched (is_grads_batched) or has a tangent: kernels cannot read it.
  static bool is_wrapped(const Tensor& grad_output) {
    constexpr c10::DispatchKeySet wrappers({c10::DispatchKey::Batched,
                                            c10::DispatchKey::FuncTorchBatched,
                                            c10::DispatchKey::FuncTorchGradWrapper});
    return grad_output.key_set().has_any(wrappers) || has_tangent(grad_output);
  }

  // Throws if an input that is saved without detection of changes has changed: the gradient would
  // then differ from that of the forward pass.
  static void check_unchanged(const Problem& problem, const SavedGradient& gradient) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Problem again = problem;
    again.grad_scale = optional(gradient[1]);
    TORCH_CHECK(at::allclose(std::get<4>(call_forward(again, true)), gradient[0], 0.0, 0.0,
                             /*equal_nan=*/true),
                "kd_loss: teacher_logits, or another input made under torch.inference_mode(), was "
                "changed in place before a second derivative was computed from it; pass "
                "a clone() of it");
  }

  // The gradient by PyTorch ops of the student and grad_output, for higher-order derivatives.
  static Tensor differentiable_gradient(const SavedProblem& saved, const SavedGradient& gradient,
                                        const Tensor& grad_output) {
    Problem problem = saved.unpack();
    if (saved.shares_storage()) check_unchanged(problem, gradient);
    // A view, so that the student's hooks do not run here: they run in the outer backward pass.
    problem.student = problem.student.view_as(problem.student);
    const Tensor loss = std::get<0>(call_composite(problem));
    return torch::autograd::grad({loss}, {problem.student}, {grad_output}, /*retain_graph=*/true,
                                 /*create_graph=*/true)[0];
  }

  // grad_output times the gradient for a grad_output of 1, by PyTorch ops.
  static Tensor linear_gradient(const SavedProblem& saved, const SavedGradient& gradient,
                                const Tensor& grad_output) {
    if (gradient.empty()) {
      const Problem problem = saved.unpack();
      const Tensor unit = call_logit_gradient(problem);
      return unit.mul(grad_output.unsqueeze(-1)).to(problem.student.scalar_type());
    }
    const Tensor factor = gradient[1].defined() ? grad_output.div(gradient[1]) : grad_output;
    return gradient[0]
        .to(grad_output.scalar_type())
        .mul(factor.unsqueeze(-1))
        .to(gradient[0].scalar_type());
  }

  static Tensor plain_gradient(const SavedProblem& saved, const SavedGradient& gradient,
                               const Tensor& grad_output, bool keep_graph) {
    if (gradient.empty()) {
      // Unpacked before autograd is switched off: a saved-tensor hook (activation checkpointing)
      // may run the model here.
      const Problem problem = saved.unpack();
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      return call_backward(grad_output, problem);
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor scaled = gradient[0];
    const OptionalTensor grad_scale = optional(gradient[1]);
    // In place if no later backward pass needs the saved gradient. A tracer needs the functional
    // form.
    if (!is_traced(scaled) && !keep_graph) {
      static const auto in_place =
          find<void(Tensor&, const Tensor&, const OptionalTensor&)>("lrds_fast::scale_gradient_");
      in_place.call(scaled, grad_output, grad_scale);
      return scaled;
    }
    static const auto functional =
        find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>(
            "lrds_fast::scale_gradient");
    return functional.call(scaled, grad_output, grad_scale);
  }
};

Loss loss_without_gradient(const Problem& problem) {
  auto [loss, ce, kd, counts, gradient] = call_forward(problem, false);
  return {loss, ce, kd, counts};
}

Loss loss_with_autograd(Problem problem) {
  if (has_tangent(problem.student)) return call_composite(problem);
  if (!c10::GradMode::is_enabled() || !problem.student.requires_grad()) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return loss_without_gradient(problem);
  }
  // Only the student gets a gradient: detached, the other tensors are not inputs of the graph.
  for_each_tensor(problem, [&](Tensor& tensor) {
    if (tensor.requires_grad() && &tensor != &problem.student) tensor = tensor.detach();
  });
  const Tensor student = problem.student;
  Loss outputs;
  std::get<0>(outputs) = KdLossFunction::apply(student, problem, outputs);
  return outputs;
}

template <class... P>
struct KdLossOp {
  static Loss without_gradient(P... parameters) {
    return loss_without_gradient(make_problem(parameters...));
  }
  static Loss autograd(P... parameters) { return loss_with_autograd(make_problem(parameters...)); }
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(lrds_fast, m) {
  const std::string signature =
      "(" + schema_parameters() + ") -> (Tensor loss, Tensor ce, Tensor kd, Tensor counts)";
  m.def(("kd_loss" + signature).c_str());
  m.def(("kd_loss_composite" + signature).c_str());
}

TORCH_LIBRARY_IMPL(lrds_fast, CompositeExplicitAutograd, m) {
  m.impl("kd_loss", &WithParameters<KdLossOp>::without_gradient);
}

TORCH_LIBRARY_IMPL(lrds_fast, Autograd, m) {
  m.impl("kd_loss", &WithParameters<KdLossOp>::autograd);
  for (const char* name :
       {"kd_loss_forward", "kd_loss_forward_", "kd_loss_backward", "kd_logit_gradient"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

}  // namespace lrds
