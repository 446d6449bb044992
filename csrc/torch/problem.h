// The arguments of the loss operators: their schema, their checks, and the plain struct that the
// kernels take.
//
// A parameter of the operators is a field of Problem and its line in kParameters. The schema, the
// C++ signatures, the calls through the dispatcher and what autograd saves follow from the two.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "core/kd_loss.h"

namespace lrds {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments of one call. lrds_fast/functional.py has their meaning and their defaults.
struct Problem {
  Tensor student;                  // (..., C)
  Tensor teacher;                  // (..., C), or the kept logits (..., K) of a cached teacher
  Tensor target;                   // (...) class indices, or (..., C) probabilities
  OptionalTensor selected;         // (...)
  OptionalTensor class_weight;     // (C,)
  OptionalTensor teacher_indices;  // (..., K): the classes of a cached teacher's logits
  OptionalTensor teacher_rest;     // (...): logsumexp(v / T) over the other classes
  OptionalTensor num_valid;        // one number
  OptionalTensor weight_sum;       // one number
  OptionalTensor grad_scale;       // one number
  std::vector<double> temperature;
  double ce_weight;
  double kd_weight;
  double ce_weight_unselected;
  double eta;
  double revise_temperature;  // 0: the temperature of the divergence
  double label_smoothing;
  std::int64_t revise;     // a code of Revise
  std::int64_t reduction;  // a code of Reduction
  std::int64_t ignore_index;
  std::int64_t divergence;  // an index into Divergences
  std::vector<double> divergence_parameters;
  bool standardize;

  bool has_soft_target() const { return at::isFloatingType(target.scalar_type()); }
};

template <class T>
struct Parameter {
  const char* name;
  T Problem::* field;
};

// The parameters of the operators, in the order of the schemas.
#define LRDS_PARAMETER(name) \
  Parameter<decltype(Problem::name)> { #name, &Problem::name }
inline constexpr std::tuple kParameters{
    LRDS_PARAMETER(student),
    LRDS_PARAMETER(teacher),
    LRDS_PARAMETER(target),
    LRDS_PARAMETER(selected),
    LRDS_PARAMETER(class_weight),
    LRDS_PARAMETER(teacher_indices),
    LRDS_PARAMETER(teacher_rest),
    LRDS_PARAMETER(num_valid),
    LRDS_PARAMETER(weight_sum),
    LRDS_PARAMETER(grad_scale),
    LRDS_PARAMETER(temperature),
    LRDS_PARAMETER(ce_weight),
    LRDS_PARAMETER(kd_weight),
    LRDS_PARAMETER(ce_weight_unselected),
    LRDS_PARAMETER(eta),
    LRDS_PARAMETER(revise_temperature),
    LRDS_PARAMETER(label_smoothing),
    LRDS_PARAMETER(revise),
    LRDS_PARAMETER(reduction),
    LRDS_PARAMETER(ignore_index),
    LRDS_PARAMETER(divergence),
    LRDS_PARAMETER(divergence_parameters),
    LRDS_PARAMETER(standardize),
};
#undef LRDS_PARAMETER

// How the dispatcher passes a field of type T, and what a schema calls that type.
template <class T>
struct Argument;
template <>
struct Argument<Tensor> {
  using Type = const Tensor&;
  static constexpr const char* kSchema = "Tensor";
};
template <>
struct Argument<OptionalTensor> {
  using Type = const OptionalTensor&;
  static constexpr const char* kSchema = "Tensor?";
};
template <>
struct Argument<std::vector<double>> {
  using Type = at::ArrayRef<double>;
  static constexpr const char* kSchema = "float[]";
};
template <>
struct Argument<double> {
  using Type = double;
  static constexpr const char* kSchema = "float";
};
template <>
struct Argument<std::int64_t> {
  using Type = std::int64_t;
  static constexpr const char* kSchema = "int";
};
template <>
struct Argument<bool> {
  using Type = bool;
  static constexpr const char* kSchema = "bool";
};

template <template <class...> class T, class... Fields>
T<typename Argument<Fields>::Type...> with_parameters(const std::tuple<Parameter<Fields>...>&);

// T<const Tensor&, const Tensor&, ..., bool>: T of the types of the operators' parameters.
template <template <class...> class T>
using WithParameters = decltype(with_parameters<T>(kParameters));

inline void set_field(std::vector<double>& field, at::ArrayRef<double> argument) {
  field.assign(argument.begin(), argument.end());
}
template <class T>
void set_field(T& field, const T& argument) {
  field = argument;
}

// A Problem from an operator's arguments.
template <class... Arguments>
Problem make_problem(const Arguments&... arguments) {
  Problem problem{};
  std::apply(
      [&](const auto&... parameters) { (set_field(problem.*(parameters.field), arguments), ...); },
      kParameters);
  return problem;
}

// f(student, teacher, ...): f of every field in the order of the schemas.
template <class F>
auto apply_to_fields(const Problem& problem, const F& f) {
  return std::apply([&](const auto&... parameters) { return f(problem.*(parameters.field)...); },
                    kParameters);
}

// f(tensor) for every tensor that the call has.
template <class P, class F>
void for_each_tensor(P& problem, const F& f) {
  const auto visit = [&](auto& field) {
    using Field = std::remove_cvref_t<decltype(field)>;
    if constexpr (std::is_same_v<Field, Tensor>) {
      f(field);
    } else if constexpr (std::is_same_v<Field, OptionalTensor>) {
      if (field.has_value()) f(*field);
    }
  };
  std::apply([&](const auto&... parameters) { (visit(problem.*(parameters.field)), ...); },
             kParameters);
}

// "Tensor student, Tensor teacher, ...", from the parameter `first` on.
std::string schema_parameters(std::size_t first = 0);

// The kernels' arguments and the tensors that their pointers point into. Everything that a launch
// reads or writes lives here until it is enqueued.
struct Call {
  KdLossArgs args{};
  at::ScalarType accumulate = at::kFloat;
  Tensor student, teacher, target, selected, class_weight, teacher_indices, teacher_rest, num_valid,
      weight_sum, grad_scale, grad_output, gradient;
};

// Runs the row kernels of a call on a device.
using Run = void (*)(const Call&);

// Checks a problem (ValueError, TypeError) and brings its tensors into the layout of the kernels.
// The outputs are the caller's to set.
Call make_call(const Problem& problem);

// The Run of the CPU: sweeps the rows and, where args.counts is set, reduces the loss.
void run_cpu(const Call& call);

DType dtype_of(const Tensor& tensor, const char* name);
void check_device(const Tensor& tensor, const char* name, const Tensor& student);

// (..., classes) as (rows, classes) with a last stride of 1.
Tensor rows_of(const Tensor& logits, std::int64_t classes);

// An optional tensor of one number in the accumulation type; undefined for none.
Tensor scalar_on(const OptionalTensor& value, const char* name, const Tensor& student,
                 at::ScalarType accumulate);

// The number in a CPU tensor of type double or float.
double host_scalar(const Tensor& tensor);

}  // namespace lrds
