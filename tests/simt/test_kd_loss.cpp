// Runs the CUDA kernels of kd_loss and scale_gradient in the interpreter and compares them with
// reference.h.
//   simt_kd_loss [PART PARTS [GROUP]]    every PARTS-th case, from PART on; of one group only
//   SIMT_TIMES=1                         prints how long each case took
#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/kd_loss.h"
#include "cuda/kd_loss_plan.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "reference.h"
#include "simt.h"

namespace {

using lrds::DType;
using lrds::KdLossArgs;
using lrds::Reduction;
using lrds::Revise;
using lrds::SelectedType;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
// Kinds of rows, one of which is ordinary.
constexpr int kKinds = 22;

const char* name_of(DType type) {
  constexpr const char* kNames[] = {"f64", "f32", "bf16", "f16"};
  return kNames[static_cast<int>(type)];
}

std::size_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// Elements of a type known at run time, in a heap block of exactly their size. It is filled with
// `poison`, so that unwritten elements show; all ones is a NaN in every type.
class Buffer {
 public:
  explicit Buffer(DType type, std::size_t count, int poison = 0xff)
      : type_(type), count_(count), data_(nullptr, Free{bytes() > kHuge ? bytes() : 0}) {
    void* memory = nullptr;
    if (bytes() > kHuge) {
      memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) std::abort();
    } else {
      if (posix_memalign(&memory, 16, std::max<std::size_t>(1, bytes())) != 0) std::abort();
      std::memset(memory, poison, bytes());
    }
    data_.reset(static_cast<unsigned char*>(memory));
  }
  void* at(std::size_t i) { return data_.get() + i * size_of(type_); }
  std::size_t bytes() const { return count_ * size_of(type_); }
  bool holds(int poison, std::size_t elements) const {
    return std::all_of(data_.get(), data_.get() + elements * size_of(type_),
                       [=](unsigned char byte) { return byte == poison; });
  }

  // Returns the value after rounding to the type.
  double set(std::size_t i, double value) {
    switch (type_) {
      case DType::kFloat64:
        std::memcpy(at(i), &value, 8);
        break;
      case DType::kFloat32: {
        const float narrow = static_cast<float>(value);
        std::memcpy(at(i), &narrow, 4);
        break;
      }
      case DType::kBFloat16: {
        const __nv_bfloat16 narrow = __float2bfloat16_rn(static_cast<float>(value));
        std::memcpy(at(i), &narrow, 2);
        break;
      }
      case DType::kFloat16: {
        const __half narrow = __float2half_rn(static_cast<float>(value));
        std::memcpy(at(i), &narrow, 2);
        break;
      }
    }
    return get(i);
  }
  double get(std::size_t i) {
    switch (type_) {
      case DType::kFloat64: {
        double value;
        std::memcpy(&value, at(i), 8);
        return value;
      }
      case DType::kFloat32: {
        float value;
        std::memcpy(&value, at(i), 4);
        return value;
      }
      case DType::kBFloat16: {
        __nv_bfloat16 value;
        std::memcpy(&value, at(i), 2);
        return __bfloat162float(value);
      }
      default: {
        __half value;
        std::memcpy(&value, at(i), 2);
        return __half2float(value);
      }
    }
  }

 private:
  // Larger blocks are reserved, not allocated: their rows are far apart and most pages are never
  // used.
  static constexpr std::size_t kHuge = std::size_t{1} << 30;
  struct Free {
    std::size_t mapped;
    void operator()(unsigned char* p) const {
      if (mapped == 0) {
        std::free(p);
      } else {
        munmap(p, mapped);
      }
    }
  };
  DType type_;
  std::size_t count_;
  std::unique_ptr<unsigned char, Free> data_;
};

enum class GradOutput { kNone, kScalar, kPerRow };

// One call. The defaults are an ordinary training call.
struct Case {
  const char* group = "";
  DType student = DType::kFloat32;
  DType teacher = DType::kFloat32;
  std::int64_t classes = 10;
  std::int64_t rows = 9;
  std::int64_t teacher_rows = -1;  // -1: all
  std::int64_t offset = 0;         // elements before the first row of student and teacher
  std::int64_t teacher_offset = 0;
  std::int64_t gradient_offset = 0;
  std::int64_t student_padding = 0;  // elements between rows
  std::int64_t teacher_padding = 0;
  bool target_is_int64 = true;
  SelectedType selected = SelectedType::kPrefix;
  Reduction reduction = Reduction::kMean;
  double temperature = 4.0;
  double ce_weight = 0.1;
  double ce_weight_unselected = 1.0;
  double kd_weight = 0.9;
  double label_smoothing = 0.0;
  double eta = 0.8;
  std::int64_t ignore_index = -100;
  bool revise = true;
  double revise_temperature = 0.0;
  double num_valid = -1.0;  // negative: not passed
  double grad_scale = 0.0;  // 0: not passed
  GradOutput grad_output = GradOutput::kNone;
  bool with_gradient = true;
  bool with_loss = true;
  // Whether there are rows of every kind: ignored, unselected, out of range, -inf, outliers.
  bool hard = true;
  bool mostly_ignored = false;
  double shift = 0.0;  // added to all logits
  double spread = 1.0;
  double slope = 0.0;  // times the class, added to its logits
  // whether a third of the classes, without the target, have float32's lowest logits
  bool masked = false;
  int device = 0;

  std::string text() const {
    char line[512];
    std::snprintf(
        line, sizeof line,
        "%s: %s/%s C=%lld N=%lld K=%lld offsets %lld,%lld,%lld padding %lld,%lld %s selected %d "
        "reduction %d T=%g weights %g,%g,%g smoothing %g eta %g ignore %lld%s at %g num_valid %g "
        "grad_scale %g grad_output %d%s%s%s shift %g spread %g slope %g%s device %d",
        group, name_of(student), name_of(teacher), static_cast<long long>(classes),
        static_cast<long long>(rows), static_cast<long long>(teacher_rows),
        static_cast<long long>(offset), static_cast<long long>(teacher_offset),
        static_cast<long long>(gradient_offset), static_cast<long long>(student_padding),
        static_cast<long long>(teacher_padding), target_is_int64 ? "int64" : "int32",
        static_cast<int>(selected), static_cast<int>(reduction), temperature, ce_weight,
        ce_weight_unselected, kd_weight, label_smoothing, eta, static_cast<long long>(ignore_index),
        revise ? " revised" : "", revise_temperature, num_valid, grad_scale,
        static_cast<int>(grad_output), with_gradient ? "" : " no gradient",
        with_loss ? "" : " no loss", hard ? " hard" : "", shift, spread, slope,
        masked ? " masked" : "", device);
    return line;
  }
};

struct Tolerance {
  double loss;
  double gradient_relative;
  double gradient_absolute;  // relative to the row's scale
  double smallest;           // half the spacing of the type's subnormals
};

// The rounding of the gradient's type, and of sums over a row.
Tolerance tolerance(const Case& c) {
  if (c.student == DType::kFloat64) return {1e-12, 1e-12, 1e-13, 0.0};
  const double loss = c.teacher == DType::kFloat64 ? 1e-12 : 1e-5;
  switch (c.student) {
    case DType::kBFloat16:
      return {loss, 0x1p-8 * 1.01, 1e-6, 1e-40};
    case DType::kFloat16:
      return {loss, 0x1p-11 * 1.01, 1e-6, 0x1p-25 * 1.01};
    default:
      return {loss, 1e-5, 1e-6, 1e-45};
  }
}

struct Outputs {
  Buffer loss, loss_ce, loss_kd, ce, kd, gradient;
  std::vector<std::uint8_t> flags;
  std::vector<std::int64_t> counts;
};

int failures = 0;

void report(const Case& c, const char* what, std::int64_t row, std::int64_t k, double got,
            double expected) {
  if (++failures > 40) return;
  std::printf("FAILED %s: %s at row %lld class %lld: got %.17g, expected %.17g\n", c.text().c_str(),
              what, static_cast<long long>(row), static_cast<long long>(k), got, expected);
}

bool close(double got, double expected, double allowed) {
  if (std::isnan(expected)) return std::isnan(got);
  if (std::isinf(expected)) return got == expected;
  return std::fabs(got - expected) <= allowed;
}

// A sum near zero has rounding errors relative to its terms, not to itself.
double loss_allowance(double tolerance, double value, double scale) {
  return tolerance * ((std::isfinite(value) ? std::fabs(value) : 0.0) + 0.1 * scale);
}

void run(const Case& c, std::uint32_t seed) {
  simt::set_device(c.device);
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0.0, 3.0);
  std::uniform_real_distribution<double> uniform(0.0, 1.0);
  const auto n = static_cast<std::size_t>(c.rows), classes = static_cast<std::size_t>(c.classes);
  const std::int64_t teacher_rows = c.teacher_rows < 0 ? c.rows : c.teacher_rows;
  const bool wide = c.student == DType::kFloat64 || c.teacher == DType::kFloat64;
  const DType a = wide ? DType::kFloat64 : DType::kFloat32;

  // --- Inputs ---
  const std::size_t z_stride = classes + static_cast<std::size_t>(c.student_padding);
  const std::size_t v_stride = classes + static_cast<std::size_t>(c.teacher_padding);
  const auto offset = static_cast<std::size_t>(c.offset),
             v_offset = static_cast<std::size_t>(c.teacher_offset);
  // The last row ends where its memory ends.
  Buffer student(c.student, n == 0 ? 0 : offset + (n - 1) * z_stride + classes);
  Buffer teacher(
      c.teacher,
      teacher_rows == 0
          ? 0
          : v_offset + (static_cast<std::size_t>(teacher_rows) - 1) * v_stride + classes);
  std::vector<std::vector<double>> z(n), v(n);
  std::vector<std::int64_t> target(n);
  std::vector<std::int32_t> target32(n);
  std::vector<double> w(n, 1.0);
  std::vector<bool> bad(n, false);
  std::uniform_int_distribution<std::int64_t> any_class(0, c.classes - 1);
  for (std::size_t i = 0; i < n; ++i) {
    const int kind = c.hard ? static_cast<int>((i + seed) % kKinds) : 0;
    target[i] = any_class(random);
    if (c.selected == SelectedType::kPrefix) {
      w[i] = static_cast<std::int64_t>(i) < teacher_rows ? 1.0 : 0.0;
    } else {
      w[i] = kind % 3 == 1 ? 0.0 : 1.0;
      if (c.selected != SelectedType::kBool && kind % 3 == 2) w[i] = 0.25;
    }
    const auto y = static_cast<std::size_t>(target[i]);
    const double scale = kind == 4 ? 300.0 : 1.0;
    z[i].resize(classes);
    v[i].resize(classes);
    for (std::size_t k = 0; k < classes; ++k) {
      z[i][k] = scale * normal(random);
      v[i][k] = scale * normal(random);
      for (double* const logit : {&z[i][k], &v[i][k]}) {
        *logit = c.shift + c.spread * *logit + c.slope * static_cast<double>(k);
        if (c.masked && k % 3 == 1 && k != y) *logit = -3.0e38;
      }
    }
    const std::size_t other = (y + 1) % classes;
    if (kind == 2 || (c.mostly_ignored && i % 256 != 7)) target[i] = c.ignore_index;
    if (kind == 3) target[i] = i % 2 == 0 ? c.classes : -7;
    if (kind == 5) v[i][other] = z[i][other] = -kInf;
    if (kind == 6) v[i][other] = -kInf;
    // Where the teacher has probability: an infinite loss.
    if (kind == 7) z[i][other] = -kInf;
    if (kind == 8) v[i][y] = 40.0;                // the teacher is right
    if (kind == 9) v[i][y] = v[i][other] = 40.0;  // a tie between the label and another class
    if (kind == 10) z[i][y] = -kInf;
    if (kind == 11) {
      for (std::size_t k = 0; k + 1 < classes; ++k) z[i][k] = v[i][k] = -kInf;
    }
    if (kind == 12 &&
        (c.selected == SelectedType::kFloat32 || c.selected == SelectedType::kFloat64)) {
      w[i] = i % 3 == 0 ? kNan : i % 3 == 1 ? 1.5 : -0.25;
    }
    if (kind == 13) std::fill(z[i].begin(), z[i].end(), -kInf);
    if (kind == 14) std::fill(v[i].begin(), v[i].end(), -kInf);
    if (kind == 15) z[i][other] = kNan;
    if (kind == 16) v[i][other] = kNan;
    if (kind == 17) z[i][other] = kInf;
    if (kind == 18) v[i][other] = kInf;
    if (kind == 19) {  // the teacher is certain of another class, the student of yet another
      v[i][other] = 200.0;
      z[i][(y + 2) % classes] = 200.0;
    }
    if (kind == 20) {
      const bool half = c.student == DType::kFloat16 || c.teacher == DType::kFloat16;
      z[i][other] = v[i][y] = half ? 6e4 : 1e30;
    }
    if (kind == 21) {  // all far from 0
      for (std::size_t k = 0; k < classes; ++k) {
        z[i][k] += 4e4;
        v[i][k] -= 6e4;
      }
    }
    bad[i] = kind == 3 || !(w[i] >= 0.0 && w[i] <= 1.0);
    if (target[i] == c.ignore_index) bad[i] = false;
    // Values that a row does not need are NaN.
    const bool reads = target[i] != c.ignore_index && !bad[i];
    if (!reads) std::fill(z[i].begin(), z[i].end(), kNan);
    if (!reads || w[i] * c.kd_weight == 0.0) std::fill(v[i].begin(), v[i].end(), kNan);
    for (std::size_t k = 0; k < classes; ++k) {
      z[i][k] = student.set(offset + i * z_stride + k, z[i][k]);
      if (static_cast<std::int64_t>(i) < teacher_rows) {
        v[i][k] = teacher.set(v_offset + i * v_stride + k, v[i][k]);
      }
    }
    target32[i] = static_cast<std::int32_t>(target[i]);
  }
  std::vector<float> w32(w.begin(), w.end());
  std::vector<std::uint8_t> w8;
  w8.reserve(w.size());
  for (const double x : w) w8.push_back(x != 0.0 ? 1 : 0);
  Buffer num_valid(a, 1), grad_scale(a, 1), grad_output(a, std::max<std::size_t>(1, n));
  num_valid.set(0, c.num_valid);
  grad_scale.set(0, c.grad_scale);
  for (std::size_t i = 0; i < n; ++i) grad_output.set(i, uniform(random) - 0.5);

  // --- Expected ---
  const reference::Options options{
      c.temperature,     c.ce_weight, c.ce_weight_unselected, c.kd_weight, c.eta,
      c.label_smoothing, c.revise,    c.revise_temperature};
  const double valid = static_cast<double>(std::count_if(
      target.begin(), target.end(), [&](std::int64_t y) { return y != c.ignore_index; }));
  const double denominator = c.num_valid >= 0.0 ? c.num_valid : valid;
  double scale = 1.0;
  if (c.reduction == Reduction::kMean) scale = denominator > 0 ? 1.0 / denominator : 0.0;
  if (c.reduction == Reduction::kElementMean) {
    scale = denominator > 0 ? 1.0 / (denominator * static_cast<double>(c.classes)) : 0.0;
  }
  std::vector<reference::RowResult> rows(n);
  std::int64_t counts[3] = {};
  double sum_ce = 0.0, sum_kd = 0.0, largest = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    if (target[i] == c.ignore_index) {
      rows[i].gradient.assign(classes, 0.0);
    } else if (bad[i]) {
      rows[i].ce = rows[i].kd = kNan;
      rows[i].gradient.assign(classes, kNan);
    } else {
      rows[i] =
          reference::kd_loss_row(z[i], v[i], static_cast<std::size_t>(target[i]), w[i], options);
    }
    counts[0] += target[i] != c.ignore_index;
    counts[1] += target[i] != c.ignore_index && w[i] > 0.0;
    counts[2] += rows[i].revised;
    sum_ce += rows[i].ce;
    sum_kd += rows[i].kd;
    if (std::isfinite(rows[i].ce + rows[i].kd)) {
      largest = std::max({largest, std::fabs(rows[i].ce), std::fabs(rows[i].kd), 1.0});
    }
  }

  // --- The call, twice: the second time with another order of threads ---
  const bool none = c.reduction == Reduction::kNone;
  const auto call = [&](simt::Order order, int poison) {
    const auto g_offset = static_cast<std::size_t>(c.gradient_offset);
    Outputs out{Buffer(a, none ? n : 1, poison),
                Buffer(a, 1, poison),
                Buffer(a, 1, poison),
                Buffer(a, n, poison),
                Buffer(a, n, poison),
                Buffer(c.student, g_offset + n * classes, poison),
                {},
                {}};
    out.flags.assign(n, static_cast<std::uint8_t>(poison));
    out.counts.assign(3, -1);
    KdLossArgs args{};
    args.rows = c.rows;
    args.classes = c.classes;
    args.student = n > 0 ? student.at(offset) : nullptr;
    args.student_stride = static_cast<std::int64_t>(z_stride);
    args.student_type = c.student;
    args.teacher = teacher_rows > 0 ? teacher.at(v_offset) : nullptr;
    args.teacher_stride = static_cast<std::int64_t>(v_stride);
    args.teacher_rows = teacher_rows;
    args.teacher_type = c.teacher;
    args.target = n == 0              ? nullptr
                  : c.target_is_int64 ? static_cast<const void*>(target.data())
                                      : target32.data();
    args.target_is_int64 = c.target_is_int64;
    args.ignore_index = c.ignore_index;
    args.selected_type = c.selected;
    args.selected = c.selected == SelectedType::kBool      ? static_cast<const void*>(w8.data())
                    : c.selected == SelectedType::kFloat32 ? static_cast<const void*>(w32.data())
                    : c.selected == SelectedType::kFloat64 ? static_cast<const void*>(w.data())
                                                           : nullptr;
    args.temperature = c.temperature;
    args.ce_weight = c.ce_weight;
    args.ce_weight_unselected = c.ce_weight_unselected;
    args.kd_weight = c.kd_weight;
    args.eta = c.eta;
    args.revise_temperature = c.revise_temperature;
    args.label_smoothing = c.label_smoothing;
    args.revise = c.revise ? Revise::kLabelRevision : Revise::kNone;
    args.reduction = c.reduction;
    args.accumulate = a;
    args.num_valid = c.num_valid >= 0.0 ? num_valid.at(0) : nullptr;
    args.grad_scale = c.grad_scale != 0.0 ? grad_scale.at(0) : nullptr;
    args.grad_output = c.grad_output != GradOutput::kNone ? grad_output.at(0) : nullptr;
    args.grad_output_stride = c.grad_output == GradOutput::kPerRow ? 1 : 0;
    if (c.with_gradient && n > 0) args.gradient = out.gradient.at(g_offset);
    if (c.with_loss) {
      args.ce = n > 0 ? out.ce.at(0) : nullptr;
      args.kd = n > 0 ? out.kd.at(0) : nullptr;
      args.flags = n > 0 ? out.flags.data() : nullptr;
      args.loss = out.loss.at(0);
      args.loss_ce = out.loss_ce.at(0);
      args.loss_kd = out.loss_kd.at(0);
      args.counts = out.counts.data();
    }
    simt::set_order(order, seed);
    std::vector<double> workspace(lrds::cuda::kd_loss_workspace_doubles(args), std::nan(""));
    args.workspace = workspace.empty() ? nullptr : workspace.data();
    simt::take_launches();
    const cudaError_t error = lrds::cuda::kd_loss(args, nullptr);
    if (error != cudaSuccess) report(c, "cudaError_t", -1, -1, error, cudaSuccess);
    const simt::Launches launches = simt::take_launches();
    const int kernels = (c.rows > 0 ? 1 : 0) + (c.with_loss ? 1 : 0);
    if (launches.kernels != kernels)
      report(c, "kernel launches", -1, -1, launches.kernels, kernels);
    if (launches.memsets > 1) report(c, "memsets", -1, -1, launches.memsets, 1);
    if (poison == 0x5a && launches.queries > 0) {
      report(c, "repeated occupancy queries", -1, -1, launches.queries, 0);
    }
    if (!out.gradient.holds(poison, c.with_gradient ? g_offset : g_offset + n * classes)) {
      report(c, "a write outside the gradient", -1, -1, 1, 0);
    }
    return out;
  };
  // With another order of threads and other initial outputs. Equal bits show that all were written.
  Outputs out = call(simt::Order::kForward, 0xff);
  Outputs again = call(seed % 2 == 0 ? simt::Order::kBackward : simt::Order::kShuffled, 0x5a);

  // --- Compare ---
  const auto same = [&](Buffer& x, Buffer& y, const char* what) {
    if (std::memcmp(x.at(0), y.at(0), x.bytes()) != 0) report(c, what, -1, -1, 0, 1);
  };
  const std::size_t g_begin = static_cast<std::size_t>(c.gradient_offset);
  if (c.with_gradient && n > 0 &&
      std::memcmp(out.gradient.at(g_begin), again.gradient.at(g_begin),
                  n * classes * size_of(c.student)) != 0) {
    report(c, "bits of the gradient between two runs", -1, -1, 0, 1);
  }
  if (c.with_loss) {
    same(out.loss, again.loss, "bits of the loss between two runs");
    same(out.ce, again.ce, "bits of ce between two runs");
    same(out.kd, again.kd, "bits of kd between two runs");
    if (!none) {
      same(out.loss_ce, again.loss_ce, "bits of loss_ce between two runs");
      same(out.loss_kd, again.loss_kd, "bits of loss_kd between two runs");
    }
    if (out.flags != again.flags) report(c, "flags between two runs", -1, -1, 0, 1);
  }

  const Tolerance allowed = tolerance(c);
  for (std::size_t i = 0; c.with_loss && i < n; ++i) {
    const auto row = static_cast<std::int64_t>(i);
    const double most = loss_allowance(allowed.loss, rows[i].ce, 1.0) +
                        loss_allowance(allowed.loss, rows[i].kd, c.temperature * c.temperature);
    if (!close(out.ce.get(i), rows[i].ce, most))
      report(c, "ce", row, -1, out.ce.get(i), rows[i].ce);
    if (!close(out.kd.get(i), rows[i].kd, most))
      report(c, "kd", row, -1, out.kd.get(i), rows[i].kd);
    if (none && !close(out.loss.get(i), rows[i].ce + rows[i].kd, 2 * most)) {
      report(c, "loss", row, -1, out.loss.get(i), rows[i].ce + rows[i].kd);
    }
    const int flags =
        target[i] == c.ignore_index ? 0 : 1 | (w[i] > 0.0 ? 2 : 0) | (rows[i].revised ? 4 : 0);
    if (out.flags[i] != flags) report(c, "flags", row, -1, out.flags[i], flags);
  }
  if (c.with_loss) {
    for (int i = 0; i < 3; ++i) {
      if (out.counts[static_cast<std::size_t>(i)] != counts[i]) {
        report(c, "counts", i, -1, static_cast<double>(out.counts[static_cast<std::size_t>(i)]),
               static_cast<double>(counts[i]));
      }
    }
    if (!none) {
      const double most =
          loss_allowance(allowed.loss, 0.0, 10 * largest) * std::max(valid, 1.0) * scale +
          (std::isfinite(sum_ce + sum_kd) ? allowed.loss * std::fabs(sum_ce + sum_kd) * scale
                                          : 0.0);
      if (!close(out.loss_ce.get(0), sum_ce * scale, most)) {
        report(c, "loss_ce", -1, -1, out.loss_ce.get(0), sum_ce * scale);
      }
      if (!close(out.loss_kd.get(0), sum_kd * scale, most)) {
        report(c, "loss_kd", -1, -1, out.loss_kd.get(0), sum_kd * scale);
      }
      if (!close(out.loss.get(0), (sum_ce + sum_kd) * scale, most)) {
        report(c, "loss", -1, -1, out.loss.get(0), (sum_ce + sum_kd) * scale);
      }
    }
  }
  for (std::size_t i = 0; c.with_gradient && i < n; ++i) {
    double factor = scale;
    if (c.grad_scale != 0.0) factor *= c.grad_scale;
    if (c.grad_output == GradOutput::kScalar) factor *= grad_output.get(0);
    if (c.grad_output == GradOutput::kPerRow) factor *= grad_output.get(i);
    const double row_scale =
        std::fabs(factor) * (c.ce_weight + c.ce_weight_unselected + c.kd_weight * c.temperature);
    for (std::size_t k = 0; k < classes; ++k) {
      double expected = rows[i].gradient[k] * factor;
      if (c.student == DType::kFloat16 && std::fabs(expected) >= 65520.0) {
        expected = std::copysign(kInf, expected);
      }
      const double got =
          out.gradient.get(static_cast<std::size_t>(c.gradient_offset) + i * classes + k);
      if (!close(got, expected,
                 allowed.gradient_relative * std::fabs(expected) +
                     allowed.gradient_absolute * row_scale + allowed.smallest)) {
        report(c, "gradient", static_cast<std::int64_t>(i), static_cast<std::int64_t>(k), got,
               expected);
      }
    }
  }
}

const DType kTypes[] = {DType::kFloat64, DType::kFloat32, DType::kBFloat16, DType::kFloat16};

std::vector<Case> kd_loss_cases() {
  std::vector<Case> cases;
  const char* group = "";
  const auto add = [&](Case c) {
    c.group = group;
    cases.push_back(c);
  };
  const auto make = [](DType student, DType teacher, std::int64_t classes, std::int64_t rows) {
    Case c;
    c.student = student;
    c.teacher = teacher;
    c.classes = classes;
    c.rows = rows;
    return c;
  };
  // Every path with every type: 10, 100 and 1000 classes as in common data sets; one class; sizes
  // around a warp and around the dispatch table's limits; odd sizes, whose rows start at every
  // alignment.
  group = "classes";
  for (const DType type : kTypes) {
    for (const std::int64_t classes :
         {1, 2, 10, 31, 32, 33, 100, 128, 129, 257, 1000, 1001, 1024}) {
      Case c = make(type, type, classes, kKinds);
      c.selected = SelectedType::kFloat32;
      add(c);
    }
    // One row where a block has a row; more where the next row is prefetched.
    for (const std::int64_t classes : {1025, 4097, 21841}) {
      Case c = make(type, type, classes, 1);
      c.hard = false;
      add(c);
    }
    Case streamed = make(type, type, 3001, 1);  // more than the shared memory of device 1
    streamed.device = 1;
    streamed.hard = false;
    add(streamed);
    Case edges = make(type, type, 4097, 4);
    edges.device = 2;
    add(edges);
    Case several = make(type, type, 1027, 13);  // several rows of every kind per block
    several.selected = SelectedType::kFloat32;
    several.device = 2;
    add(several);
    several.device = 1;  // and a part of each is streamed
    add(several);
  }
  // Student and teacher of different types.
  group = "types";
  for (const DType student : kTypes) {
    for (const DType teacher : kTypes) {
      if (student == teacher) continue;
      for (const std::int64_t classes : {10, 257}) add(make(student, teacher, classes, 13));
      Case c = make(student, teacher, 700, 3);
      c.device = 2;
      add(c);
    }
  }
  group = "alignment";
  // Rows at any address: bases and strides with equal and with different alignment.
  for (const DType type : {DType::kFloat32, DType::kBFloat16}) {
    for (const std::int64_t classes : {10, 33, 130, 1001, 1030}) {
      const std::int64_t rows = classes > 1024 ? 3 : 13;
      Case c = make(type, type, classes, rows);
      c.offset = c.teacher_offset = c.gradient_offset = 3;
      add(c);
      c.offset = 1;
      add(c);
      c.offset = c.teacher_offset = c.gradient_offset = 0;
      c.student_padding = c.teacher_padding = 16;
      add(c);
      c.student_padding = 5;
      add(c);
      c.teacher_padding = 0;
      c.student_padding = 0;
      c.gradient_offset = 1;
      add(c);
    }
  }
  // Clusters: a ring shorter and longer than a row's slice; rows of every kind after each other;
  // one, two, four and eight blocks per row; every alignment.
  group = "clusters";
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const std::int64_t classes = type == DType::kFloat32 ? 8201 : 16403;
    Case c = make(type, type, classes, kKinds);
    c.device = 3;
    c.selected = SelectedType::kFloat32;
    add(c);
    c.device = 4;
    c.rows = 9;
    add(c);
    c.device = 0;
    c.rows = 2;
    c.offset = c.teacher_offset = c.gradient_offset = 3;
    add(c);
    c.device = 3;
    c.classes = 2 * classes;  // eight blocks per row
    c.rows = 7;
    add(c);
    c.classes = classes;
    c.rows = 5;
    c.temperature = 2.5;
    c.label_smoothing = 0.1;
    c.student_padding = 8;
    c.teacher_padding = 32;
    c.grad_output = GradOutput::kPerRow;
    c.reduction = Reduction::kNone;
    add(c);
    c.with_gradient = false;
    add(c);
    c.rows = 23;
    c.mostly_ignored = true;
    add(c);
    // Two blocks per row, and more rows than the device holds clusters.
    Case two = make(type, type, type == DType::kFloat32 ? 21841 : 43682, 7);
    two.device = 5;
    two.selected = SelectedType::kBool;
    add(two);
    // More than the shared memory of eight blocks: two passes.
    Case longer = make(type, type, 48 * classes / 8, 1);
    longer.device = 3;
    longer.hard = false;
    add(longer);
  }
  // Maxima far from 0, and maxima far above all earlier logits of a thread.
  group = "maxima";
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat64}) {
    const std::int64_t bulk = type == DType::kFloat32 ? 8201 : 16403;
    for (const std::int64_t classes : {std::int64_t{1027}, bulk}) {
      for (const double t : {0.25, 1.0, 4.0, 30.0}) {
        if (classes == bulk && (type == DType::kFloat64 || t == 0.25 || t == 1.0)) continue;
        Case c = make(type, type, classes, 2);
        c.device = classes == bulk ? 3 : 2;
        c.hard = false;
        c.temperature = t;
        c.slope = 0.05;
        add(c);
        c.slope = -0.05;
        c.label_smoothing = t == 4.0 ? 0.1 : 0.0;
        add(c);
        c.label_smoothing = 0.0;
        c.slope = 0.0;
        c.masked = true;
        add(c);
        c.masked = false;
        // Neighbouring numbers are at least 64 apart there.
        c.shift = type == DType::kBFloat16 ? 1e7 : 1e9;
        c.spread = type == DType::kBFloat16 ? 2e5 : 200.0;
        add(c);
        c.shift = -c.shift;
        c.teacher_rows = 1;
        add(c);
        c.shift = 0.0;
        c.spread = 1e30;
        add(c);
      }
    }
  }
  // The additional sum of a revision at its own temperature, on every path: flat, vectors,
  // elements, blocks that keep a row or read it again, a ring in one block and in a cluster.
  group = "revision";
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat64}) {
    const std::int64_t bulk = type == DType::kFloat32 ? 8201 : 16403;
    for (const std::int64_t classes :
         {std::int64_t{10}, std::int64_t{200}, std::int64_t{513}, std::int64_t{1029}, bulk}) {
      if (classes == bulk && type == DType::kFloat64) continue;
      for (const double r : {1.0, 6.0}) {
        Case c = make(type, type, classes, classes > 1024 ? 5 : 13);
        c.device = classes == bulk ? 3 : classes > 1024 ? 2 : 0;
        c.selected = SelectedType::kBool;
        c.revise_temperature = r;
        c.temperature = r == 1.0 ? 4.0 : 2.5;
        add(c);
        c.with_gradient = false;
        add(c);
        c.with_gradient = true;
        c.hard = false;
        c.teacher_padding = 1;
        if (classes == bulk) continue;
        add(c);
        c.device = 2;
        c.teacher_padding = 0;
        c.shift = type == DType::kBFloat16 ? 1e7 : 1e6;
        c.spread = type == DType::kBFloat16 ? 2e5 : 200.0;
        add(c);
        c.shift = 0.0;
        c.masked = true;
        c.spread = 1.0;
        c.eta = 0.999;
        add(c);
      }
    }
    if (type == DType::kFloat64) continue;
    for (const bool with_gradient : {true, false}) {
      Case c = make(type, type, 2 * bulk, 7);
      c.device = 3;
      c.revise_temperature = 1.0;
      c.with_gradient = with_gradient;
      add(c);
      c.device = 5;
      add(c);
      c.device = 2;
      c.rows = 2;
      add(c);
    }
  }
  // Rows that are more than 2^31 elements apart.
  group = "far";
  for (const std::int64_t classes : {33, 200, 1030}) {
    Case c = make(DType::kBFloat16, DType::kBFloat16, classes, 3);
    c.student_padding = c.teacher_padding = (std::int64_t{1} << 31) + 8 - classes;
    c.hard = false;
    add(c);
  }
  group = "options";
  // All other options, on a short row, a long row and a streamed one.
  for (const std::int64_t classes : {33, 200, 1029}) {
    const auto variants = [&](DType type, int device) {
      const auto add_if = [&](const auto& change) {
        Case c = make(type, type, classes, classes > 1024 ? 4 : 13);
        c.device = device;
        change(c);
        add(c);
      };
      for (const double t : {1.0, 2.0, 8.0, 2.5, 0.5, 20.0})
        add_if([&](Case& c) { c.temperature = t; });
      for (const Reduction r : {Reduction::kNone, Reduction::kSum, Reduction::kElementMean}) {
        add_if([&](Case& c) { c.reduction = r; });
      }
      for (const SelectedType s : {SelectedType::kBool, SelectedType::kFloat64}) {
        add_if([&](Case& c) { c.selected = s; });
      }
      for (const std::int64_t k : {0, 2}) add_if([&](Case& c) { c.teacher_rows = k; });
      add_if([](Case& c) { c.target_is_int64 = false; });
      add_if([](Case& c) { c.label_smoothing = 0.1; });
      add_if([](Case& c) { c.revise = false; });
      add_if([](Case& c) { c.ce_weight = 0.0; });
      add_if([](Case& c) { c.kd_weight = 0.0; });
      add_if([](Case& c) {
        c.kd_weight = c.ce_weight = 0.0;
        c.selected = SelectedType::kBool;
      });
      add_if([](Case& c) {
        c.num_valid = 5.0;
        c.grad_scale = 1024.0;
      });
      add_if([](Case& c) { c.num_valid = 0.0; });
      add_if([](Case& c) {
        c.grad_scale = 65536.0;
        c.reduction = Reduction::kSum;
      });
      add_if([](Case& c) {
        c.eta = 0.05;
        c.ignore_index = -1;
      });
      // Class 1 is ignored, and with it all rows with this target, of whatever kind.
      add_if([](Case& c) {
        c.eta = 0.999;
        c.ignore_index = 1;
      });
      add_if([](Case& c) {
        c.grad_output = GradOutput::kPerRow;
        c.reduction = Reduction::kElementMean;
        c.target_is_int64 = false;
        c.selected = SelectedType::kBool;
      });
      add_if([](Case& c) {
        c.label_smoothing = 0.3;
        c.temperature = 1.5;
        c.ce_weight_unselected = 0.0;
        c.selected = SelectedType::kFloat64;
      });

      add_if([](Case& c) {
        c.with_loss = false;
        c.grad_output = GradOutput::kScalar;
      });
      add_if([](Case& c) {
        c.with_loss = false;
        c.reduction = Reduction::kNone;
        c.grad_output = GradOutput::kPerRow;
      });
      add_if([](Case& c) { c.with_gradient = false; });
      add_if([](Case& c) { c.mostly_ignored = true; });
      add_if([](Case& c) {
        c.mostly_ignored = true;
        c.rows = 5;  // all of them ignored
      });
    };
    variants(DType::kFloat32, classes > 1024 ? 2 : 0);
    if (classes < 1024) variants(DType::kFloat64, 0);
    if (classes > 1024) variants(DType::kBFloat16, 1);
    if (classes == 200) variants(DType::kFloat16, 0);
  }
  group = "finalize";
  // One block up to 8192 rows, then several, at most 32.
  for (const std::int64_t rows : {8192, 8193, 20000, 270000}) {
    for (const Reduction reduction : {Reduction::kMean, Reduction::kSum, Reduction::kNone}) {
      if (rows > 20000 && reduction != Reduction::kSum) continue;
      Case c = make(DType::kFloat32, DType::kFloat32, 1, rows);
      c.device = 2;
      c.reduction = reduction;
      c.with_gradient = reduction == Reduction::kMean;
      add(c);
    }
  }
  group = "flat";
  // Tiles: several per block, the last one incomplete, bases between 16-byte boundaries, teachers
  // of the first rows only.
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t classes : {3, 10, 50, 100, 127}) {
      for (const int device : {0, 2}) {
        Case c = make(type, type, classes, 20001 / classes);
        c.device = device;
        c.offset = c.teacher_offset = c.gradient_offset = classes % 7;
        c.selected = SelectedType::kBool;
        add(c);
        c.selected = SelectedType::kPrefix;
        c.teacher_rows = c.rows / 3 + 1;
        c.temperature = 2.5;
        add(c);
        c.with_gradient = false;
        add(c);
      }
    }
    for (const std::int64_t classes : {8, 16, 64, 128}) {  // rows of whole vectors
      Case c = make(type, type, classes, 3 * kKinds);
      c.device = 2;
      add(c);
      c.student_padding = c.teacher_padding = 8;
      add(c);
      c.student_padding = 3;
      add(c);
    }
  }
  group = "counting";
  // The blocks count the valid rows together.
  for (const DType type : {DType::kFloat32, DType::kFloat64}) {
    Case c = make(type, type, 2, 5000);
    c.mostly_ignored = type == DType::kFloat64;
    add(c);
    c.device = 2;
    add(c);
  }
  // No rows.
  group = "empty";
  for (const Reduction r : {Reduction::kNone, Reduction::kMean, Reduction::kSum}) {
    Case c = make(DType::kBFloat16, DType::kBFloat16, 100, 0);
    c.reduction = r;
    add(c);
  }
  return cases;
}

// The decisions of the dispatch table, as in docs/kernels.md.
std::size_t plan_cases() {
  using lrds::cuda::DeviceFacts;
  using lrds::cuda::Path;
  using lrds::cuda::Plan;
  const DeviceFacts h200{90, 132, 232448, 233472, 50 << 20};
  const DeviceFacts a100{80, 108, 166912, 167936, 40 << 20};
  alignas(16) static float memory[8];
  const struct {
    const DeviceFacts& device;
    DType student, teacher;
    std::int64_t rows, classes;
    Path path;
    int cluster;
    unsigned grid;
  } expected[] = {
      {h200, DType::kFloat32, DType::kFloat32, 65536, 10, Path::kFlat, 0, 396},
      {h200, DType::kFloat32, DType::kFloat32, 65536, 100, Path::kWarpShortVector, 0, 264},
      {h200, DType::kBFloat16, DType::kBFloat16, 65536, 100, Path::kFlat, 0, 396},
      {h200, DType::kFloat32, DType::kBFloat16, 65536, 100, Path::kWarpElement, 0, 264},
      {h200, DType::kBFloat16, DType::kBFloat16, 65536, 1000, Path::kWarpVector, 0, 264},
      {h200, DType::kFloat32, DType::kFloat32, 64, 1000, Path::kWarpVector, 0, 64},
      {h200, DType::kFloat64, DType::kFloat64, 65536, 10, Path::kBlockElement, 0, 132 * 8},
      {h200, DType::kBFloat16, DType::kBFloat16, 4096, 16384, Path::kBlockVector, 0, 264},
      {h200, DType::kBFloat16, DType::kBFloat16, 16384, 21841, Path::kBulk, 1, 132},
      {h200, DType::kFloat32, DType::kFloat32, 16384, 21841, Path::kBulk, 2, 132},
      {h200, DType::kBFloat16, DType::kBFloat16, 8192, 128256, Path::kBulk, 4, 132},
      {h200, DType::kBFloat16, DType::kBFloat16, 20, 128256, Path::kBulk, 4, 80},
      {h200, DType::kFloat32, DType::kFloat32, 40, 60000, Path::kBulk, 4, 132},
      {h200, DType::kFloat32, DType::kFloat32, 1, 60000, Path::kBulk, 4, 4},
      {h200, DType::kFloat32, DType::kFloat32, 1, 21841, Path::kBulk, 2, 2},
      {h200, DType::kBFloat16, DType::kBFloat16, 4096, 256000, Path::kBulk, 8, 128},
      {h200, DType::kFloat32, DType::kFloat32, 4096, 256000, Path::kBlockVector, 0, 66},
      {h200, DType::kFloat32, DType::kBFloat16, 4096, 128256, Path::kBlockElement, 0, 66},
      {a100, DType::kBFloat16, DType::kBFloat16, 16384, 21841, Path::kBlockVector, 0, 108},
      {a100, DType::kBFloat16, DType::kBFloat16, 8192, 128256, Path::kBlockVector, 0, 79},
  };
  std::size_t ran = 0;
  for (const auto& e : expected) {
    Case c;
    c.group = "plan";
    c.student = e.student;
    c.teacher = e.teacher;
    c.rows = e.rows;
    c.classes = e.classes;
    KdLossArgs args{};
    args.rows = args.teacher_rows = e.rows;
    args.classes = args.student_stride = args.teacher_stride = e.classes;
    args.student = args.teacher = args.gradient = memory;
    args.student_type = e.student;
    args.teacher_type = e.teacher;
    args.accumulate = e.student == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const Plan plan = lrds::cuda::plan_rows(args, e.device);
    if (plan.path != e.path) {
      report(c, "path", -1, -1, static_cast<int>(plan.path), static_cast<int>(e.path));
    }
    if (plan.cluster != e.cluster) report(c, "cluster", -1, -1, plan.cluster, e.cluster);
    if (plan.grid != e.grid) report(c, "grid", -1, -1, plan.grid, e.grid);
    ++ran;
  }
  return ran;
}

// The order in which a row's sums are added must not depend on the number of rows. It is determined
// by the path and, for kernels with a block per row, by the sizes of block and cluster.
std::size_t order_cases() {
  using lrds::cuda::DeviceFacts;
  using lrds::cuda::Path;
  using lrds::cuda::Plan;
  alignas(16) static float memory[8];
  std::size_t ran = 0;
  for (const DeviceFacts& device : {DeviceFacts{90, 132, 232448, 233472, 50 << 20},
                                    DeviceFacts{90, 78, 232448, 233472, 50 << 20},
                                    DeviceFacts{80, 108, 166912, 167936, 40 << 20},
                                    DeviceFacts{120, 170, 101376, 102400, 96 << 20}}) {
    for (const DType type : kTypes) {
      for (const std::int64_t classes :
           {1,     10,    33,    104,   200,   1000,  1024,  1025,   4096,   4097,   8193,  10000,
            16384, 16385, 21841, 32000, 50257, 60000, 65536, 128256, 152064, 256000, 300000}) {
        KdLossArgs args{};
        args.classes = args.student_stride = args.teacher_stride = classes;
        args.student = args.teacher = args.gradient = memory;
        args.student_type = args.teacher_type = type;
        args.accumulate = type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
        args.rows = args.teacher_rows = 1;
        const Plan alone = lrds::cuda::plan_rows(args, device);
        const bool by_blocks = alone.path == Path::kBulk || alone.path == Path::kBlockVector ||
                               alone.path == Path::kBlockElement;
        for (const std::int64_t rows :
             {2, 3, 8, 16, 17, 33, 40, 66, 132, 133, 1000, 16752, 65536}) {
          args.rows = args.teacher_rows = rows;
          const Plan plan = lrds::cuda::plan_rows(args, device);
          Case c;
          c.group = "order";
          c.student = c.teacher = type;
          c.rows = rows;
          c.classes = classes;
          const auto same = [&](const char* what, int got, int expected) {
            if (got != expected) report(c, what, -1, -1, got, expected);
          };
          same("path", static_cast<int>(plan.path), static_cast<int>(alone.path));
          same("lanes", plan.lanes, alone.lanes);
          same("tiles", plan.tiles, alone.tiles);
          same("cluster", plan.cluster, alone.cluster);
          if (by_blocks) {
            same("threads", static_cast<int>(plan.threads), static_cast<int>(alone.threads));
          }
          ++ran;
        }
      }
    }
  }
  return ran;
}

// A row computed alone has the bits that it has among others, most of which are ignored and cheap.
void run_bits(DType type, std::int64_t classes, int device, std::int64_t most_blocks) {
  simt::set_device(device);
  constexpr std::size_t kRows = 40;
  constexpr std::int64_t kIgnored = -100;
  const std::size_t read[] = {0, 7, 39};
  const auto width = static_cast<std::size_t>(classes);
  std::mt19937 random(11);
  std::normal_distribution<double> normal(0.0, 3.0);
  const DType a = type == DType::kFloat64 ? type : DType::kFloat32;
  Buffer student(type, kRows * width), teacher(type, kRows * width);
  std::vector<std::int64_t> target(kRows, kIgnored);
  for (const std::size_t row : read) {
    target[row] = static_cast<std::int64_t>(row) % classes;
    for (std::size_t k = 0; k < width; ++k) {
      student.set(row * width + k, normal(random));
      teacher.set(row * width + k, normal(random));
    }
  }
  Case c;
  c.group = "bits";
  c.student = c.teacher = type;
  c.rows = kRows;
  c.classes = classes;
  c.device = device;
  const auto call = [&](std::size_t first, std::size_t rows, Buffer& loss, Buffer& gradient) {
    // With the alignment of the first row.
    Buffer z(type, rows * width), v(type, rows * width), ce(a, rows), kd(a, rows);
    std::memcpy(z.at(0), student.at(first * width), z.bytes());
    std::memcpy(v.at(0), teacher.at(first * width), v.bytes());
    std::vector<std::uint8_t> flags(rows);
    std::int64_t counts[3];
    KdLossArgs args{};
    args.rows = args.teacher_rows = static_cast<std::int64_t>(rows);
    args.classes = args.student_stride = args.teacher_stride = classes;
    args.student = z.at(0);
    args.teacher = v.at(0);
    args.student_type = args.teacher_type = type;
    args.target = target.data() + first;
    args.target_is_int64 = true;
    args.ignore_index = kIgnored;
    args.temperature = 4.0;
    args.ce_weight = 0.1;
    args.ce_weight_unselected = 1.0;
    args.kd_weight = 0.9;
    args.eta = 0.8;
    args.revise = Revise::kLabelRevision;
    args.reduction = Reduction::kNone;
    args.accumulate = a;
    args.gradient = gradient.at(0);
    args.ce = ce.at(0);
    args.kd = kd.at(0);
    args.flags = flags.data();
    args.loss = loss.at(0);
    args.counts = counts;
    simt::set_order(simt::Order::kForward);
    simt::take_launches();
    const cudaError_t error = lrds::cuda::kd_loss(args, nullptr);
    if (error != cudaSuccess) report(c, "cudaError_t", -1, -1, error, cudaSuccess);
    const std::int64_t blocks = simt::take_launches().largest_grid;
    if (blocks > most_blocks) report(c, "blocks", -1, -1, blocks, most_blocks);
  };
  Buffer loss(a, kRows), gradient(type, kRows * width);
  call(0, kRows, loss, gradient);
  for (const std::size_t row : read) {
    Buffer loss_alone(a, 1), gradient_alone(type, width);
    call(row, 1, loss_alone, gradient_alone);
    const auto at = static_cast<std::int64_t>(row);
    if (std::memcmp(loss.at(row), loss_alone.at(0), loss_alone.bytes()) != 0) {
      report(c, "bits of the loss alone", at, -1, loss_alone.get(0), loss.get(row));
    }
    if (std::memcmp(gradient.at(row * width), gradient_alone.at(0), gradient_alone.bytes()) != 0) {
      report(c, "bits of the gradient alone", at, -1, 0, 1);
    }
  }
}

std::size_t bits_cases() {
  std::size_t ran = 0;
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    // Every row has the alignment of its copy.
    for (const std::int64_t classes : {104, 1000, 4096, 60000, 128256}) {
      run_bits(type, classes, 0, 132 * 8);
      ++ran;
    }
    // Clusters of 4: a device of two groups of 5 multiprocessors holds 2 of them.
    run_bits(type, type == DType::kFloat32 ? 60000 : 128256, 5, 8);
    ++ran;
  }
  return ran;
}

void run_scale(DType type, std::int64_t count, std::int64_t offset, std::int64_t out_offset,
               bool in_place, double grad_output, double grad_scale, bool factor_is_double) {
  simt::set_device(2);
  std::mt19937 random(7);
  std::normal_distribution<double> normal(0.0, 1.0);
  const auto n = static_cast<std::size_t>(count), from = static_cast<std::size_t>(offset),
             to = static_cast<std::size_t>(in_place ? offset : out_offset);
  Buffer gradient(type, from + n), separate(type, to + n);
  std::vector<double> before(n);
  for (std::size_t i = 0; i < n; ++i) {
    before[i] = gradient.set(from + i, i == 3 ? kInf : i == 4 ? kNan : normal(random));
  }
  const DType factor_type = factor_is_double ? DType::kFloat64 : DType::kFloat32;
  Buffer factor(factor_type, 1), divisor(factor_type, 1);
  factor.set(0, grad_output);
  divisor.set(0, grad_scale);
  Buffer& out = in_place ? gradient : separate;
  const cudaError_t error = lrds::cuda::scale_gradient(
      gradient.at(from), out.at(to), count, type, factor.at(0),
      grad_scale != 0.0 ? divisor.at(0) : nullptr, factor_is_double, nullptr);
  Case c;
  c.student = c.teacher = type;
  c.rows = 1;
  c.classes = count;
  c.offset = offset;
  c.gradient_offset = static_cast<std::int64_t>(to);
  if (error != cudaSuccess) report(c, "scale_gradient", -1, -1, error, cudaSuccess);
  const double by = grad_scale != 0.0 ? grad_output / grad_scale : grad_output;
  const Tolerance allowed = tolerance(c);
  if (!in_place && !separate.holds(0xff, to)) report(c, "a write before out", -1, -1, 1, 0);
  if (!in_place) {
    // The input gradient is unchanged.
    for (std::size_t i = 0; i < n; ++i) {
      const double after = gradient.get(from + i);
      if (!close(after, before[i], 0.0)) {
        report(c, "source", -1, static_cast<std::int64_t>(i), after, before[i]);
      }
    }
  }
  for (std::size_t i = 0; i < n; ++i) {
    double expected = before[i] * by;
    if (type == DType::kFloat16 && std::fabs(expected) >= 65520.0) {
      expected = std::copysign(kInf, expected);
    }
    const double got = out.get(to + i);
    if (!close(got, expected, allowed.gradient_relative * std::fabs(expected) + allowed.smallest)) {
      report(c, "scaled gradient", -1, static_cast<std::int64_t>(i), got, expected);
    }
  }
}

std::size_t scale_gradient_cases() {
  std::size_t ran = 0;
  const auto run_scale_of = [&](auto... arguments) {
    run_scale(arguments...);
    ++ran;
  };
  for (const DType type : kTypes) {
    for (const std::int64_t count : {1, 7, 1000, 40001}) {
      for (const double factor : {0.0, 1.0, 2.5, 65536.0}) {
        run_scale_of(type, count, 0, 0, true, factor, 0.0, type == DType::kFloat64);
        run_scale_of(type, count, 3, 3, false, factor, 0.0, true);
        run_scale_of(type, count, 1, 2, false, factor, 0.5, false);
        run_scale_of(type, count, 5, 5, true, factor, 4.0, true);
      }
    }
    run_scale_of(type, 0, 0, 0, true, 2.0, 0.0, false);
  }
  return ran;
}

}  // namespace

int main(int argc, char** argv) {
  // Line buffering, because a sanitizer ends the program without a flush.
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  const std::size_t part = argc >= 3 ? std::strtoul(argv[1], nullptr, 10) : 0;
  const std::size_t parts = argc >= 3 ? std::strtoul(argv[2], nullptr, 10) : 1;
  const std::string only = argc >= 4 ? argv[3] : "";
  const bool timed = std::getenv("SIMT_TIMES") != nullptr;
  const std::vector<Case> cases = kd_loss_cases();
  std::map<std::string, std::size_t> ran;
  for (std::size_t i = part; i < cases.size(); i += parts) {
    if (!only.empty() && only != cases[i].group) continue;
    const auto start = std::chrono::steady_clock::now();
    run(cases[i], static_cast<std::uint32_t>(i));
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    if (timed) std::printf("%.3f s  %s\n", took.count(), cases[i].text().c_str());
    ++ran[cases[i].group];
  }
  if (part == 0 && (only.empty() || only == "scale_gradient")) {
    ran["scale_gradient"] = scale_gradient_cases();
  }
  if (part == 0 && (only.empty() || only == "plan")) ran["plan"] = plan_cases();
  if (part == 0 && (only.empty() || only == "order")) ran["order"] = order_cases();
  if (part == parts - 1 && (only.empty() || only == "bits")) ran["bits"] = bits_cases();
  std::size_t all = 0;
  for (const auto& [group, count] : ran) {
    std::printf("%s: %zu cases\n", group.c_str(), count);
    all += count;
  }
  std::printf("%zu cases, %d failures\n", all, failures);
  // An unknown group is an error, too.
  return failures == 0 && all > 0 ? 0 : 1;
}
