// The float sweep over rows, written once over `Simd` (simd_*.h). Each translation unit that
// includes this sets its target first; everything here has internal linkage, so no instruction set
// leaks into another.
//
// A row is read from memory once and stays in cache for three short passes: maxima; exponentials
// and sums; gradient. Power P > 0 says that T is that integer, so exp(z) is exp(z / T) raised to it
// instead of a second exponential.
#pragma once

#include "cpu/simd_log.h"

namespace {

using lrds::KdLossArgs;
using lrds::RowParams;
using lrds::RowStats;
using lrds::RowWeights;
using lrds::cpu::RowError;

constexpr int kWidth = Simd::kWidth;
// Sums are folded every kBlock classes: a lane adds at most kBlock / kWidth terms before its
// partial sum joins the total, which keeps long rows accurate.
constexpr std::int64_t kBlock = 4096;

template <int P>
inline Simd::V power(Simd::V x) {
  static_assert(P == 1 || P == 2 || P == 3 || P == 4 || P == 8, "unrolled by hand");
  if constexpr (P == 1) return x;
  const Simd::V square = Simd::mul(x, x);
  if constexpr (P == 2) return square;
  if constexpr (P == 3) return Simd::mul(square, x);
  const Simd::V fourth = Simd::mul(square, square);
  if constexpr (P == 4) return fourth;
  return Simd::mul(fourth, fourth);
}

// Calls body(k, n) for every vector of a row: n = kWidth, and once less for the tail.
template <class Body>
inline void for_each_vector(std::int64_t begin, std::int64_t end, Body body) {
  std::int64_t k = begin;
  for (; k + kWidth <= end; k += kWidth) body(k, std::integral_constant<int, kWidth>());
  if (k < end) body(k, static_cast<int>(end - k));
}

template <class T, int N>
inline Simd::V load(const T* p, std::integral_constant<int, N>) {
  return Simd::load(p);
}
template <class T>
inline Simd::V load(const T* p, int n) {
  return Simd::load(p, n, -__builtin_inff());
}
template <class T, int N>
inline void store(T* p, Simd::V v, std::integral_constant<int, N>) {
  Simd::store(p, v);
}
template <class T>
inline void store(T* p, Simd::V v, int n) {
  Simd::store(p, v, n);
}

template <class T>
inline float row_max(const T* row, std::int64_t classes) {
  Simd::V top = Simd::set(-__builtin_inff()), top2 = top;
  std::int64_t k = 0;
  for (; k + 2 * kWidth <= classes; k += 2 * kWidth) {
    top = Simd::max(top, Simd::load(row + k));
    top2 = Simd::max(top2, Simd::load(row + k + kWidth));
  }
  for_each_vector(k, classes,
                  [&](std::int64_t i, auto n) { top = Simd::max(top, load(row + i, n)); });
  return Simd::reduce_max(Simd::max(top, top2));
}

template <class T>
inline float row_sum_shift(const T* row, std::int64_t classes, float shift) {
  float total = 0.0f;
  const Simd::V shift_v = Simd::set(shift);
  for (std::int64_t block = 0; block < classes; block += kBlock) {
    const std::int64_t end = block + kBlock < classes ? block + kBlock : classes;
    Simd::V sum = Simd::set(0.0f);
    std::int64_t k = block;
    for (; k + kWidth <= end; k += kWidth)
      sum = Simd::add(sum, Simd::sub(Simd::load(row + k), shift_v));
    if (k < end) {
      // Lanes past the row hold the shift itself and add 0.
      sum =
          Simd::add(sum, Simd::sub(Simd::load(row + k, static_cast<int>(end - k), shift), shift_v));
    }
    total += Simd::reduce_add(sum);
  }
  return total;
}

}  // namespace

#include "cpu/kd_loss_short.h"

namespace {

struct Hyper {
  RowParams<float> params;
  float inv_t;
  bool smoothing;
  std::int64_t classes;
};

// One row with whichever terms its weights ask for: CE, KD. Writes the gradient if `gradient` is
// not null.
template <int P, bool CE, bool KD, class Z, class V>
lrds::RowResult<float> sweep_row(const Hyper& hyper, const Z* z, const V* v, std::int64_t y,
                                 RowWeights<float> weights, float gradient_scale, Z* gradient,
                                 float* scratch_z, float* scratch_v) {
  // With both terms and an integer T one exponential serves both; otherwise the CE exponential is
  // its own.
  constexpr bool kSeparate = CE && KD && P == 0;
  constexpr int kPower = P == 0 ? 1 : P;
  const std::int64_t classes = hyper.classes;
  RowStats<float> stats = lrds::empty_row_stats<float>();
  stats.max_z = row_max(z, classes);
  if constexpr (KD) stats.max_v = row_max(v, classes);
  const float shift_z = lrds::anchor(stats.max_z);
  const float shift_v = lrds::anchor(stats.max_v);
  const Simd::V max_z = Simd::set(shift_z), max_v = Simd::set(shift_v);
  // Without a KD term the only exponential is exp(z): T is 1.
  const Simd::V inv_t = Simd::set(KD ? hyper.inv_t : 1.0f);
  if constexpr (CE) {
    if (hyper.smoothing) stats.sum_shift = row_sum_shift(z, classes, shift_z);
  }

  const bool keep = gradient != nullptr && classes <= lrds::cpu::detail::kScratchClasses;
  const auto sums = [&](auto keep_constant) {
    constexpr bool kKeep = decltype(keep_constant)::value;
    for (std::int64_t block = 0; block < classes; block += kBlock) {
      const std::int64_t end = block + kBlock < classes ? block + kBlock : classes;
      Simd::V sum_z = Simd::set(0.0f), sum_zt = sum_z, sum_vt = sum_z, dot = sum_z;
      for_each_vector(block, end, [&](std::int64_t k, auto n) {
        const Simd::V dz = Simd::sub(load(z + k, n), max_z);
        const Simd::V ez = Simd::exp(Simd::mul(dz, inv_t));
        if constexpr (CE && KD) {
          sum_z = Simd::add(sum_z, kSeparate ? Simd::exp(dz) : power<kPower>(ez));
        }
        sum_zt = Simd::add(sum_zt, ez);
        if constexpr (kKeep) Simd::store(scratch_z + k, ez);
        if constexpr (KD) {
          const Simd::V dv = Simd::sub(load(v + k, n), max_v);
          const Simd::V ev = Simd::exp(Simd::mul(dv, inv_t));
          sum_vt = Simd::add(sum_vt, ev);
          dot = Simd::fma_where_positive(ev, Simd::sub(dv, dz), dot);
          if constexpr (kKeep) Simd::store(scratch_v + k, ev);
        }
      });
      if constexpr (CE && KD) stats.sum_z += Simd::reduce_add(sum_z);
      if constexpr (CE && !KD) stats.sum_z += Simd::reduce_add(sum_zt);
      if constexpr (KD) {
        stats.sum_zt += Simd::reduce_add(sum_zt);
        stats.sum_vt += Simd::reduce_add(sum_vt);
        stats.dot += Simd::reduce_add(dot);
      }
    }
  };
  if (keep) {
    sums(std::true_type());
  } else {
    sums(std::false_type());
  }

  const float z_y = lrds::cpu::to_float(z[y]);
  const float v_y = KD ? lrds::cpu::to_float(v[y]) : 0.0f;
  const lrds::RowResult<float> result = lrds::finish_row(
      stats, z_y, v_y, hyper.params, weights, static_cast<float>(classes), gradient_scale);
  if (gradient == nullptr) return result;

  const Simd::V on_z = Simd::set(result.coefficient_z), on_zt = Simd::set(result.coefficient_zt),
                on_vt = Simd::set(result.coefficient_vt), smoothing = Simd::set(result.smoothing);
  // dL/dz_k from the exponentials, the target's constant aside.
  const auto combine = [&](Simd::V ez, Simd::V ez1, Simd::V ev) {
    Simd::V g;
    if constexpr (CE && KD) {
      g = Simd::fma(on_zt, ez, Simd::sub(Simd::mul(on_z, ez1), smoothing));
    } else if constexpr (CE) {
      g = Simd::sub(Simd::mul(on_z, ez), smoothing);
    } else {
      g = Simd::mul(on_zt, ez);
    }
    if constexpr (KD) g = Simd::fnma(on_vt, ev, g);
    return g;
  };
  const auto gradients = [&](auto keep_constant) {
    constexpr bool kKeep = decltype(keep_constant)::value;
    for_each_vector(0, classes, [&](std::int64_t k, auto n) {
      Simd::V dz{}, ez, ez1{}, ev{};
      if constexpr (!kKeep || kSeparate) dz = Simd::sub(load(z + k, n), max_z);
      if constexpr (kKeep) {
        ez = Simd::load(scratch_z + k);
        if constexpr (KD) ev = Simd::load(scratch_v + k);
      } else {
        ez = Simd::exp(Simd::mul(dz, inv_t));
        if constexpr (KD) ev = Simd::exp(Simd::mul(Simd::sub(load(v + k, n), max_v), inv_t));
      }
      if constexpr (CE && KD) ez1 = kSeparate ? Simd::exp(dz) : power<kPower>(ez);
      store(gradient + k, combine(ez, ez1, ev), n);
    });
  };
  // The target's own element is formed in float and rounded once, after the row.
  float at_target = result.at_target - result.smoothing;
  const float dz_y = z_y - shift_z;
  if constexpr (CE) at_target += result.coefficient_z * lrds::row_exp(dz_y);
  if constexpr (KD) {
    at_target += result.coefficient_zt * lrds::row_exp(dz_y * hyper.inv_t) -
                 result.coefficient_vt * lrds::row_exp((v_y - shift_v) * hyper.inv_t);
  }
  if (keep) {
    gradients(std::true_type());
  } else {
    gradients(std::false_type());
  }
  lrds::cpu::from_float(at_target, gradient + y);
  return result;
}

template <class T>
const float* teacher_as_float(const T* row, std::int64_t classes, float* converted) {
  for_each_vector(0, classes,
                  [&](std::int64_t k, auto n) { Simd::store(converted + k, load(row + k, n)); });
  return converted;
}

template <int P, class Z, class V>
RowError sweep_rows(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                    std::int64_t end, float* scratch) {
  if (args.classes <= kShortClasses) {
    return sweep_short_rows<P, Z>(args, gradient_scale, begin, end);
  }
  const RowParams<float> params = lrds::row_params<float>(args);
  const Hyper hyper{params, params.inv_temperature, params.label_smoothing != 0.0f, args.classes};
  const std::int64_t classes = args.classes;
  const std::int64_t padded = (classes + 63) / 64 * 64 + lrds::cpu::detail::kScratchSlack;
  const bool keeps = classes <= lrds::cpu::detail::kScratchClasses;
  float* const scratch_z = scratch;
  float* const scratch_v = keeps ? scratch + padded : scratch;
  float* const converted = keeps ? scratch + 2 * padded : scratch;
  float* const ce = static_cast<float*>(args.ce);
  float* const kd = static_cast<float*>(args.kd);
  const float* const grad_output = static_cast<const float*>(args.grad_output);
  const auto put = [&](std::int64_t row, float row_ce, float row_kd, int flags) {
    if (args.counts == nullptr) return;
    ce[row] = row_ce;
    kd[row] = row_kd;
    args.flags[row] = static_cast<std::uint8_t>(flags);
  };

  for (std::int64_t row = begin; row < end; ++row) {
    const Z* const z = static_cast<const Z*>(args.student) + row * args.student_stride;
    Z* const gradient =
        args.gradient == nullptr ? nullptr : static_cast<Z*>(args.gradient) + row * classes;
    float w;
    std::int64_t y;
    const RowError error = lrds::cpu::read_row(args, row, &y, &w);
    if (error.kind != RowError::kNone) return error;
    const bool valid = y != args.ignore_index;
    const RowWeights<float> weights =
        valid ? lrds::row_weights(params, w) : RowWeights<float>{0.0f, 0.0f};
    const int flags = valid ? lrds::kRowValid | (w > 0.0f ? lrds::kRowSelected : 0) : 0;
    if (weights.ce == 0.0f && weights.kd == 0.0f) {
      if (gradient != nullptr) std::memset(static_cast<void*>(gradient), 0, classes * sizeof(Z));
      put(row, 0.0f, 0.0f, flags);
      continue;
    }
    double scale = gradient_scale;
    if (grad_output != nullptr) scale *= grad_output[row * args.grad_output_stride];
    const float row_scale = static_cast<float>(scale);

    lrds::RowResult<float> result;
    if (weights.kd == 0.0f) {
      result = sweep_row<1, true, false, Z, V>(hyper, z, nullptr, y, weights, row_scale, gradient,
                                               scratch_z, scratch_v);
    } else {
      const V* v;
      if constexpr (std::is_same_v<V, float>) {
        v = args.teacher_type == lrds::DType::kFloat32
                ? static_cast<const float*>(args.teacher) + row * args.teacher_stride
            : args.teacher_type == lrds::DType::kBFloat16
                ? teacher_as_float(static_cast<const lrds::cpu::BFloat16*>(args.teacher) +
                                       row * args.teacher_stride,
                                   classes, converted)
                : teacher_as_float(static_cast<const lrds::cpu::Float16*>(args.teacher) +
                                       row * args.teacher_stride,
                                   classes, converted);
      } else {
        v = static_cast<const V*>(args.teacher) + row * args.teacher_stride;
      }
      result = weights.ce == 0.0f
                   ? sweep_row<1, false, true, Z, V>(hyper, z, v, y, weights, row_scale, gradient,
                                                     scratch_z, scratch_v)
                   : sweep_row<P, true, true, Z, V>(hyper, z, v, y, weights, row_scale, gradient,
                                                    scratch_z, scratch_v);
    }
    put(row, result.ce, result.kd, flags | (result.revised ? lrds::kRowRevised : 0));
  }
  return RowError{RowError::kNone, 0};
}

template <class Z, class V>
RowError sweep_by_temperature(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                              std::int64_t end, float* scratch) {
  const double t = args.temperature;
  const auto sweep = t == 1.0   ? sweep_rows<1, Z, V>
                     : t == 2.0 ? sweep_rows<2, Z, V>
                     : t == 3.0 ? sweep_rows<3, Z, V>
                     : t == 4.0 ? sweep_rows<4, Z, V>
                     : t == 8.0 ? sweep_rows<8, Z, V>
                                : sweep_rows<0, Z, V>;
  return sweep(args, gradient_scale, begin, end, scratch);
}

RowError sweep_by_type(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                       std::int64_t end, void* scratch) {
  using lrds::DType;
  using lrds::cpu::BFloat16;
  using lrds::cpu::Float16;
  float* const memory = static_cast<float*>(scratch);
  const DType student = args.student_type;
  const bool same = args.teacher_type == student;
  const auto sweep =
      student == DType::kFloat32 ? sweep_by_temperature<float, float>
      : student == DType::kBFloat16
          ? (same ? sweep_by_temperature<BFloat16, BFloat16>
                  : sweep_by_temperature<BFloat16, float>)
          : (same ? sweep_by_temperature<Float16, Float16> : sweep_by_temperature<Float16, float>);
  return sweep(args, gradient_scale, begin, end, memory);
}

}  // namespace
