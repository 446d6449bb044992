#include "torch/problem.h"

#include <ATen/Parallel.h>
#include <ATen/core/Formatting.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>

#include "core/divergences.h"
#include "cpu/kd_loss.h"

namespace lrds {
namespace {

const void* pointer_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

void set_target(Call& call, const Problem& problem) {
  KdLossArgs& args = call.args;
  const Tensor& target = problem.target;
  check_device(target, "target", problem.student);
  args.ignore_index = problem.ignore_index;
  if (problem.has_soft_target()) {
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

// The teacher's logits: of all classes, or of the kept classes of a cached teacher.
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
                    "teacher_rest must be given with teacher_indices; got None");
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

void set_options(KdLossArgs& args, const Problem& problem) {
  const std::size_t temperatures = problem.temperature.size();
  TORCH_CHECK_VALUE(temperatures >= 1 && temperatures <= static_cast<std::size_t>(kMaxTemperatures),
                    "temperature must be one number or up to ", kMaxTemperatures, "; got ",
                    temperatures);
  TORCH_CHECK_VALUE(problem.divergence_parameters.size() == 3,
                    "divergence_parameters must be three numbers; got ",
                    problem.divergence_parameters.size());
  TORCH_CHECK_VALUE(problem.divergence >= 0 && problem.divergence < Divergences::kCount,
                    "divergence must be a code in [0, ", Divergences::kCount, "); got ",
                    problem.divergence);
  args.temperature = problem.temperature[0];
  args.temperature_count = static_cast<std::int32_t>(temperatures);
  std::copy(problem.temperature.begin(), problem.temperature.end(), args.temperatures);
  args.ce_weight = problem.ce_weight;
  args.ce_weight_unselected = problem.ce_weight_unselected;
  args.kd_weight = problem.kd_weight;
  TORCH_CHECK_VALUE(
      problem.revise_temperature >= 0.0,
      "revise_temperature must be > 0, or 0 for the temperature of the divergence; got ",
      problem.revise_temperature);
  args.eta = problem.eta;
  args.revise_temperature = problem.revise_temperature;
  args.label_smoothing = problem.label_smoothing;
  args.revise = static_cast<Revise>(problem.revise);
  args.reduction = static_cast<Reduction>(problem.reduction);
  args.divergence = static_cast<std::int32_t>(problem.divergence);
  std::copy(problem.divergence_parameters.begin(), problem.divergence_parameters.end(),
            args.divergence_parameters);
  args.standardize = problem.standardize;
}

std::int64_t target_at(const Call& call, std::int64_t row) {
  return call.args.target_is_int64 ? call.target.const_data_ptr<std::int64_t>()[row]
                                   : call.target.const_data_ptr<std::int32_t>()[row];
}

// 1 / denominator of each term, without grad_scale.
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

}  // namespace

std::string schema_parameters(std::size_t first) {
  std::string text;
  std::size_t index = 0;
  const auto add = [&]<class T>(const Parameter<T>& parameter) {
    if (index++ < first) return;
    if (!text.empty()) text += ", ";
    text += Argument<T>::kSchema;
    text += ' ';
    text += parameter.name;
  };
  std::apply([&](const auto&... parameters) { (add(parameters), ...); }, kParameters);
  return text;
}

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

double host_scalar(const Tensor& tensor) {
  return tensor.scalar_type() == at::kDouble ? *tensor.const_data_ptr<double>()
                                             : *tensor.const_data_ptr<float>();
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
  set_options(args, problem);

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

void run_cpu(const Call& call) {
  const KdLossArgs& args = call.args;
  const TermScales loss_scales = term_scales_cpu(call);
  const double grad_scale = args.grad_scale != nullptr ? host_scalar(call.grad_scale) : 1.0;
  const TermScales scales{loss_scales.ce * grad_scale, loss_scales.kd * grad_scale};

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

}  // namespace lrds
