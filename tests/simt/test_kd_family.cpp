// Runs the CUDA kernels of csrc/cuda/kd_family* in the interpreter and compares them with the CPU's
// float64 sweep of the same rows, which the Python tests compare with lrds_fast.reference.
//   simt_kd_family [PART PARTS]   every PARTS-th case, from PART on
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "core/divergences.h"
#include "cpu/kd_loss.h"
#include "cuda/kd_loss.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "simt.h"

namespace {

using lrds::DType;
using lrds::KdLossArgs;
using lrds::Reduction;
using lrds::Revise;
using lrds::SelectedType;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();

const char* name_of(DType type) {
  constexpr const char* kNames[] = {"f64", "f32", "bf16", "f16"};
  return kNames[static_cast<int>(type)];
}

std::size_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

template <class D, class... Ds>
constexpr int index_in(lrds::DivergenceList<Ds...>) {
  int index = 0;
  bool is_found = false;
  ((is_found = is_found || std::is_same_v<D, Ds>, index += is_found ? 0 : 1), ...);
  return index;
}

// The code of a divergence.
template <class D>
constexpr int code_of = index_in<D>(lrds::Divergences());

// Values of a type known at run time, in exactly the memory that they need.
class Buffer {
 public:
  Buffer(DType type, std::size_t count, int poison = 0xff)
      : type_(type), bytes_(count * size_of(type), static_cast<unsigned char>(poison)) {}
  // Rounds `values` to the type, in place too.
  Buffer(DType type, std::vector<double>& values) : Buffer(type, values.size()) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      set(i, values[i]);
      values[i] = get(i);
    }
  }
  void* data() { return bytes_.data(); }
  const std::vector<unsigned char>& bytes() const { return bytes_; }
  void set(std::size_t i, double x) {
    switch (type_) {
      case DType::kFloat64:
        return put(i, x);
      case DType::kFloat32:
        return put(i, static_cast<float>(x));
      case DType::kBFloat16:
        return put(i, __float2bfloat16_rn(static_cast<float>(x)));
      case DType::kFloat16:
        return put(i, __float2half_rn(static_cast<float>(x)));
    }
  }
  double get(std::size_t i) const {
    switch (type_) {
      case DType::kFloat64:
        return take<double>(i);
      case DType::kFloat32:
        return take<float>(i);
      case DType::kBFloat16:
        return __bfloat162float(take<__nv_bfloat16>(i));
      default:
        return __half2float(take<__half>(i));
    }
  }

 private:
  template <class T>
  void put(std::size_t i, T x) {
    std::memcpy(bytes_.data() + i * sizeof x, &x, sizeof x);
  }
  template <class T>
  T take(std::size_t i) const {
    T x;
    std::memcpy(&x, bytes_.data() + i * sizeof x, sizeof x);
    return x;
  }
  DType type_;
  std::vector<unsigned char> bytes_;
};

struct Case {
  int divergence = 0;
  Revise revise = Revise::kLabelRevision;
  double revise_temperature = 0.0;
  DType student = DType::kFloat32;
  DType teacher = DType::kFloat32;
  std::size_t classes = 33;
  bool soft = false;
  bool standardize = false;
  bool weighted = false;
  double label_smoothing = 0.0;
  std::vector<double> temperatures = {4.0};
  std::size_t kept = 0;
  Reduction reduction = Reduction::kMean;
  bool scalars = false;  // whether num_valid, weight_sum and grad_scale are passed
  bool per_row = false;  // grad_output of each row (Reduction::kNone), without the loss
  bool in_place = false;
  int teacher_rows = -1;  // length of the teacher prefix; -1: all rows
  int device = 0;

  std::string text() const {
    char line[256];
    std::snprintf(line, sizeof line,
                  "divergence %d revise %d at %g %s/%s C=%zu%s%s%s smoothing %g T=%g x%zu kept %zu "
                  "reduction %d%s%s%s "
                  "prefix %d device %d",
                  divergence, static_cast<int>(revise), revise_temperature, name_of(student),
                  name_of(teacher), classes, soft ? " soft" : "",
                  standardize ? " standardized" : "", weighted ? " weighted" : "", label_smoothing,
                  temperatures[0], temperatures.size(), kept, static_cast<int>(reduction),
                  scalars ? " scalars" : "", per_row ? " per row" : "", in_place ? " in place" : "",
                  teacher_rows, device);
    return line;
  }
};

constexpr std::size_t kRows = 8;

// Row 0 has edge values (see edges), row 1 is ignored and full of NaN, row 2 is unselected with a
// NaN teacher, in row 3 the teacher is right, row 4 is half selected, row 5 has a target out of
// range, in row 6 the student equals the teacher, row 7 is ordinary.
struct Problem {
  std::vector<double> student, teacher, values, soft, class_weight, rest, selected, grad_output;
  std::vector<std::int64_t> target, indices;
};

Problem make_problem(const Case& c) {
  std::mt19937 random(static_cast<unsigned>(c.classes * 31 + c.kept));
  std::normal_distribution<double> normal;
  Problem p;
  const std::size_t n = kRows * c.classes;
  for (std::size_t i = 0; i < n; ++i) p.student.push_back(2.0 * normal(random));
  for (std::size_t i = 0; i < n; ++i) p.teacher.push_back(3.0 * normal(random));
  for (std::size_t row = 0; row < kRows; ++row) {
    p.target.push_back(static_cast<std::int64_t>(random() % c.classes));
    const double share = row % 2 == 0 ? 0.7 : 1.0;
    for (std::size_t k = 0; k < c.classes; ++k) {
      const bool first = k == static_cast<std::size_t>(p.target[row]),
                 next = k == (p.target[row] + 1) % c.classes;
      p.soft.push_back((first ? share : 0.0) + (next ? 1.0 - share : 0.0));
    }
    p.grad_output.push_back(0.5 + 0.25 * static_cast<double>(row));
  }
  for (std::size_t k = 0; k < c.classes; ++k)
    p.class_weight.push_back(0.5 + static_cast<double>(k % 7) / 4.0);
  p.selected = {1, 1, 0, 1, 0.5, 1, 1, 1};
  for (std::size_t k = 0; k < c.classes; ++k) {
    if (k == static_cast<std::size_t>(p.target[3])) p.teacher[3 * c.classes + k] = 12.0;
    p.student[6 * c.classes + k] = p.teacher[6 * c.classes + k];
    // A swap leaves the other classes equal up to rounding, whose sign is the gradient of Tvd.
    if (c.divergence == code_of<lrds::Tvd> && c.revise == Revise::kSwap)
      p.student[6 * c.classes + k] += 0.5 * normal(random);
  }
  return p;
}

// A teacher far from 0, with two top classes above the label, one class whose exponential is at the
// end of float's range, and one that both networks exclude (not with standardisation).
void edges(const Case& c, Problem& p) {
  if (c.classes < 8) return;
  const auto at = [&](std::size_t i) {
    return (static_cast<std::size_t>(p.target[0]) + i) % c.classes;
  };
  // MSE of the logits: its rounding error would be that of the offset
  const double offset = c.divergence == code_of<lrds::MseLogits> ? 0.0 : 1000.0;
  for (std::size_t k = 0; k < c.classes; ++k) p.teacher[k] += offset;
  p.teacher[at(1)] = p.teacher[at(2)] = offset + 16.0;
  p.teacher[at(3)] = offset + 16.0 - 87.0 * c.temperatures[0];
  if (!c.standardize) p.student[at(4)] = p.teacher[at(4)] = -kInf;
}

void poison(const Case& c, Problem& p) {
  for (std::size_t k = 0; k < c.classes; ++k) {
    if (!c.soft) p.student[1 * c.classes + k] = p.teacher[1 * c.classes + k] = kNan;
    p.teacher[2 * c.classes + k] = kNan;
  }
  if (!c.soft) p.target[1] = -100;
}

// The largest logits of every row, their classes, and logsumexp(v / T) of the other classes.
void cache(const Case& c, Problem& p) {
  for (std::size_t row = 0; row < kRows; ++row) {
    std::vector<std::int64_t> order(c.classes);
    std::iota(order.begin(), order.end(), 0);
    const double* const v = &p.teacher[row * c.classes];
    std::sort(order.begin(), order.end(), [&](auto a, auto b) { return v[a] > v[b]; });
    double sum = 0.0;
    for (std::size_t i = c.kept; i < c.classes; ++i)
      sum += std::exp(v[order[i]] / c.temperatures[0]);
    p.rest.push_back(std::log(sum));
    for (std::size_t i = 0; i < c.kept; ++i) {
      p.indices.push_back(order[i]);
      p.values.push_back(row == 2 ? kNan : v[order[i]]);
    }
  }
}

int failures = 0;

void report(const Case& c, const char* what, std::size_t row, std::size_t k, double got,
            double expected) {
  if (++failures <= 20) {
    std::printf("%s: %s[%zu, %zu] is %.9g, expected %.9g\n", c.text().c_str(), what, row, k, got,
                expected);
  }
}

bool close(double got, double expected, double most) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return got == expected;
  return std::fabs(got - expected) <= most;
}

void run(const Case& c) {
  Problem p = make_problem(c);
  edges(c, p);
  const bool wide = c.student == DType::kFloat64 || c.teacher == DType::kFloat64;
  const DType accumulate = wide ? DType::kFloat64 : DType::kFloat32;
  if (c.kept > 0) {
    // Before poison(): the cached logits and their rest must be a distribution.
    cache(c, p);
  }
  poison(c, p);
  Buffer student(c.student, p.student);
  Buffer teacher(c.teacher, c.kept > 0 ? p.values : p.teacher);
  Buffer soft(accumulate, p.soft), class_weight(accumulate, p.class_weight),
      selected(accumulate, p.selected);
  Buffer rest(accumulate, p.rest), grad_output(accumulate, p.grad_output);
  const double num_valid_value = 5.0, weight_sum_value = 3.0, grad_scale_value = 2.0;
  Buffer num_valid(accumulate, 1), weight_sum(accumulate, 1), grad_scale(accumulate, 1);
  num_valid.set(0, num_valid_value);
  weight_sum.set(0, weight_sum_value);
  grad_scale.set(0, grad_scale_value);

  KdLossArgs args{};
  args.rows = kRows;
  args.classes = static_cast<std::int64_t>(c.classes);
  args.student_stride = args.classes;
  args.student_type = c.student;
  args.teacher_type = c.teacher;
  args.teacher_stride = c.kept > 0 ? static_cast<std::int64_t>(c.kept) : args.classes;
  args.teacher_rows = c.teacher_rows >= 0 ? c.teacher_rows : static_cast<std::int64_t>(kRows);
  args.accumulate = accumulate;
  args.target_is_int64 = true;
  args.ignore_index = -100;
  args.selected_type = c.teacher_rows >= 0 ? SelectedType::kPrefix
                       : wide              ? SelectedType::kFloat64
                                           : SelectedType::kFloat32;
  args.temperature = c.temperatures[0];
  args.temperature_count = static_cast<std::int32_t>(c.temperatures.size());
  std::copy(c.temperatures.begin(), c.temperatures.end(), args.temperatures);
  args.ce_weight = 0.3;
  args.ce_weight_unselected = 1.0;
  args.kd_weight = 0.9;
  args.eta = 0.7;
  args.label_smoothing = c.label_smoothing;
  args.revise = c.revise;
  args.revise_temperature = c.revise_temperature;
  args.reduction = c.reduction;
  args.divergence = c.divergence;
  const double parameters[] = {1.5, 2.5, 2.0};
  std::copy(parameters, parameters + 3, args.divergence_parameters);
  if (c.divergence == code_of<lrds::Jsd> || c.divergence == code_of<lrds::Skl> ||
      c.divergence == code_of<lrds::Srkl>)
    args.divergence_parameters[0] = 0.3;  // the weight of the mixture
  args.standardize = c.standardize;
  args.kept_classes = static_cast<std::int64_t>(c.kept);

  // --- Expected: the CPU in float64, rows and gradients without denominators ---
  std::vector<double> ce(kRows, 0.0), kd(kRows, 0.0), gradient(kRows * c.classes, 0.0);
  std::vector<std::uint8_t> flags(kRows, 0);
  std::int64_t counts[3] = {};
  const bool bad_row = !c.soft;
  const std::int64_t good_target = p.target[5];
  double valid = 0.0, weights = 0.0;
  KdLossArgs exact = args;
  exact.accumulate = exact.student_type = exact.teacher_type = DType::kFloat64;
  exact.student = p.student.data();
  exact.teacher = c.kept > 0 ? p.values.data() : p.teacher.data();
  exact.target = p.target.data();
  exact.soft_target = c.soft ? p.soft.data() : nullptr;
  exact.class_weight = c.weighted ? p.class_weight.data() : nullptr;
  exact.selected = p.selected.data();
  if (exact.selected_type == SelectedType::kFloat32) exact.selected_type = SelectedType::kFloat64;
  exact.teacher_indices = p.indices.data();
  exact.teacher_rest = p.rest.data();
  exact.gradient = gradient.data();
  exact.ce = ce.data();
  exact.kd = kd.data();
  exact.flags = flags.data();
  exact.counts = counts;
  for (std::size_t row = 0; row < kRows; ++row) {
    const bool counted = c.soft || p.target[row] != args.ignore_index;
    valid += counted;
    if (counted && c.weighted && !(bad_row && row == 5))
      weights += p.class_weight[static_cast<std::size_t>(p.target[row])];
  }
  lrds::TermScales scales{1.0, 1.0};
  if (c.reduction == Reduction::kMean || c.reduction == Reduction::kElementMean) {
    const double rows = c.scalars ? num_valid_value : valid;
    scales.kd = lrds::reduction_scale<double>(c.reduction, rows, static_cast<double>(c.classes));
    scales.ce = scales.kd;
    if (c.reduction == Reduction::kMean && c.weighted && !c.soft) {
      scales.ce = 1.0 / (c.scalars ? weight_sum_value : weights);
    }
  }
  lrds::TermScales gradient_scales = scales;
  if (c.scalars) {
    gradient_scales.ce *= grad_scale_value;
    gradient_scales.kd *= grad_scale_value;
  }
  const std::size_t scratch_bytes =
      static_cast<std::size_t>(lrds::cpu::detail::kFamilyScratchRows) *
      static_cast<std::size_t>(lrds::cpu::detail::family_padded(args.classes)) * 8;
  void* const scratch = std::aligned_alloc(64, (scratch_bytes + 63) / 64 * 64);
  const lrds::cpu::RowError error =
      lrds::cpu::detail::kd_family_rows_double(exact, gradient_scales, 0, kRows, scratch);
  std::free(scratch);
  if (error.kind != lrds::cpu::RowError::kNone) {
    std::printf("%s: the CPU refuses row %lld\n", c.text().c_str(),
                static_cast<long long>(error.row));
    std::exit(1);
  }
  if (bad_row) {
    // The CPU refuses an invalid row; CUDA makes it NaN.
    p.target[5] = args.classes;
    ce[5] = kd[5] = kNan;
    std::fill_n(&gradient[5 * c.classes], c.classes, kNan);
    flags[5] &= static_cast<std::uint8_t>(~lrds::kRowRevised);
  }

  // --- CUDA, twice: with another order of threads and other initial outputs ---
  args.target = p.target.data();
  args.soft_target = c.soft ? soft.data() : nullptr;
  args.class_weight = c.weighted ? class_weight.data() : nullptr;
  args.selected = selected.data();
  args.teacher = teacher.data();
  args.teacher_indices = p.indices.data();
  args.teacher_rest = rest.data();
  args.num_valid = c.scalars ? num_valid.data() : nullptr;
  args.weight_sum = c.scalars ? weight_sum.data() : nullptr;
  args.grad_scale = c.scalars ? grad_scale.data() : nullptr;
  std::vector<double> workspace(2);  // no case has rows for several finalize blocks
  args.workspace = workspace.data();
  std::vector<std::vector<unsigned char>> first;
  for (const simt::Order order : {simt::Order::kForward, simt::Order::kShuffled}) {
    const int poison_byte = order == simt::Order::kForward ? 0xff : 0x5a;
    Buffer logits = student;
    Buffer g(c.student, kRows * c.classes, poison_byte), out_ce(accumulate, kRows, poison_byte),
        out_kd(accumulate, kRows, poison_byte);
    Buffer loss(accumulate, c.reduction == Reduction::kNone ? kRows : 1, poison_byte),
        loss_ce(accumulate, 1, poison_byte), loss_kd(accumulate, 1, poison_byte);
    std::vector<std::uint8_t> out_flags(kRows, static_cast<std::uint8_t>(poison_byte));
    std::int64_t out_counts[3] = {-1, -1, -1};
    args.student = logits.data();
    args.gradient = c.in_place ? logits.data() : g.data();
    if (c.per_row) {
      args.grad_output = grad_output.data();
      args.grad_output_stride = 1;
      args.counts = nullptr;
    } else {
      args.ce = out_ce.data();
      args.kd = out_kd.data();
      args.flags = out_flags.data();
      args.loss = loss.data();
      args.loss_ce = loss_ce.data();
      args.loss_kd = loss_kd.data();
      args.counts = out_counts;
    }
    simt::set_device(c.device);
    simt::set_order(order, 7);
    if (const cudaError_t status = lrds::cuda::kd_loss(args, nullptr); status != cudaSuccess) {
      std::printf("%s: launch failed with %d\n", c.text().c_str(), static_cast<int>(status));
      std::exit(1);
    }
    Buffer& written = c.in_place ? logits : g;
    std::vector<std::vector<unsigned char>> bits = {written.bytes()};
    if (!c.per_row) bits.insert(bits.end(), {out_ce.bytes(), out_kd.bytes(), loss.bytes()});
    if (first.empty()) {
      first = bits;
    } else if (first != bits) {
      report(c, "bits between two runs", 0, 0, 0, 1);
    }
    const double t = *std::max_element(c.temperatures.begin(), c.temperatures.end());
    const double loss_tolerance = wide ? 1e-11 : 2e-5;
    double sum = 0.0;
    for (std::size_t row = 0; row < kRows && !c.per_row; ++row) {
      const double size =
          t * t +
          (std::isfinite(ce[row] + kd[row]) ? std::fabs(ce[row]) + std::fabs(kd[row]) : 0.0);
      if (!close(out_ce.get(row), ce[row], loss_tolerance * size))
        report(c, "ce", row, 0, out_ce.get(row), ce[row]);
      if (!close(out_kd.get(row), kd[row], loss_tolerance * size))
        report(c, "kd", row, 0, out_kd.get(row), kd[row]);
      if (out_flags[row] != flags[row]) report(c, "flags", row, 0, out_flags[row], flags[row]);
      sum += ce[row] * scales.ce + kd[row] * scales.kd;
      if (c.reduction == Reduction::kNone &&
          !close(loss.get(row), ce[row] + kd[row], 2 * loss_tolerance * size)) {
        report(c, "loss", row, 0, loss.get(row), ce[row] + kd[row]);
      }
    }
    if (!c.per_row && c.reduction != Reduction::kNone) {
      if (!close(loss.get(0), sum, loss_tolerance * (t * t + std::fabs(sum))))
        report(c, "loss", 0, 0, loss.get(0), sum);
      if (out_counts[0] != static_cast<std::int64_t>(valid))
        report(c, "n_valid", 0, 0, double(out_counts[0]), valid);
    }
    const double rounding = c.student == DType::kBFloat16  ? 5e-3
                            : c.student == DType::kFloat16 ? 1e-3
                            : wide                         ? 1e-10
                                                           : 5e-5;
    for (std::size_t row = 0; row < kRows; ++row) {
      const double by = c.per_row ? p.grad_output[row] : 1.0;
      double largest = 0.0;
      for (std::size_t k = 0; k < c.classes; ++k) {
        const double x = std::fabs(gradient[row * c.classes + k]);
        largest = x > largest ? x : largest;
      }
      // Standardisation multiplies rounding errors of cancelling sums by 1 / std, about 1/2 here.
      const double size = largest + 0.05 * t * std::max(gradient_scales.ce, gradient_scales.kd);
      for (std::size_t k = 0; k < c.classes; ++k) {
        const double expected = gradient[row * c.classes + k] * by;
        const double got = written.get(row * c.classes + k);
        if (!close(got, expected, rounding * size * by + 6e-8))
          report(c, "gradient", row, k, got, expected);
      }
    }
  }
  p.target[5] = good_target;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const DType types[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16, DType::kFloat64};
  const std::size_t sizes[] = {33, 5, 100, 2, 1};
  int turn = 0;
  for (int divergence = 0; divergence < lrds::Divergences::kCount; ++divergence) {
    // Every divergence with every option; types, sizes and reductions alternate.
    for (int option = 0; option < 18; ++option, ++turn) {
      Case c;
      c.divergence = divergence;
      c.student = c.teacher = types[turn % 4];
      c.classes = sizes[turn % 5];
      c.reduction = static_cast<Reduction>(turn % 4);
      switch (option) {
        case 0:
          c.revise = Revise::kMft;
          break;
        case 1:
          c.revise = Revise::kSwap;
          c.classes = 33;
          break;
        case 2:
          c.revise = Revise::kNone;
          c.temperatures = {1.0, 2.5, 4.0};
          break;
        case 3:
          c.soft = true;
          break;
        case 4:
          c.soft = true;
          c.classes = 100;
          c.weighted = true;
          c.label_smoothing = 0.1;
          break;
        case 5:
          c.standardize = true;
          c.classes = 33;
          break;
        case 6:
          c.standardize = true;
          c.classes = 100;
          c.temperatures = {2.0, 3.0};
          c.label_smoothing = 0.2;
          break;
        case 7:
          c.weighted = true;
          c.reduction = Reduction::kMean;
          break;
        case 8:
          c.weighted = true;
          c.scalars = true;
          c.label_smoothing = 0.1;
          c.reduction = Reduction::kMean;
          break;
        case 9:
          c.classes = 33;
          c.kept = 4;
          c.revise = Revise::kSwap;
          break;
        case 10:
          c.classes = 33;
          c.kept = 33;
          c.teacher_rows = 5;
          c.temperatures = {2.0};
          break;
        case 11:
          c.reduction = Reduction::kNone;
          c.per_row = true;
          c.standardize = divergence % 2 == 0;
          c.classes = 33;
          break;
        case 12:
          c.in_place = true;
          c.temperatures = {1.0, 4.0};
          break;
        case 13:
          c.teacher = c.student == DType::kFloat32 ? DType::kBFloat16 : DType::kFloat32;
          c.revise = Revise::kMft;
          break;
        case 14:
          c.revise_temperature = 1.0;
          c.temperatures = {1.0, 4.0};
          break;
        case 15:
          c.revise = Revise::kMft;
          c.revise_temperature = 6.0;
          c.standardize = true;
          c.classes = 33;
          break;
        case 16:
          c.soft = true;
          c.revise_temperature = 1.5;
          c.classes = 33;
          break;
        case 17:
          c.classes = 33;
          c.kept = 4;
          c.revise_temperature = 1.0;
          break;
        default:
          std::fprintf(stderr, "option %d has no case\n", option);
          std::exit(1);
      }
      // KL with label revision alone is the default loss, which has other kernels.
      if (divergence == 0 && c.revise == Revise::kLabelRevision && c.temperatures.size() == 1 &&
          !c.soft && !c.standardize && !c.weighted && c.kept == 0) {
        c.revise = Revise::kMft;
      }
      all.push_back(c);
    }
    // The simple kernel: 1 to 32 lanes per row, or a block; rows of whole quads and others; several
    // rows per block (device 2 has room for two blocks).
    for (int option = 0; option < 6; ++option, ++turn) {
      constexpr std::size_t kSizes[] = {10, 64, 1000, 1001, 1500, 1030};
      Case c;
      c.divergence = divergence;
      c.classes = kSizes[option];
      c.device = option >= 4 ? 2 : 0;
      c.student = c.teacher = types[turn % 3];
      c.revise = divergence == 0 || option == 2 ? Revise::kMft : Revise::kLabelRevision;
      c.revise_temperature = option % 2 == 1 ? 1.0 : 0.0;
      c.in_place = option == 3;
      c.teacher_rows = option == 1 ? 5 : -1;
      c.reduction = static_cast<Reduction>(turn % 4);
      all.push_back(c);
    }
    // Rows that do not fit in shared memory: device 1 has 4 KiB.
    for (int option = 0; option < 4; ++option, ++turn) {
      Case c;
      c.divergence = divergence;
      c.device = 1;
      c.classes = 700;
      c.student = c.teacher = types[turn % 4];
      c.revise = option == 0 ? Revise::kSwap : option == 1 ? Revise::kMft : Revise::kLabelRevision;
      c.soft = option == 2;
      c.standardize = option == 3;
      c.in_place = option == 1;
      if (option == 3) c.kept = 6;
      all.push_back(c);
    }
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const std::size_t part = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 0;
  const std::size_t parts = argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 1;
  const std::vector<Case> all = cases();
  std::size_t ran = 0;
  for (std::size_t i = part; i < all.size(); i += parts, ++ran) run(all[i]);
  std::printf("%zu cases, %d failures\n", ran, failures);
  return failures == 0 ? 0 : 1;
}
