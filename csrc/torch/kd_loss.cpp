// Tensors in, plain structs out: checks, allocation, devices, the operator schemas and their
// autograd.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/set.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "core/kd_loss.h"
#include "cpu/kd_loss.h"
#include "cpu/scale_gradient.h"

#if defined(LRDS_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kd_loss.h"
#endif

namespace lrds {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The hyperparameters of one call, in the order of the schemas.
struct KdLossOptions {
  double temperature;
  double ce_weight;
  double kd_weight;
  double ce_weight_unselected;
  double eta;
  double label_smoothing;
  std::int64_t revise;
  std::int64_t reduction;
  std::int64_t ignore_index;
};

constexpr const char* kOptionsSchema =
    "float temperature, float ce_weight, float kd_weight, float ce_weight_unselected, float eta, "
    "float label_smoothing, int revise, int reduction, int ignore_index";

DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return DType::kFloat64;
    case at::kFloat:
      return DType::kFloat32;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kHalf:
      return DType::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, name, " must be float64, float32, bfloat16 or float16; got ",
                       tensor.scalar_type());
  }
}

Tensor rows_of(const Tensor& logits, std::int64_t classes) {
  Tensor rows = logits.dim() == 2 ? logits : logits.reshape({-1, classes});
  return rows.stride(1) == 1 || classes == 1 ? rows : rows.contiguous();
}

// The tensors that a call's pointers point into. Everything a launch reads or writes lives here
// until it is enqueued.
struct Call {
  KdLossArgs args{};
  at::ScalarType accumulate = at::kFloat;
  Tensor student, teacher, target, selected, num_valid, grad_scale, grad_output, gradient;
};

Tensor scalar_on(const OptionalTensor& value, const char* name, const Tensor& student,
                 at::ScalarType accumulate) {
  if (!value.has_value()) return Tensor();
  TORCH_CHECK_VALUE(value->numel() == 1, name, " must hold one number; got shape ", value->sizes());
  TORCH_CHECK_VALUE(value->device() == student.device(), name, " must be on ", student.device(),
                    " like student_logits; got ", value->device());
  return value->to(accumulate).contiguous();
}

Call make_call(const Tensor& student, const Tensor& teacher, const Tensor& target,
               const OptionalTensor& selected, const OptionalTensor& num_valid,
               const OptionalTensor& grad_scale, const KdLossOptions& options) {
  Call call;
  KdLossArgs& args = call.args;
  TORCH_CHECK_VALUE(student.dim() >= 1, "student_logits must be (..., C); got a 0-d tensor");
  const std::int64_t classes = student.size(-1);
  TORCH_CHECK_VALUE(classes >= 1 && classes < (std::int64_t{1} << 31),
                    "student_logits must have at least one class; got shape ", student.sizes());
  TORCH_CHECK_VALUE(teacher.dim() >= 1 && teacher.size(-1) == classes,
                    "teacher_logits must have the student's ", classes, " classes; got shape ",
                    teacher.sizes());
  for (const Tensor& tensor : {teacher, target}) {
    TORCH_CHECK_VALUE(tensor.device() == student.device(), "all tensors must be on ",
                      student.device(), " like student_logits; got ", tensor.device());
  }
  args.student_type = dtype_of(student, "student_logits");
  args.teacher_type = dtype_of(teacher, "teacher_logits");
  const bool wide = args.student_type == DType::kFloat64 || args.teacher_type == DType::kFloat64;
  args.accumulate = wide ? DType::kFloat64 : DType::kFloat32;
  call.accumulate = wide ? at::kDouble : at::kFloat;

  call.student = rows_of(student, classes);
  call.teacher = rows_of(teacher, classes);
  args.rows = call.student.size(0);
  args.classes = classes;
  args.student = call.student.const_data_ptr();
  args.student_stride = call.student.stride(0);
  args.teacher = call.teacher.const_data_ptr();
  args.teacher_stride = call.teacher.stride(0);
  args.teacher_rows = call.teacher.size(0);
  TORCH_CHECK_VALUE(args.teacher_rows <= args.rows,
                    "teacher_logits must have at most the student's ", args.rows, " rows; got ",
                    args.teacher_rows);

  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong || target.scalar_type() == at::kInt,
                   "target must be int64 or int32 class indices; got ", target.scalar_type());
  TORCH_CHECK_VALUE(target.numel() == args.rows, "target must have one class per row, ", args.rows,
                    "; got shape ", target.sizes());
  call.target = target.contiguous();
  args.target = call.target.const_data_ptr();
  args.target_is_int64 = target.scalar_type() == at::kLong;
  args.ignore_index = options.ignore_index;

  args.selected_type = SelectedType::kPrefix;
  if (selected.has_value()) {
    TORCH_CHECK_VALUE(selected->device() == student.device(), "selected must be on ",
                      student.device(), " like student_logits; got ", selected->device());
    TORCH_CHECK_VALUE(selected->numel() == args.rows, "selected must have one entry per row, ",
                      args.rows, "; got shape ", selected->sizes());
    TORCH_CHECK_VALUE(
        args.teacher_rows == args.rows,
        "selected must be None when teacher_logits has fewer rows than student_logits");
    switch (selected->scalar_type()) {
      case at::kBool:
        args.selected_type = SelectedType::kBool;
        call.selected = selected->contiguous();
        break;
      case at::kDouble:
        args.selected_type = SelectedType::kFloat64;
        call.selected = selected->contiguous();
        break;
      case at::kFloat:
      case at::kHalf:
      case at::kBFloat16:
        args.selected_type = SelectedType::kFloat32;
        call.selected = selected->to(at::kFloat).contiguous();
        break;
      default:
        TORCH_CHECK_TYPE(false, "selected must be bool or floating; got ", selected->scalar_type());
    }
    args.selected = call.selected.const_data_ptr();
  }

  args.temperature = options.temperature;
  args.ce_weight = options.ce_weight;
  args.ce_weight_unselected = options.ce_weight_unselected;
  args.kd_weight = options.kd_weight;
  args.eta = options.eta;
  args.label_smoothing = options.label_smoothing;
  args.revise = static_cast<Revise>(options.revise);
  args.reduction = static_cast<Reduction>(options.reduction);

  call.num_valid = scalar_on(num_valid, "num_valid", student, call.accumulate);
  if (call.num_valid.defined()) args.num_valid = call.num_valid.const_data_ptr();
  call.grad_scale = scalar_on(grad_scale, "grad_scale", student, call.accumulate);
  if (call.grad_scale.defined()) args.grad_scale = call.grad_scale.const_data_ptr();
  return call;
}

// A fresh gradient of many megabytes costs a page fault per 4 KiB, several times the sweep itself;
// huge pages cost one per 2 MiB. Advice only: whatever the kernel answers, the memory is usable.
void advise_huge_pages(const Tensor& tensor) {
#if defined(__linux__)
  constexpr std::uintptr_t kHugePage = std::uintptr_t{1} << 21;
  const std::uintptr_t begin = reinterpret_cast<std::uintptr_t>(tensor.const_data_ptr());
  const std::uintptr_t end = begin + tensor.nbytes();
  const std::uintptr_t first = (begin + kHugePage - 1) & ~(kHugePage - 1);
  const std::uintptr_t last = end & ~(kHugePage - 1);
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void set_gradient(Call& call, const Tensor& student) {
  call.gradient = at::empty(student.sizes(), student.options());
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

double host_scalar(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? *tensor.const_data_ptr<double>()
                                             : *tensor.const_data_ptr<float>();
}

std::int64_t target_at(const Call& call, std::int64_t row) {
  return call.args.target_is_int64 ? call.target.const_data_ptr<std::int64_t>()[row]
                                   : call.target.const_data_ptr<std::int32_t>()[row];
}

// Runs the sweep (and, when the loss is wanted, its finalize step) on the CPU.
void run_cpu(const Call& call) {
  const KdLossArgs& args = call.args;
  double valid_rows = 0.0;
  if (args.reduction == Reduction::kMean || args.reduction == Reduction::kElementMean) {
    valid_rows = args.num_valid != nullptr ? host_scalar(call.num_valid)
                                           : static_cast<double>(cpu::kd_loss_count_valid(args));
  }
  const double scale =
      reduction_scale(args.reduction, valid_rows, static_cast<double>(args.classes));
  const double gradient_scale =
      args.grad_scale != nullptr ? scale * host_scalar(call.grad_scale) : scale;

  const std::size_t scratch_bytes = (cpu::kd_loss_scratch_bytes(args) + 63) / 64 * 64;
  std::atomic<std::int64_t> bad_row{args.rows};
  const std::int64_t grain = std::max<std::int64_t>(1, 32768 / args.classes);
  at::parallel_for(0, args.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::unique_ptr<void, decltype(&std::free)> scratch(
        scratch_bytes > 0 ? std::aligned_alloc(64, scratch_bytes) : nullptr, &std::free);
    TORCH_CHECK(scratch_bytes == 0 || scratch != nullptr, "out of memory: ", scratch_bytes,
                " bytes of scratch for a row");
    const cpu::RowError error = cpu::kd_loss_rows(args, gradient_scale, begin, end, scratch.get());
    if (error.kind == cpu::RowError::kNone) return;
    std::int64_t first = bad_row.load();
    while (error.row < first && !bad_row.compare_exchange_weak(first, error.row)) {
    }
  });
  const std::int64_t row = bad_row.load();
  if (row < args.rows) {
    const std::int64_t y = target_at(call, row);
    TORCH_CHECK_VALUE(y >= 0 && y < args.classes, "target[", row, "] is ", y, ", outside [0, ",
                      args.classes, ") and not ignore_index = ", args.ignore_index);
    TORCH_CHECK_VALUE(false, "selected[", row, "] is not a weight in [0, 1]: ",
                      args.selected_type == SelectedType::kFloat64
                          ? call.selected.const_data_ptr<double>()[row]
                          : call.selected.const_data_ptr<float>()[row]);
  }
  if (args.counts != nullptr) cpu::kd_loss_finalize(args, scale);
}

#if defined(LRDS_WITH_CUDA)
void run_cuda(const Call& call) {
  const c10::cuda::CUDAGuard guard(call.student.device());
  C10_CUDA_CHECK(cuda::kd_loss(call.args, c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <void (*Run)(const Call&)>
Forward kd_loss_forward(const Tensor& student, const Tensor& teacher, const Tensor& target,
                        const OptionalTensor& selected, const OptionalTensor& num_valid,
                        const OptionalTensor& grad_scale, double temperature, double ce_weight,
                        double kd_weight, double ce_weight_unselected, double eta,
                        double label_smoothing, std::int64_t revise, std::int64_t reduction,
                        std::int64_t ignore_index, bool with_gradient) {
  const KdLossOptions options{temperature,     ce_weight, kd_weight, ce_weight_unselected, eta,
                              label_smoothing, revise,    reduction, ignore_index};
  Call call = make_call(student, teacher, target, selected, num_valid, grad_scale, options);
  KdLossArgs& args = call.args;
  const at::TensorOptions accumulate = student.options().dtype(call.accumulate);
  Tensor gradient = at::empty({0}, student.options());
  if (with_gradient) {
    set_gradient(call, student);
    gradient = call.gradient;
  }
  const Tensor ce_rows = at::empty(target.sizes(), accumulate);
  const Tensor kd_rows = at::empty(target.sizes(), accumulate);
  const Tensor flags = at::empty({args.rows}, student.options().dtype(at::kByte));
  const Tensor counts = at::empty({3}, student.options().dtype(at::kLong));
  const bool per_row = args.reduction == Reduction::kNone;
  const Tensor loss = per_row ? at::empty(target.sizes(), accumulate) : at::empty({}, accumulate);
  const Tensor ce = per_row ? ce_rows : at::empty({}, accumulate);
  const Tensor kd = per_row ? kd_rows : at::empty({}, accumulate);
  args.ce = ce_rows.mutable_data_ptr();
  args.kd = kd_rows.mutable_data_ptr();
  args.flags = flags.mutable_data_ptr<std::uint8_t>();
  args.loss = loss.mutable_data_ptr();
  args.loss_ce = ce.mutable_data_ptr();
  args.loss_kd = kd.mutable_data_ptr();
  args.counts = counts.mutable_data_ptr<std::int64_t>();
  Run(call);
  return {loss, ce, kd, counts, gradient};
}

// The recompute form: the gradient from the logits again, with grad_output folded in before it is
// rounded.
template <void (*Run)(const Call&)>
Tensor kd_loss_backward(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
                        const Tensor& target, const OptionalTensor& selected,
                        const OptionalTensor& num_valid, double temperature, double ce_weight,
                        double kd_weight, double ce_weight_unselected, double eta,
                        double label_smoothing, std::int64_t revise, std::int64_t reduction,
                        std::int64_t ignore_index) {
  const KdLossOptions options{temperature,     ce_weight, kd_weight, ce_weight_unselected, eta,
                              label_smoothing, revise,    reduction, ignore_index};
  Call call = make_call(student, teacher, target, selected, num_valid, std::nullopt, options);
  set_gradient(call, student);
  set_grad_output(call, grad_output);
  Run(call);
  return call.gradient;
}

template <void (*Run)(const Call&)>
Tensor kd_logit_gradient(const Tensor& student, const Tensor& teacher, const Tensor& target,
                         double temperature, double ce_weight, double kd_weight, double eta,
                         double label_smoothing, std::int64_t revise) {
  // Rounding to 16 bits would be felt in the scores: the gradient leaves in the accumulation type.
  const bool wide = student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble;
  const Tensor precise = student.to(wide ? at::kDouble : at::kFloat);
  const KdLossOptions options{temperature,
                              ce_weight,
                              kd_weight,
                              ce_weight,
                              eta,
                              label_smoothing,
                              revise,
                              static_cast<std::int64_t>(Reduction::kSum),
                              /*ignore_index=*/-100};
  Call call =
      make_call(precise, teacher, target, std::nullopt, std::nullopt, std::nullopt, options);
  set_gradient(call, precise);
  Run(call);
  return call.gradient;
}

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
  const Tensor folded = scalar_on(grad_scale, "grad_scale", gradient, factor_tensor.scalar_type());
  double factor = host_scalar(factor_tensor);
  if (folded.defined()) factor /= host_scalar(folded);
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
  const Tensor folded = scalar_on(grad_scale, "grad_scale", gradient, factor.scalar_type());
  C10_CUDA_CHECK(cuda::scale_gradient(
      gradient.const_data_ptr(), out.mutable_data_ptr(), gradient.numel(),
      dtype_of(gradient, "gradient"), factor.const_data_ptr(),
      folded.defined() ? folded.const_data_ptr() : nullptr, factor.scalar_type() == at::kDouble,
      c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

using ScaleInto = void (*)(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&);

template <ScaleInto Scale>
Tensor scale_gradient(const Tensor& gradient, const Tensor& grad_output,
                      const OptionalTensor& grad_scale) {
  const Tensor out = at::empty(gradient.sizes(), gradient.options());
  Scale(gradient, out, grad_output, grad_scale);
  return out;
}

template <ScaleInto Scale>
void scale_gradient_(Tensor& gradient, const Tensor& grad_output,
                     const OptionalTensor& grad_scale) {
  Scale(gradient, gradient, grad_output, grad_scale);
}

// --- Autograd
// ---------------------------------------------------------------------------------------------------------

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Forward call_forward(const Tensor& student, const Tensor& teacher, const Tensor& target,
                     const OptionalTensor& selected, const OptionalTensor& num_valid,
                     const OptionalTensor& grad_scale, const KdLossOptions& o, bool with_gradient) {
  static const auto op =
      find<Forward(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                   const OptionalTensor&, const OptionalTensor&, double, double, double, double,
                   double, double, std::int64_t, std::int64_t, std::int64_t, bool)>(
          "lrds_fast::kd_loss_forward");
  return op.call(student, teacher, target, selected, num_valid, grad_scale, o.temperature,
                 o.ce_weight, o.kd_weight, o.ce_weight_unselected, o.eta, o.label_smoothing,
                 o.revise, o.reduction, o.ignore_index, with_gradient);
}

Tensor call_backward(const Tensor& grad_output, const Tensor& student, const Tensor& teacher,
                     const Tensor& target, const OptionalTensor& selected,
                     const OptionalTensor& num_valid, const KdLossOptions& o) {
  static const auto op =
      find<Tensor(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                  const OptionalTensor&, double, double, double, double, double, double,
                  std::int64_t, std::int64_t, std::int64_t)>("lrds_fast::kd_loss_backward");
  return op.call(grad_output, student, teacher, target, selected, num_valid, o.temperature,
                 o.ce_weight, o.kd_weight, o.ce_weight_unselected, o.eta, o.label_smoothing,
                 o.revise, o.reduction, o.ignore_index);
}

// A tensor made under inference_mode (a teacher's output) cannot be saved for backward; another
// view of its storage can.
Tensor saveable(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_inference()) return tensor;
  return at::empty({0}, tensor.options())
      .set_(tensor.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
}

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

class KdLossFunction : public torch::autograd::Function<KdLossFunction> {
 public:
  static torch::autograd::variable_list forward(
      torch::autograd::AutogradContext* ctx, const Tensor& student, const Tensor& teacher,
      const Tensor& target, const OptionalTensor& selected, const OptionalTensor& num_valid,
      const OptionalTensor& grad_scale, const KdLossOptions& options) {
    // A gradient per row cannot carry grad_output yet; a float16 gradient of a mean would underflow
    // without its scale.
    const bool recompute = options.reduction == static_cast<std::int64_t>(Reduction::kNone) ||
                           (student.scalar_type() == at::kHalf && !grad_scale.has_value());
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const auto [loss, ce, kd, counts, gradient] = call_forward(
        student, teacher, target, selected, num_valid, grad_scale, options, !recompute);
    ctx->saved_data["recompute"] = recompute;
    if (recompute) {
      ctx->save_for_backward({student, saveable(teacher), saveable(target),
                              saveable(selected.value_or(Tensor())),
                              saveable(num_valid.value_or(Tensor()))});
      ctx->saved_data["numbers"] = std::vector<double>{
          options.temperature,          options.ce_weight, options.kd_weight,
          options.ce_weight_unselected, options.eta,       options.label_smoothing};
      ctx->saved_data["choices"] =
          std::vector<std::int64_t>{options.revise, options.reduction, options.ignore_index};
    } else {
      ctx->save_for_backward({gradient, saveable(grad_scale.value_or(Tensor()))});
    }
    ctx->mark_non_differentiable({ce, kd, counts});
    ctx->set_materialize_grads(false);
    return {loss, ce, kd, counts};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    torch::autograd::variable_list inputs(7);
    if (!grads[0].defined()) return inputs;
    const bool create_graph = c10::GradMode::is_enabled();
    // Unpacked before autograd is switched off: a saved-tensor hook (activation checkpointing) may
    // run the model here.
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      inputs[0] = gradient_of(ctx, saved, grads[0]);
    }
    if (create_graph) {
      // A second derivative is not implemented; it must not come out as silently zero.
      const auto error = std::make_shared<torch::autograd::DelayedError>(
          "kd_loss has no second derivative; use lrds_fast.reference.kd_loss where one is needed",
          1);
      inputs[0] = inputs[0].detach();
      inputs[0].set_requires_grad(true);
      inputs[0] = (*error)({inputs[0]})[0];
    }
    return inputs;
  }

 private:
  static Tensor gradient_of(torch::autograd::AutogradContext* ctx,
                            const torch::autograd::variable_list& saved,
                            const Tensor& grad_output) {
    if (ctx->saved_data["recompute"].toBool()) {
      const std::vector<double> n = ctx->saved_data["numbers"].toDoubleVector();
      const std::vector<std::int64_t> c = ctx->saved_data["choices"].toIntVector();
      const KdLossOptions options{n[0], n[1], n[2], n[3], n[4], n[5], c[0], c[1], c[2]};
      return call_backward(grad_output, saved[0], saved[1], saved[2], optional(saved[3]),
                           optional(saved[4]), options);
    }
    Tensor gradient = saved[0];
    // In place only for a plain tensor that nobody will ask for again: a tracer needs the
    // functional form.
    const bool plain = !gradient.key_set().has(c10::DispatchKey::Python);
    if (plain && !torch::autograd::get_current_graph_task_keep_graph()) {
      static const auto in_place =
          find<void(Tensor&, const Tensor&, const OptionalTensor&)>("lrds_fast::scale_gradient_");
      in_place.call(gradient, grad_output, optional(saved[1]));
      return gradient;
    }
    static const auto functional =
        find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>(
            "lrds_fast::scale_gradient");
    return functional.call(gradient, grad_output, optional(saved[1]));
  }
};

using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Loss kd_loss_without_gradient(const Tensor& student, const Tensor& teacher, const Tensor& target,
                              const OptionalTensor& selected, const OptionalTensor& num_valid,
                              const OptionalTensor& grad_scale, double temperature,
                              double ce_weight, double kd_weight, double ce_weight_unselected,
                              double eta, double label_smoothing, std::int64_t revise,
                              std::int64_t reduction, std::int64_t ignore_index) {
  const KdLossOptions options{temperature,     ce_weight, kd_weight, ce_weight_unselected, eta,
                              label_smoothing, revise,    reduction, ignore_index};
  auto [loss, ce, kd, counts, gradient] =
      call_forward(student, teacher, target, selected, num_valid, grad_scale, options, false);
  return {loss, ce, kd, counts};
}

Loss kd_loss_autograd(const Tensor& student, const Tensor& teacher, const Tensor& target,
                      const OptionalTensor& selected, const OptionalTensor& num_valid,
                      const OptionalTensor& grad_scale, double temperature, double ce_weight,
                      double kd_weight, double ce_weight_unselected, double eta,
                      double label_smoothing, std::int64_t revise, std::int64_t reduction,
                      std::int64_t ignore_index) {
  if (!c10::GradMode::is_enabled() || !student.requires_grad()) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return kd_loss_without_gradient(student, teacher, target, selected, num_valid, grad_scale,
                                    temperature, ce_weight, kd_weight, ce_weight_unselected, eta,
                                    label_smoothing, revise, reduction, ignore_index);
  }
  const KdLossOptions options{temperature,     ce_weight, kd_weight, ce_weight_unselected, eta,
                              label_smoothing, revise,    reduction, ignore_index};
  // Teacher and selection get no gradient: detached, they are no inputs of the graph.
  const OptionalTensor weights =
      selected.has_value() ? OptionalTensor(selected->detach()) : selected;
  auto outputs = KdLossFunction::apply(student, teacher.detach(), target, weights, num_valid,
                                       grad_scale, options);
  return {outputs[0], outputs[1], outputs[2], outputs[3]};
}

}  // namespace

TORCH_LIBRARY(lrds_fast, m) {
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  const std::string inputs =
      "Tensor student, Tensor teacher, Tensor target, Tensor? selected, Tensor? num_valid";
  const std::string options = kOptionsSchema;
  const std::string outputs = "Tensor loss, Tensor ce, Tensor kd, Tensor counts";
  define("kd_loss(" + inputs + ", Tensor? grad_scale, " + options + ") -> (" + outputs + ")");
  define("kd_loss_forward(" + inputs + ", Tensor? grad_scale, " + options +
         ", bool with_gradient) -> (" + outputs + ", Tensor gradient)");
  define("kd_loss_backward(Tensor grad_output, " + inputs + ", " + options + ") -> Tensor");
  define("scale_gradient(Tensor gradient, Tensor grad_output, Tensor? grad_scale) -> Tensor");
  define("scale_gradient_(Tensor(a!) gradient, Tensor grad_output, Tensor? grad_scale) -> ()");
  define(
      "kd_logit_gradient(Tensor student, Tensor teacher, Tensor target, float temperature, "
      "float ce_weight, float kd_weight, float eta, float label_smoothing, int revise) -> Tensor");
}

TORCH_LIBRARY_IMPL(lrds_fast, CompositeExplicitAutograd, m) {
  m.impl("kd_loss", &kd_loss_without_gradient);
}

TORCH_LIBRARY_IMPL(lrds_fast, Autograd, m) {
  m.impl("kd_loss", &kd_loss_autograd);
  for (const char* name : {"kd_loss_forward", "kd_loss_backward", "scale_gradient",
                           "scale_gradient_", "kd_logit_gradient"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(lrds_fast, CPU, m) {
  m.impl("kd_loss_forward", &kd_loss_forward<run_cpu>);
  m.impl("kd_loss_backward", &kd_loss_backward<run_cpu>);
  m.impl("kd_logit_gradient", &kd_logit_gradient<run_cpu>);
  m.impl("scale_gradient", &scale_gradient<scale_into_cpu>);
  m.impl("scale_gradient_", &scale_gradient_<scale_into_cpu>);
}

#if defined(LRDS_WITH_CUDA)
TORCH_LIBRARY_IMPL(lrds_fast, CUDA, m) {
  m.impl("kd_loss_forward", &kd_loss_forward<run_cuda>);
  m.impl("kd_loss_backward", &kd_loss_backward<run_cuda>);
  m.impl("kd_logit_gradient", &kd_logit_gradient<run_cuda>);
  m.impl("scale_gradient", &scale_gradient<scale_into_cuda>);
  m.impl("scale_gradient_", &scale_gradient_<scale_into_cuda>);
}
#endif

}  // namespace lrds
