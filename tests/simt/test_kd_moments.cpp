// Runs the CUDA kernels of csrc/cuda/kd_moments* in the interpreter and compares them with the
// CPU's float64 sweep of the same rows, which the Python tests compare with lrds_fast.reference.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "core/divergences.h"
#include "cpu/kd_loss.h"
#include "cuda/kd_moments.h"
#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "simt.h"

namespace {

using lrds::DType;
using lrds::KdLossArgs;
using lrds::kMoments;
using lrds::Revise;

constexpr std::size_t kRows = 9;

struct Case {
  int divergence;
  Revise revise;
  DType student, teacher;
  std::size_t classes;
  std::vector<double> temperatures;
  bool standardize, direction;
  double revise_temperature = 0.0;
};

int failures = 0;

void report(const Case& c, const char* what, std::size_t row, double got, double expected) {
  if (++failures <= 20) {
    std::printf("divergence %d revise %d types %d/%d C=%zu: %s of row %zu is %.9g, expected %.9g\n",
                c.divergence, static_cast<int>(c.revise), static_cast<int>(c.student),
                static_cast<int>(c.teacher), c.classes, what, row, got, expected);
  }
}

// The values as bytes of type T.
template <class T, class Convert>
std::vector<unsigned char> typed(std::vector<double>& values, Convert convert) {
  std::vector<unsigned char> bytes(values.size() * sizeof(T));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const T x = convert(static_cast<float>(values[i]));
    std::memcpy(&bytes[i * sizeof(T)], &x, sizeof x);
  }
  return bytes;
}

// Rounds the values to the type, in place, and returns them as bytes of the type.
std::vector<unsigned char> bytes_of(DType type, std::vector<double>& values) {
  switch (type) {
    case DType::kFloat64: {
      std::vector<unsigned char> bytes(values.size() * 8);
      if (!values.empty()) std::memcpy(bytes.data(), values.data(), bytes.size());
      return bytes;
    }
    case DType::kFloat32:
      for (double& x : values) x = static_cast<float>(x);
      return typed<float>(values, [](float x) { return x; });
    case DType::kBFloat16:
      for (double& x : values) x = __bfloat162float(__float2bfloat16_rn(static_cast<float>(x)));
      return typed<__nv_bfloat16>(values, [](float x) { return __float2bfloat16_rn(x); });
    default:
      for (double& x : values) x = __half2float(__float2half_rn(static_cast<float>(x)));
      return typed<__half>(values, [](float x) { return __float2half_rn(x); });
  }
}

double read(DType accumulate, const std::vector<unsigned char>& bytes, std::size_t i) {
  if (accumulate == DType::kFloat64) {
    double x;
    std::memcpy(&x, &bytes[i * 8], 8);
    return x;
  }
  float x;
  std::memcpy(&x, &bytes[i * 4], 4);
  return x;
}

void run(const Case& c) {
  std::mt19937 random(
      static_cast<unsigned>(c.classes * 7 + static_cast<std::size_t>(c.divergence)));
  std::normal_distribution<double> normal;
  const std::size_t n = kRows * c.classes;
  std::vector<double> z(n), v(n), r(n);
  std::vector<std::int64_t> y(kRows);
  for (double& x : z) x = 2.0 * normal(random);
  for (double& x : v) x = 3.0 * normal(random);
  for (double& x : r) x = normal(random);
  for (std::size_t row = 0; row < kRows; ++row)
    y[row] = static_cast<std::int64_t>(random() % c.classes);
  // Row 1 is ignored and full of NaN; in row 2 the teacher is right; row 3 has a tie between the
  // target and another class, row 4 a tie of two others; row 5 has a target out of range; in row 6
  // the student is confident; in row 7 it equals the teacher.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  y[1] = -100;
  for (std::size_t k = 0; k < c.classes; ++k) z[c.classes + k] = v[c.classes + k] = nan;
  const auto at = [&](std::size_t row, std::size_t k) { return row * c.classes + k % c.classes; };
  const auto target = [&](std::size_t row) { return static_cast<std::size_t>(y[row]); };
  v[at(2, target(2))] = 20.0;
  v[at(3, target(3))] = v[at(3, target(3) + 1)] = 20.0;
  v[at(4, target(4) + 1)] = v[at(4, target(4) + 2)] = 20.0;
  z[at(6, target(6))] = 30.0;
  for (std::size_t k = 0; k < c.classes; ++k) z[at(7, k)] = v[at(7, k)];

  const bool wide = c.student == DType::kFloat64 || c.teacher == DType::kFloat64;
  const DType accumulate = wide ? DType::kFloat64 : DType::kFloat32;
  const std::size_t element = wide ? 8 : 4;
  std::vector<unsigned char> student = bytes_of(c.student, z), teacher = bytes_of(c.teacher, v),
                             direction = bytes_of(accumulate, r);
  KdLossArgs args{};
  args.rows = kRows;
  args.classes = static_cast<std::int64_t>(c.classes);
  args.student_stride = args.teacher_stride = args.direction_stride = args.classes;
  args.teacher_rows = args.rows;
  args.student_type = c.student;
  args.teacher_type = c.teacher;
  args.accumulate = accumulate;
  args.target_is_int64 = true;
  args.ignore_index = -100;
  args.temperature = c.temperatures[0];
  args.temperature_count = static_cast<std::int32_t>(c.temperatures.size());
  std::copy(c.temperatures.begin(), c.temperatures.end(), args.temperatures);
  args.ce_weight = args.ce_weight_unselected = args.kd_weight = 1.0;
  args.eta = 0.7;
  args.revise = c.revise;
  args.revise_temperature = c.revise_temperature;
  args.reduction = lrds::Reduction::kSum;
  args.divergence = c.divergence;
  // jsd, skl and srkl have a weight inside (0, 1).
  const bool mixture = c.divergence == 7 || c.divergence == 9 || c.divergence == 10;
  const double parameters[] = {mixture ? 0.3 : 1.5, 2.5, 2.0};
  std::copy(parameters, parameters + 3, args.divergence_parameters);
  args.standardize = c.standardize;

  // --- Expected: the CPU in float64 ---
  std::vector<double> exact(kMoments * kRows, -1.0);
  std::vector<std::int64_t> top(kRows, -1);
  KdLossArgs host = args;
  host.accumulate = host.student_type = host.teacher_type = DType::kFloat64;
  host.student = z.data();
  host.teacher = v.data();
  host.target = y.data();
  host.direction = c.direction ? r.data() : nullptr;
  host.moments = exact.data();
  host.teacher_top = top.data();
  std::vector<double> scratch(static_cast<std::size_t>(
      lrds::cpu::detail::kFamilyScratchRows * lrds::cpu::detail::family_padded(args.classes)));
  const auto error =
      lrds::cpu::detail::kd_family_rows_double(host, {1.0, 1.0}, 0, kRows, scratch.data());
  if (error.kind != lrds::cpu::RowError::kNone) {
    std::printf("the CPU refuses row %lld\n", static_cast<long long>(error.row));
    std::exit(1);
  }
  const std::size_t bad = 5;
  y[bad] = args.classes;
  for (std::size_t i = 0; i < kMoments; ++i) exact[i * kRows + bad] = nan;
  top[bad] = args.classes;

  // --- CUDA, twice: with another order of threads and other initial outputs ---
  args.student = student.data();
  args.teacher = teacher.data();
  args.target = y.data();
  args.direction = c.direction ? direction.data() : nullptr;
  std::vector<unsigned char> first;
  for (const simt::Order order : {simt::Order::kForward, simt::Order::kShuffled}) {
    const unsigned char poison_byte = order == simt::Order::kForward ? 0xff : 0x5a;
    std::size_t bytes = 0;
    if (lrds::cuda::kd_moments_scratch_bytes(args, &bytes) != cudaSuccess) std::exit(1);
    std::vector<unsigned char> room(bytes, poison_byte),
        moments(kMoments * kRows * element, poison_byte);
    std::vector<std::int64_t> teacher_top(kRows, poison_byte);
    args.moments_scratch = room.data();
    args.moments = moments.data();
    args.teacher_top = teacher_top.data();
    simt::set_order(order, 7);
    if (const cudaError_t status = lrds::cuda::kd_moments(args, nullptr); status != cudaSuccess) {
      std::printf("launch failed with %d\n", static_cast<int>(status));
      std::exit(1);
    }
    if (first.empty()) first = moments;
    if (first != moments) report(c, "bits between two runs", 0, 0, 1);
    for (std::size_t row = 0; row < kRows; ++row) {
      if (teacher_top[row] != top[row])
        report(c, "top", row, double(teacher_top[row]), double(top[row]));
      double size = 1.0;
      for (std::size_t i = 0; i < kMoments; ++i) {
        if (std::isfinite(exact[i * kRows + row])) size += std::fabs(exact[i * kRows + row]);
      }
      for (std::size_t i = 0; i < kMoments; ++i) {
        const double got = read(accumulate, moments, i * kRows + row),
                     wanted = exact[i * kRows + row];
        const bool same = std::isnan(wanted)
                              ? std::isnan(got)
                              : std::fabs(got - wanted) <= (wide ? 1e-11 : 3e-5) * size;
        if (!same) report(c, "moment", row, got, wanted);
      }
    }
  }
}

}  // namespace

int main() {
  int cases = 0;
  const auto add = [&](const Case& c) {
    run(c);
    ++cases;
  };
  const DType f32 = DType::kFloat32, f64 = DType::kFloat64, bf16 = DType::kBFloat16,
              f16 = DType::kFloat16;
  for (int divergence = 0; divergence < lrds::Divergences::kCount; ++divergence) {
    for (const std::size_t classes : {1, 2, 33, 300}) {
      add({divergence, Revise::kLabelRevision, f32, f32, classes, {4.0}, false, true});
    }
    add({divergence, Revise::kNone, f64, f32, 70, {2.0}, false, true});
    add({divergence, Revise::kLabelRevision, f32, f32, 65, {4.0}, false, true, 1.0});
  }
  for (const Revise revise : {Revise::kNone, Revise::kLabelRevision, Revise::kMft}) {
    add({0, revise, bf16, f16, 100, {4.0}, false, true});
    add({0, revise, f32, bf16, 257, {1.0, 3.0}, false, false});
    add({0, revise, f32, f32, 65, {2.0}, true, true});
  }
  add({0, Revise::kLabelRevision, f32, f32, 5000, {4.0}, false, true});
  std::printf("%d cases, %d failures\n", cases, failures);
  return failures == 0 ? 0 : 1;
}
