// Tensors in, plain structs out: checks, allocation, devices, the operator schemas and their
// autograd.
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
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

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/divergences.h"
#include "core/kd_loss.h"
#include "cpu/kd_loss.h"
#include "cpu/scale_gradient.h"

#if defined(LRDS_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kd_loss.h"
#include "cuda/kd_moments.h"
#endif

namespace lrds {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using Numbers = at::ArrayRef<double>;

// The hyperparameters of one call.
struct KdLossOptions {
  std::vector<double> temperature;
  double ce_weight;
  double kd_weight;
  double ce_weight_unselected;
  double eta;
  double revise_temperature;  // 0: that of the divergence
  double label_smoothing;
  std::int64_t revise;
  std::int64_t reduction;
  std::int64_t ignore_index;
  std::int64_t divergence;
  std::vector<double> divergence_parameters;
  bool standardize;
};

// What a call brings: tensors and hyperparameters, in the order of the schemas. The operators below
// are templates of this parameter list, which is written out here and in kParameters alone.
struct Problem {
  Tensor student, teacher, target;
  OptionalTensor selected, class_weight, teacher_indices, teacher_rest, num_valid, weight_sum,
      grad_scale;
  KdLossOptions options;

  Problem(const Tensor& student, const Tensor& teacher, const Tensor& target,
          const OptionalTensor& selected, const OptionalTensor& class_weight,
          const OptionalTensor& teacher_indices, const OptionalTensor& teacher_rest,
          const OptionalTensor& num_valid, const OptionalTensor& weight_sum,
          const OptionalTensor& grad_scale, Numbers temperature, double ce_weight, double kd_weight,
          double ce_weight_unselected, double eta, double revise_temperature,
          double label_smoothing, std::int64_t revise, std::int64_t reduction,
          std::int64_t ignore_index, std::int64_t divergence, Numbers divergence_parameters,
          bool standardize)
      : Problem(student, teacher, target, selected, class_weight, teacher_indices, teacher_rest,
                num_valid, weight_sum, grad_scale,
                KdLossOptions{temperature.vec(), ce_weight, kd_weight, ce_weight_unselected, eta,
                              revise_temperature, label_smoothing, revise, reduction, ignore_index,
                              divergence, divergence_parameters.vec(), standardize}) {}

  Problem(const Tensor& student, const Tensor& teacher, const Tensor& target,
          const OptionalTensor& selected, const OptionalTensor& class_weight,
          const OptionalTensor& teacher_indices, const OptionalTensor& teacher_rest,
          const OptionalTensor& num_valid, const OptionalTensor& weight_sum,
          const OptionalTensor& grad_scale, KdLossOptions options)
      : student(student),
        teacher(teacher),
        target(target),
        selected(selected),
        class_weight(class_weight),
        teacher_indices(teacher_indices),
        teacher_rest(teacher_rest),
        num_valid(num_valid),
        weight_sum(weight_sum),
        grad_scale(grad_scale),
        options(std::move(options)) {}

  template <class F>
  auto unpack(F f) const {
    const KdLossOptions& o = options;
    return f(student, teacher, target, selected, class_weight, teacher_indices, teacher_rest,
             num_valid, weight_sum, grad_scale, o.temperature, o.ce_weight, o.kd_weight,
             o.ce_weight_unselected, o.eta, o.revise_temperature, o.label_smoothing, o.revise,
             o.reduction, o.ignore_index, o.divergence, o.divergence_parameters, o.standardize);
  }

  // Index targets have the rows' shape, soft targets one dimension more.
  bool soft() const { return at::isFloatingType(target.scalar_type()); }
};

template <template <class...> class T>
using WithParameters =
    T<const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&,
      const OptionalTensor&, Numbers, double, double, double, double, double, double, std::int64_t,
      std::int64_t, std::int64_t, std::int64_t, Numbers, bool>;

constexpr const char* kParameters =
    "Tensor student, Tensor teacher, Tensor target, Tensor? selected, Tensor? class_weight, "
    "Tensor? teacher_indices, Tensor? teacher_rest, Tensor? num_valid, Tensor? weight_sum, "
    "Tensor? grad_scale, float[] temperature, float ce_weight, float kd_weight, "
    "float ce_weight_unselected, float eta, float revise_temperature, float label_smoothing, int "
    "revise, int reduction, "
    "int ignore_index, int divergence, float[] divergence_parameters, bool standardize";

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
  Tensor student, teacher, target, selected, class_weight, teacher_indices, teacher_rest, num_valid,
      weight_sum, grad_scale, grad_output, gradient;
};

void check_device(const Tensor& tensor, const char* name, const Tensor& student) {
  TORCH_CHECK_VALUE(tensor.device() == student.device(), name, " must be on ", student.device(),
                    " like student_logits; got ", tensor.device());
}

Tensor scalar_on(const OptionalTensor& value, const char* name, const Tensor& student,
                 at::ScalarType accumulate) {
  if (!value.has_value()) return Tensor();
  TORCH_CHECK_VALUE(value->numel() == 1, name, " must hold one number; got shape ", value->sizes());
  check_device(*value, name, student);
  return value->to(accumulate).contiguous();
}

const void* pointer_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

void set_target(Call& call, const Problem& problem) {
  KdLossArgs& args = call.args;
  const Tensor& target = problem.target;
  check_device(target, "target", problem.student);
  args.ignore_index = problem.options.ignore_index;
  if (problem.soft()) {
    TORCH_CHECK_VALUE(target.sizes() == problem.student.sizes(),
                      "target probabilities must have student_logits' shape ",
                      problem.student.sizes(), "; got ", target.sizes());
    call.target = target.to(call.accumulate).contiguous();
    args.soft_target = call.target.const_data_ptr();
    return;
  }
  TORCH_CHECK_TYPE(target.scalar_type() == at::kLong || target.scalar_type() == at::kInt,
                   "target must be int64 or int32 class indices, or floating probabilities; got ",
                   target.scalar_type());
  TORCH_CHECK_VALUE(target.numel() == args.rows, "target must have one class per row, ", args.rows,
                    "; got shape ", target.sizes());
  call.target = target.contiguous();
  args.target = call.target.const_data_ptr();
  args.target_is_int64 = target.scalar_type() == at::kLong;
}

void set_selected(Call& call, const Problem& problem) {
  KdLossArgs& args = call.args;
  args.selected_type = SelectedType::kPrefix;
  if (!problem.selected.has_value()) return;
  const Tensor& selected = *problem.selected;
  check_device(selected, "selected", problem.student);
  TORCH_CHECK_VALUE(selected.numel() == args.rows, "selected must have one entry per row, ",
                    args.rows, "; got shape ", selected.sizes());
  TORCH_CHECK_VALUE(args.teacher_rows == args.rows,
                    "selected must be None when teacher_logits has fewer rows than student_logits");
  switch (selected.scalar_type()) {
    case at::kBool:
      args.selected_type = SelectedType::kBool;
      call.selected = selected.contiguous();
      break;
    case at::kDouble:
      args.selected_type = SelectedType::kFloat64;
      call.selected = selected.contiguous();
      break;
    case at::kFloat:
    case at::kHalf:
    case at::kBFloat16:
      args.selected_type = SelectedType::kFloat32;
      call.selected = selected.to(at::kFloat).contiguous();
      break;
    default:
      TORCH_CHECK_TYPE(false, "selected must be bool or floating; got ", selected.scalar_type());
  }
  args.selected = call.selected.const_data_ptr();
}

// The teacher's rows: dense, or the kept classes of a cached one.
void set_teacher(Call& call, const Problem& problem) {
  KdLossArgs& args = call.args;
  const Tensor& teacher = problem.teacher;
  check_device(teacher, "teacher_logits", problem.student);
  const bool cached = problem.teacher_indices.has_value();
  TORCH_CHECK_VALUE(
      teacher.dim() >= 1 && (cached ? teacher.size(-1) >= 1 && teacher.size(-1) <= args.classes
                                    : teacher.size(-1) == args.classes),
      "teacher_logits must have the student's ", args.classes,
      cached ? " classes at most" : " classes", "; got shape ", teacher.sizes());
  call.teacher = rows_of(teacher, teacher.size(-1));
  args.teacher = call.teacher.const_data_ptr();
  args.teacher_stride = call.teacher.stride(0);
  args.teacher_rows = call.teacher.size(0);
  TORCH_CHECK_VALUE(args.teacher_rows <= args.rows,
                    "teacher_logits must have at most the student's ", args.rows, " rows; got ",
                    args.teacher_rows);
  if (!cached) return;
  TORCH_CHECK_VALUE(problem.teacher_rest.has_value(),
                    "a cached teacher needs its rest beside its indices");
  check_device(*problem.teacher_indices, "teacher indices", problem.student);
  check_device(*problem.teacher_rest, "teacher rest", problem.student);
  TORCH_CHECK_VALUE(problem.teacher_indices->numel() == teacher.numel(),
                    "teacher indices must have the kept logits' shape ", teacher.sizes(), "; got ",
                    problem.teacher_indices->sizes());
  TORCH_CHECK_VALUE(problem.teacher_rest->numel() == args.teacher_rows,
                    "teacher rest must have one number per row, ", args.teacher_rows,
                    "; got shape ", problem.teacher_rest->sizes());
  call.teacher_indices = problem.teacher_indices->to(at::kLong).contiguous();
  call.teacher_rest = problem.teacher_rest->to(call.accumulate).contiguous();
  args.kept_classes = teacher.size(-1);
  args.teacher_indices = call.teacher_indices.const_data_ptr<std::int64_t>();
  args.teacher_rest = call.teacher_rest.const_data_ptr();
}

void set_options(KdLossArgs& args, const KdLossOptions& options) {
  const std::size_t temperatures = options.temperature.size();
  TORCH_CHECK_VALUE(temperatures >= 1 && temperatures <= static_cast<std::size_t>(kMaxTemperatures),
                    "temperature must be one number or up to ", kMaxTemperatures, "; got ",
                    temperatures);
  TORCH_CHECK_VALUE(options.divergence_parameters.size() == 3,
                    "divergence_parameters must be three numbers; got ",
                    options.divergence_parameters.size());
  TORCH_CHECK_VALUE(options.divergence >= 0 && options.divergence < Divergences::kCount,
                    "divergence must be a code in [0, ", Divergences::kCount, "); got ",
                    options.divergence);
  args.temperature = options.temperature[0];
  args.temperature_count = static_cast<std::int32_t>(temperatures);
  std::copy(options.temperature.begin(), options.temperature.end(), args.temperatures);
  args.ce_weight = options.ce_weight;
  args.ce_weight_unselected = options.ce_weight_unselected;
  args.kd_weight = options.kd_weight;
  TORCH_CHECK_VALUE(
      options.revise_temperature >= 0.0,
      "revise_temperature must be > 0, or 0 for the temperature of the divergence; got ",
      options.revise_temperature);
  args.eta = options.eta;
  args.revise_temperature = options.revise_temperature;
  args.label_smoothing = options.label_smoothing;
  args.revise = static_cast<Revise>(options.revise);
  args.reduction = static_cast<Reduction>(options.reduction);
  args.divergence = static_cast<std::int32_t>(options.divergence);
  std::copy(options.divergence_parameters.begin(), options.divergence_parameters.end(),
            args.divergence_parameters);
  args.standardize = options.standardize;
}

Call make_call(const Problem& problem) {
  Call call;
  KdLossArgs& args = call.args;
  const Tensor& student = problem.student;
  TORCH_CHECK_VALUE(student.dim() >= 1, "student_logits must be (..., C); got a 0-d tensor");
  const std::int64_t classes = student.size(-1);
  TORCH_CHECK_VALUE(classes >= 1 && classes < (std::int64_t{1} << 31),
                    "student_logits must have at least one class; got shape ", student.sizes());
  args.student_type = dtype_of(student, "student_logits");
  args.teacher_type = dtype_of(problem.teacher, "teacher_logits");
  const bool wide = args.student_type == DType::kFloat64 || args.teacher_type == DType::kFloat64;
  args.accumulate = wide ? DType::kFloat64 : DType::kFloat32;
  call.accumulate = wide ? at::kDouble : at::kFloat;

  call.student = rows_of(student, classes);
  args.rows = call.student.size(0);
  args.classes = classes;
  args.student = call.student.const_data_ptr();
  args.student_stride = call.student.stride(0);
  set_teacher(call, problem);
  set_target(call, problem);
  set_selected(call, problem);
  set_options(args, problem.options);

  if (problem.class_weight.has_value()) {
    check_device(*problem.class_weight, "class_weight", student);
    TORCH_CHECK_VALUE(problem.class_weight->numel() == classes,
                      "class_weight must have one weight per class, ", classes, "; got shape ",
                      problem.class_weight->sizes());
    call.class_weight = problem.class_weight->to(call.accumulate).contiguous();
  }
  args.class_weight = pointer_or_null(call.class_weight);
  call.num_valid = scalar_on(problem.num_valid, "num_valid", student, call.accumulate);
  args.num_valid = pointer_or_null(call.num_valid);
  call.weight_sum = scalar_on(problem.weight_sum, "weight_sum", student, call.accumulate);
  args.weight_sum = pointer_or_null(call.weight_sum);
  call.grad_scale = scalar_on(problem.grad_scale, "grad_scale", student, call.accumulate);
  args.grad_scale = pointer_or_null(call.grad_scale);
  return call;
}

// at::empty without the operator call, which on the CPU costs more than the allocation.
Tensor fresh(at::IntArrayRef sizes, const at::TensorOptions& options) {
  if (options.device().is_cpu()) return Tensor(at::detail::empty_cpu(sizes, options));
  return at::empty(sizes, options);
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
  call.gradient = fresh(student.sizes(), student.options());
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

// One over the denominators, before grad_scale.
TermScales term_scales_cpu(const Call& call) {
  const KdLossArgs& args = call.args;
  if (args.reduction == Reduction::kNone || args.reduction == Reduction::kSum) return {1.0, 1.0};
  const double valid = args.num_valid != nullptr
                           ? host_scalar(call.num_valid)
                           : static_cast<double>(cpu::kd_loss_count_valid(args));
  TORCH_CHECK_VALUE(valid >= 0.0, "num_valid must be >= 0; got ", valid);
  const double scale = reduction_scale(args.reduction, valid, static_cast<double>(args.classes));
  if (!weighs_rows(args)) return {scale, scale};
  const double weight_sum =
      args.weight_sum != nullptr ? host_scalar(call.weight_sum) : cpu::kd_loss_weight_sum(args);
  TORCH_CHECK_VALUE(weight_sum == weight_sum,
                    "weight_sum, or the class_weight of the rows, is NaN");
  return {inverse_of_denominator(weight_sum), scale};
}

[[noreturn]] void throw_row_error(const Call& call, const cpu::RowError& error) {
  const KdLossArgs& args = call.args;
  const std::int64_t row = error.row;
  switch (error.kind) {
    case cpu::RowError::kTarget:
      TORCH_CHECK_VALUE(false, "target[", row, "] is ", target_at(call, row), ", outside [0, ",
                        args.classes, ") and not ignore_index = ", args.ignore_index);
    case cpu::RowError::kTeacherIndex:
      TORCH_CHECK_VALUE(false, "the cached teacher's indices[", row, "] must be inside [0, ",
                        args.classes, "); got ",
                        call.teacher_indices.view({-1, args.kept_classes})[row]);
    default:
      TORCH_CHECK_VALUE(false, "selected[", row, "] is not a weight in [0, 1]: ",
                        args.selected_type == SelectedType::kFloat64
                            ? call.selected.const_data_ptr<double>()[row]
                            : call.selected.const_data_ptr<float>()[row]);
  }
}

// Runs the sweep (and, when the loss is wanted, its finalize step) on the CPU.
void run_cpu(const Call& call) {
  const KdLossArgs& args = call.args;
  const TermScales loss_scales = term_scales_cpu(call);
  const double folded = args.grad_scale != nullptr ? host_scalar(call.grad_scale) : 1.0;
  const TermScales scales{loss_scales.ce * folded, loss_scales.kd * folded};

  const std::size_t scratch_bytes = (cpu::kd_loss_scratch_bytes(args) + 63) / 64 * 64;
  std::mutex mutex;
  cpu::RowError first{cpu::RowError::kNone, args.rows};
  const std::int64_t grain = std::max<std::int64_t>(1, 32768 / args.classes);
  at::parallel_for(0, args.rows, grain, [&](std::int64_t begin, std::int64_t end) {
    const std::unique_ptr<void, decltype(&std::free)> scratch(
        scratch_bytes > 0 ? std::aligned_alloc(64, scratch_bytes) : nullptr, &std::free);
    TORCH_CHECK(scratch_bytes == 0 || scratch != nullptr, "out of memory: ", scratch_bytes,
                " bytes of scratch for a row");
    const cpu::RowError error = cpu::kd_loss_rows(args, scales, begin, end, scratch.get());
    if (error.kind == cpu::RowError::kNone) return;
    const std::lock_guard<std::mutex> lock(mutex);
    if (error.row < first.row) first = error;
  });
  if (first.kind != cpu::RowError::kNone) throw_row_error(call, first);
  if (args.counts != nullptr) cpu::kd_loss_finalize(args, loss_scales);
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

#if defined(LRDS_WITH_CUDA)
void run_moments_cuda(const Call& call) {
  const c10::cuda::CUDAGuard guard(call.student.device());
  KdLossArgs args = call.args;
  std::size_t bytes = 0;
  C10_CUDA_CHECK(cuda::kd_moments_scratch_bytes(args, &bytes));
  const Tensor scratch =
      at::empty({static_cast<std::int64_t>(bytes)}, call.student.options().dtype(at::kByte));
  args.moments_scratch = scratch.mutable_data_ptr();
  C10_CUDA_CHECK(cuda::kd_moments(args, c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Run = void (*)(const Call&);

// Allocates the outputs of a call whose gradient is decided and runs it.
Loss run_for_loss(Call& call, const Problem& problem, Run run) {
  KdLossArgs& args = call.args;
  const at::TensorOptions accumulate = problem.student.options().dtype(call.accumulate);
  const auto rows = problem.student.sizes().slice(0, problem.student.dim() - 1);
  const bool per_row = args.reduction == Reduction::kNone;
  const auto output = [&] { return per_row ? fresh(rows, accumulate) : fresh({}, accumulate); };
  const Tensor loss = output(), ce = output(), kd = output();
  const Tensor counts = fresh({3}, accumulate.dtype(at::kLong));
  // Rows' terms that are no outputs, and flags, in one piece.
  const auto term_bytes =
      per_row ? 0 : args.rows * static_cast<std::int64_t>(elementSize(call.accumulate));
  const Tensor terms = fresh({2 * term_bytes + args.rows}, accumulate.dtype(at::kByte));
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
      const Problem problem(parameters...);
      Call call = make_call(problem);
      Tensor gradient = with_gradient ? Tensor() : fresh({0}, problem.student.options());
      if (with_gradient) {
        set_gradient(call, problem.student);
        gradient = call.gradient;
      }
      auto [loss, ce, kd, counts] = run_for_loss(call, problem, run);
      return {loss, ce, kd, counts, gradient};
    }

    // The student's logits become their gradient: for callers whose logits are a buffer of theirs.
    static Loss forward_in_place(P... parameters) {
      const Problem problem(parameters...);
      TORCH_CHECK_VALUE(problem.student.is_contiguous(), "student must be contiguous");
      Call call = make_call(problem);
      call.args.gradient = call.student.mutable_data_ptr();
      return run_for_loss(call, problem, run);
    }

    // The recompute form: the gradient from the logits again, with grad_output folded in before it
    // is rounded.
    static Tensor backward(const Tensor& grad_output, P... parameters) {
      const Problem problem(parameters...);
      Call call = make_call(problem);
      set_gradient(call, problem.student);
      set_grad_output(call, grad_output);
      run(call);
      return call.gradient;
    }

    // Rounding to 16 bits would be felt in the scores: the gradient leaves in the accumulation
    // type.
    static Tensor logit_gradient(P... parameters) {
      Problem problem(parameters...);
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

using Moments = std::tuple<Tensor, Tensor>;

// The rows' moments (core/kd_loss.h), (kMoments, rows), and the teacher's top classes, (rows,).
template <Run run>
struct MomentsOf {
  template <class... P>
  struct Of {
    static Moments call(P... parameters, const OptionalTensor& direction) {
      const Problem problem(parameters...);
      Call call = make_call(problem);
      KdLossArgs& args = call.args;
      TORCH_CHECK_VALUE(!problem.soft() && !problem.selected.has_value() &&
                            !problem.class_weight.has_value() && args.kept_classes == 0 &&
                            args.teacher_rows == args.rows && args.revise != Revise::kSwap &&
                            args.label_smoothing == 0.0,
                        "kd_moments takes class indices, a whole teacher and no selected, "
                        "class_weight, label smoothing or revise='swap'");
      const at::TensorOptions accumulate = problem.student.options().dtype(call.accumulate);
      Tensor along;
      if (direction.has_value()) {
        check_device(*direction, "direction", problem.student);
        TORCH_CHECK_VALUE(direction->dim() == 2 && direction->size(0) == args.rows &&
                              direction->size(1) == args.classes,
                          "direction must have shape (", args.rows, ", ", args.classes, "); got ",
                          direction->sizes());
        along = rows_of(direction->to(call.accumulate), args.classes);
        args.direction = along.const_data_ptr();
        args.direction_stride = along.stride(0);
      }
      const Tensor moments = at::empty({kMoments, args.rows}, accumulate);
      const Tensor top = at::empty({args.rows}, accumulate.dtype(at::kLong));
      args.moments = moments.mutable_data_ptr();
      args.teacher_top = top.mutable_data_ptr<std::int64_t>();
      run(call);
      return {moments, top};
    }
  };
};

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

template <class... P>
struct ForwardOp {
  static Forward call(P... parameters, bool with_gradient) {
    static const auto op = find<Forward(P..., bool)>("lrds_fast::kd_loss_forward");
    return op.call(parameters..., with_gradient);
  }
};

template <class... P>
struct BackwardOp {
  static Tensor call(const Tensor& grad_output, P... parameters) {
    static const auto op = find<Tensor(const Tensor&, P...)>("lrds_fast::kd_loss_backward");
    return op.call(grad_output, parameters...);
  }
};

template <class... P>
struct LogitGradientOp {
  static Tensor call(P... parameters) {
    static const auto op = find<Tensor(P...)>("lrds_fast::kd_logit_gradient");
    return op.call(parameters...);
  }
};

template <class... P>
struct CompositeOp {
  static Loss call(P... parameters) {
    static const auto op = find<Loss(P...)>("lrds_fast::kd_loss_composite");
    return op.call(parameters...);
  }
};

Forward call_forward(const Problem& problem, bool with_gradient) {
  return problem.unpack([&](const auto&... parameters) {
    return WithParameters<ForwardOp>::call(parameters..., with_gradient);
  });
}

Tensor call_backward(const Tensor& grad_output, const Problem& problem) {
  return problem.unpack([&](const auto&... parameters) {
    return WithParameters<BackwardOp>::call(grad_output, parameters...);
  });
}

Tensor call_logit_gradient(const Problem& problem) {
  return problem.unpack([](const auto&... parameters) {
    return WithParameters<LogitGradientOp>::call(parameters...);
  });
}

// The loss as PyTorch ops (lrds_fast/functional.py), which PyTorch differentiates to any order.
Loss call_composite(const Problem& problem) {
  return problem.unpack(
      [](const auto&... parameters) { return WithParameters<CompositeOp>::call(parameters...); });
}

bool has_tangent(const Tensor& tensor) { return tensor._fw_grad(/*level=*/0).defined(); }

OptionalTensor optional(const Tensor& tensor) {
  return tensor.defined() ? OptionalTensor(tensor) : std::nullopt;
}

// A tensor made under inference_mode (a teacher's output) has no version counter and cannot be
// saved for backward. A copy of it can, and so can a new tensor on the same storage, without
// detection of later changes.
bool uncounted(const Tensor& tensor) { return tensor.defined() && tensor.is_inference(); }

bool is_traced(const Tensor& tensor) { return tensor.key_set().has(c10::DispatchKey::Python); }

Tensor view_of_storage(const Tensor& tensor) {
  return at::empty({0}, tensor.options())
      .set_(tensor.storage(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
}

// A problem without its grad_scale, saved for backward. Unlike the variables of
// save_for_backward, its tensors are unpacked, and checked for in-place changes, only if they are
// used.
class Kept : public torch::CustomClassHolder {
 public:
  // copies: copies tensors without a version counter, because changes of them are not detected.
  // Traced tensors have no storage to share and are copied too.
  Kept(Problem&& problem, bool copies) : options_(std::move(problem.options)) {
    tensors_.reserve(3);  // the usual number
    const auto keep = [&](Tensor tensor) {
      if (uncounted(tensor)) {
        const bool copy = copies || is_traced(tensor);
        unversioned_ |= !copy;
        tensor = copy ? tensor.clone() : view_of_storage(tensor);
      }
      tensors_.emplace_back(tensor, /*is_output=*/false);
    };
    keep(problem.student);
    keep(problem.teacher);
    keep(problem.target);
    const OptionalTensor* const given[] = {&problem.selected,        &problem.class_weight,
                                           &problem.teacher_indices, &problem.teacher_rest,
                                           &problem.num_valid,       &problem.weight_sum};
    for (std::size_t i = 0; i < kOptional; ++i) {
      given_[i] = given[i]->has_value();
      if (given_[i]) keep(**given[i]);
    }
  }

  Problem unpack() const {
    auto saved = tensors_.begin();
    const Tensor student = saved++->unpack(), teacher = saved++->unpack(),
                 target = saved++->unpack();
    std::array<OptionalTensor, kOptional> t;
    for (std::size_t i = 0; i < kOptional; ++i) {
      if (given_[i]) t[i] = saved++->unpack();
    }
    return Problem(student, teacher, target, t[0], t[1], t[2], t[3], t[4], t[5], std::nullopt,
                   options_);
  }

  void release() { tensors_.clear(); }

  // Whether a tensor has no version counter.
  bool unversioned() const { return unversioned_; }

 private:
  static constexpr std::size_t kOptional = 6;
  std::vector<torch::autograd::SavedVariable>
      tensors_;  // those that are defined, in Problem's order
  std::array<bool, kOptional> given_;
  KdLossOptions options_;
  bool unversioned_ = false;
};

class KdLossFunction : public torch::autograd::Function<KdLossFunction> {
 public:
  // The student is an argument of its own: it is the one input that gets a gradient. The loss is
  // the one output that has one, so the others leave through `outputs`.
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& student,
                        Problem& problem, Loss& outputs) {
    // A gradient per row cannot carry grad_output yet; a float16 gradient of a mean would underflow
    // without its scale.
    const bool recompute =
        problem.options.reduction == static_cast<std::int64_t>(Reduction::kNone) ||
        (student.scalar_type() == at::kHalf && !problem.grad_scale.has_value());
    auto [loss, ce, kd, counts, gradient] = [&] {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      return call_forward(problem, !recompute);
    }();
    if (!recompute) {
      const Tensor scale = problem.grad_scale.value_or(Tensor());
      ctx->save_for_backward({gradient, uncounted(scale) ? scale.clone() : scale});
    }
    ctx->saved_data["problem"] = c10::IValue::make_capsule(
        c10::make_intrusive<Kept>(std::move(problem), /*copies=*/recompute));
    ctx->set_materialize_grads(false);
    outputs = {Tensor(), ce, kd, counts};
    return loss;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    torch::autograd::variable_list inputs(3);
    if (!grads[0].defined()) return inputs;
    const bool keep_graph = torch::autograd::get_current_graph_task_keep_graph();
    const torch::autograd::variable_list saved = ctx->get_saved_variables();
    const c10::intrusive_ptr<torch::CustomClassHolder> capsule =
        ctx->saved_data["problem"].toCapsule();
    Kept& kept = static_cast<Kept&>(*capsule);
    if (c10::GradMode::is_enabled()) {
      inputs[0] = differentiable_gradient(kept, saved, grads[0]);
    } else if (is_wrapped(grads[0])) {
      inputs[0] = linear_gradient(kept, saved, grads[0]);
    } else {
      inputs[0] = plain_gradient(kept, saved, grads[0], keep_graph);
    }
    if (!keep_graph) kept.release();
    return inputs;
  }

 private:
  // `saved` holds the gradient and its grad_scale, or nothing where the gradient is made in
  // backward.
  using Saved = torch::autograd::variable_list;

  // Whether grad_output is batched (is_grads_batched) or has a tangent: kernels cannot read it.
  static bool is_wrapped(const Tensor& grad_output) {
    constexpr c10::DispatchKeySet wrappers({c10::DispatchKey::Batched,
                                            c10::DispatchKey::FuncTorchBatched,
                                            c10::DispatchKey::FuncTorchGradWrapper});
    return grad_output.key_set().has_any(wrappers) || has_tangent(grad_output);
  }

  // The gradient by PyTorch ops of the student and grad_output, for higher-order derivatives.
  static Tensor differentiable_gradient(const Kept& kept, const Saved& saved,
                                        const Tensor& grad_output) {
    Problem problem = kept.unpack();
    if (kept.unversioned()) {
      // Compared with the gradient of the forward pass, to detect inputs that were changed since.
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      Problem again = problem;
      again.grad_scale = optional(saved[1]);
      TORCH_CHECK(
          at::allclose(std::get<4>(call_forward(again, true)), saved[0], 0.0, 0.0,
                       /*equal_nan=*/true),
          "kd_loss: teacher_logits, or another input made under torch.inference_mode(), was "
          "changed in place before a second derivative was computed from it; pass "
          "a clone() of it");
    }
    // A view, so that the student's hooks do not run here: they run in the outer backward pass.
    problem.student = problem.student.view_as(problem.student);
    const Tensor loss = std::get<0>(call_composite(problem));
    return torch::autograd::grad({loss}, {problem.student}, {grad_output}, /*retain_graph=*/true,
                                 /*create_graph=*/true)[0];
  }

  // grad_output times the gradient for a grad_output of 1, by PyTorch ops.
  static Tensor linear_gradient(const Kept& kept, const Saved& saved, const Tensor& grad_output) {
    if (saved.empty()) {
      const Problem problem = kept.unpack();
      const Tensor unit = call_logit_gradient(problem);
      return unit.mul(grad_output.unsqueeze(-1)).to(problem.student.scalar_type());
    }
    const Tensor factor = saved[1].defined() ? grad_output.div(saved[1]) : grad_output;
    return saved[0]
        .to(grad_output.scalar_type())
        .mul(factor.unsqueeze(-1))
        .to(saved[0].scalar_type());
  }

  static Tensor plain_gradient(const Kept& kept, const Saved& saved, const Tensor& grad_output,
                               bool keep_graph) {
    if (saved.empty()) {
      // Unpacked before autograd is switched off: a saved-tensor hook (activation checkpointing)
      // may run the model here.
      const Problem problem = kept.unpack();
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      return call_backward(grad_output, problem);
    }
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    Tensor gradient = saved[0];
    const OptionalTensor grad_scale = optional(saved[1]);
    // In place only for a plain tensor that nobody will ask for again: a tracer needs the
    // functional form.
    if (!is_traced(gradient) && !keep_graph) {
      static const auto in_place =
          find<void(Tensor&, const Tensor&, const OptionalTensor&)>("lrds_fast::scale_gradient_");
      in_place.call(gradient, grad_output, grad_scale);
      return gradient;
    }
    static const auto functional =
        find<Tensor(const Tensor&, const Tensor&, const OptionalTensor&)>(
            "lrds_fast::scale_gradient");
    return functional.call(gradient, grad_output, grad_scale);
  }
};

Loss without_gradient(const Problem& problem) {
  auto [loss, ce, kd, counts, gradient] = call_forward(problem, false);
  return {loss, ce, kd, counts};
}

template <class... P>
struct KdLossOp {
  static Loss without_gradient(P... parameters) {
    return lrds::without_gradient(Problem(parameters...));
  }

  static Loss autograd(P... parameters) {
    Problem problem(parameters...);
    if (has_tangent(problem.student)) return call_composite(problem);
    if (!c10::GradMode::is_enabled() || !problem.student.requires_grad()) {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      return lrds::without_gradient(problem);
    }
    // Nothing but the student gets a gradient: detached, the rest are no inputs of the graph.
    const auto detach = [](Tensor& tensor) {
      if (tensor.requires_grad()) tensor = tensor.detach();
    };
    detach(problem.teacher);
    detach(problem.target);
    for (OptionalTensor* const tensor :
         {&problem.selected, &problem.class_weight, &problem.teacher_rest, &problem.num_valid,
          &problem.weight_sum, &problem.grad_scale}) {
      if (tensor->has_value()) detach(**tensor);
    }
    Loss outputs;
    const Tensor student = problem.student;
    std::get<0>(outputs) = KdLossFunction::apply(student, problem, outputs);
    return outputs;
  }
};

using CpuOps = WithParameters<Kernels<run_cpu>::Of>;
#if defined(LRDS_WITH_CUDA)
using CudaOps = WithParameters<Kernels<run_cuda>::Of>;
#endif

}  // namespace

TORCH_LIBRARY(lrds_fast, m) {
  const auto define = [&m](const std::string& schema) { m.def(schema.c_str()); };
  const std::string parameters = kParameters;
  const std::string outputs = "Tensor loss, Tensor ce, Tensor kd, Tensor counts";
  define("kd_loss(" + parameters + ") -> (" + outputs + ")");
  define("kd_loss_composite(" + parameters + ") -> (" + outputs + ")");
  define("kd_loss_forward(" + parameters + ", bool with_gradient) -> (" + outputs +
         ", Tensor gradient)");
  define("kd_loss_forward_(Tensor(a!) " + parameters.substr(parameters.find("student")) + ") -> (" +
         outputs + ")");
  define("kd_loss_backward(Tensor grad_output, " + parameters + ") -> Tensor");
  define("kd_logit_gradient(" + parameters + ") -> Tensor");
  define("kd_moments(" + parameters + ", Tensor? direction) -> (Tensor moments, Tensor top)");
  define("scale_gradient(Tensor gradient, Tensor grad_output, Tensor? grad_scale) -> Tensor");
  define("scale_gradient_(Tensor(a!) gradient, Tensor grad_output, Tensor? grad_scale) -> ()");
}

TORCH_LIBRARY_IMPL(lrds_fast, CompositeExplicitAutograd, m) {
  m.impl("kd_loss", &WithParameters<KdLossOp>::without_gradient);
}

TORCH_LIBRARY_IMPL(lrds_fast, Autograd, m) {
  m.impl("kd_loss", &WithParameters<KdLossOp>::autograd);
  for (const char* name :
       {"kd_loss_forward", "kd_loss_forward_", "kd_loss_backward", "scale_gradient",
        "scale_gradient_", "kd_logit_gradient", "kd_moments"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(lrds_fast, CPU, m) {
  m.impl("kd_loss_forward", &CpuOps::forward);
  m.impl("kd_loss_forward_", &CpuOps::forward_in_place);
  m.impl("kd_loss_backward", &CpuOps::backward);
  m.impl("kd_logit_gradient", &CpuOps::logit_gradient);
  m.impl("kd_moments", &WithParameters<MomentsOf<run_cpu>::Of>::call);
  m.impl("scale_gradient", &scale_gradient<scale_into_cpu>);
  m.impl("scale_gradient_", &scale_gradient_<scale_into_cpu>);
}

#if defined(LRDS_WITH_CUDA)
TORCH_LIBRARY_IMPL(lrds_fast, CUDA, m) {
  m.impl("kd_loss_forward", &CudaOps::forward);
  m.impl("kd_loss_forward_", &CudaOps::forward_in_place);
  m.impl("kd_loss_backward", &CudaOps::backward);
  m.impl("kd_logit_gradient", &CudaOps::logit_gradient);
  m.impl("kd_moments", &WithParameters<MomentsOf<run_moments_cuda>::Of>::call);
  m.impl("scale_gradient", &scale_gradient<scale_into_cuda>);
  m.impl("scale_gradient_", &scale_gradient_<scale_into_cuda>);
}
#endif

}  // namespace lrds
