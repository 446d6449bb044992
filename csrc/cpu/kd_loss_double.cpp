#include "cpu/kd_loss_double.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/half.h"
#include "cpu/kd_loss_row.h"

namespace lrds::cpu::detail {
namespace {

template <class T>
void widen(const void* base, std::int64_t offset, std::int64_t classes, double* out) {
  const T* const row = static_cast<const T*>(base) + offset;
  for (std::int64_t k = 0; k < classes; ++k) {
    if constexpr (std::is_same_v<T, double>) {
      out[k] = row[k];
    } else {
      out[k] = to_float(row[k]);
    }
  }
}

void widen(DType type, const void* base, std::int64_t offset, std::int64_t classes, double* out) {
  switch (type) {
    case DType::kFloat64:
      return widen<double>(base, offset, classes, out);
    case DType::kFloat32:
      return widen<float>(base, offset, classes, out);
    case DType::kBFloat16:
      return widen<BFloat16>(base, offset, classes, out);
    case DType::kFloat16:
      return widen<Float16>(base, offset, classes, out);
  }
}

template <class T>
void narrow(const double* row, std::int64_t classes, void* base, std::int64_t offset) {
  T* const out = static_cast<T*>(base) + offset;
  for (std::int64_t k = 0; k < classes; ++k) {
    if constexpr (std::is_same_v<T, double>) {
      out[k] = row[k];
    } else {
      from_float(static_cast<float>(row[k]), out + k);
    }
  }
}

void narrow(DType type, const double* row, std::int64_t classes, void* base, std::int64_t offset) {
  switch (type) {
    case DType::kFloat64:
      return narrow<double>(row, classes, base, offset);
    case DType::kFloat32:
      return narrow<float>(row, classes, base, offset);
    case DType::kBFloat16:
      return narrow<BFloat16>(row, classes, base, offset);
    case DType::kFloat16:
      return narrow<Float16>(row, classes, base, offset);
  }
}

double row_max(const double* row, std::int64_t classes) {
  double top = row[0];
  for (std::int64_t k = 1; k < classes; ++k) top = row[k] > top ? row[k] : top;
  return top;
}

}  // namespace

RowError kd_loss_rows_double(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                             std::int64_t end, void* scratch) {
  const RowParams<double> params = row_params<double>(args);
  const std::int64_t classes = args.classes;
  double* const z = static_cast<double*>(scratch);
  double* const v = z + classes;
  double* const g = v + classes;
  double* const ce = static_cast<double*>(args.ce);
  double* const kd = static_cast<double*>(args.kd);
  const double* const grad_output = static_cast<const double*>(args.grad_output);

  for (std::int64_t row = begin; row < end; ++row) {
    std::int64_t y;
    double w = 1.0;
    const RowError error = read_row(args, row, &y, &w);
    if (error.kind != RowError::kNone) return error;
    const bool valid = y != args.ignore_index;
    const RowWeights<double> weights =
        valid ? row_weights(params, w) : RowWeights<double>{0.0, 0.0};
    const bool has_ce = weights.ce != 0.0, has_kd = weights.kd != 0.0;
    RowResult<double> result{};
    RowStats<double> stats = empty_row_stats<double>();
    if (has_ce || has_kd) {
      widen(args.student_type, args.student, row * args.student_stride, classes, z);
      stats.max_z = row_max(z, classes);
      const double shift_z = anchor(stats.max_z);
      for (std::int64_t k = 0; k < classes; ++k) {
        const double dz = z[k] - shift_z;
        if (has_ce) stats.sum_z += std::exp(dz);
        if (has_ce) stats.sum_shift += dz;
        if (has_kd) stats.sum_zt += std::exp(dz * params.inv_temperature);
      }
      double shift_v = 0.0;
      if (has_kd) {
        widen(args.teacher_type, args.teacher, row * args.teacher_stride, classes, v);
        stats.max_v = row_max(v, classes);
        shift_v = anchor(stats.max_v);
        for (std::int64_t k = 0; k < classes; ++k) {
          const double dv = v[k] - shift_v;
          const double ev = std::exp(dv * params.inv_temperature);
          stats.sum_vt += ev;
          if (ev > 0.0) stats.dot += ev * (dv - (z[k] - shift_z));
        }
      }
      double scale = gradient_scale;
      if (grad_output != nullptr) scale *= grad_output[row * args.grad_output_stride];
      result = finish_row(stats, z[y], has_kd ? v[y] : 0.0, params, weights,
                          static_cast<double>(classes), scale);
      if (args.gradient != nullptr) {
        for (std::int64_t k = 0; k < classes; ++k) {
          const double dz = z[k] - shift_z;
          double gradient = -result.smoothing;
          if (has_ce) gradient += result.coefficient_z * std::exp(dz);
          if (has_kd) {
            gradient += result.coefficient_zt * std::exp(dz * params.inv_temperature) -
                        result.coefficient_vt * std::exp((v[k] - shift_v) * params.inv_temperature);
          }
          g[k] = gradient;
        }
        g[y] += result.at_target;
      }
    } else if (args.gradient != nullptr) {
      std::memset(g, 0, classes * sizeof(double));
    }
    if (args.gradient != nullptr)
      narrow(args.student_type, g, classes, args.gradient, row * classes);
    if (args.counts != nullptr) {
      ce[row] = result.ce;
      kd[row] = result.kd;
      args.flags[row] = static_cast<std::uint8_t>((valid ? kRowValid : 0) |
                                                  (valid && w > 0.0 ? kRowSelected : 0) |
                                                  (result.revised ? kRowRevised : 0));
    }
  }
  return {RowError::kNone, 0};
}

}  // namespace lrds::cpu::detail
