// The float sweep over rows, written once over `Simd` (simd_*.h). A translation unit sets its
// instruction set and then includes this. Everything here has internal linkage, so that no code
// compiled for one instruction set is used for another.
//
// A row is read from memory once and stays in cache for three passes: maxima; exponentials and
// sums; gradient. A row that is revised at the revision's own temperature needs one more sum. The
// scalar part of a row is computed for a group of short rows at once, in the lanes of a vector. P >
// 0 means that the temperature is the integer P: exp(z) is then exp(z / T)^P and takes no
// exponential.
#pragma once

#include "cpu/simd_log.h"

namespace {

using lrds::KdLossArgs;
using lrds::RowParams;
using lrds::RowStats;
using lrds::RowWeights;
using lrds::cpu::RowError;

constexpr int kWidth = Simd::kWidth;
constexpr std::int64_t kTwoVectors = std::int64_t{2} * kWidth;
// A lane adds at most kBlock / kWidth terms before its partial sum is added to the total, which
// keeps sums over long rows accurate.
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

// Calls body with n as a constant if power<n> exists; returns whether it does.
template <class Body>
inline bool with_power(int n, Body body) {
  switch (n) {
    case 2:
      body(std::integral_constant<int, 2>());
      return true;
    case 3:
      body(std::integral_constant<int, 3>());
      return true;
    case 4:
      body(std::integral_constant<int, 4>());
      return true;
    case 8:
      body(std::integral_constant<int, 8>());
      return true;
    default:
      return false;
  }
}

// The n for which exp(x / R) = exp(x / T)^n, R the revision's temperature, if power<n> exists; else
// 0.
inline int revision_power(const KdLossArgs& args) {
  if (!lrds::revises_elsewhere(args, args.temperature)) return 0;
  constexpr int kPowers[] = {2, 3, 4, 8};
  for (const int power : kPowers) {
    if (args.temperature == power * args.revise_temperature) return power;
  }
  return 0;
}

// Calls body(k, n) for every vector of a row. n is kWidth, or less for the last one.
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
  for (; k + kTwoVectors <= classes; k += kTwoVectors) {
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
      // Lanes past the row hold the shift itself, so they add 0.
      sum =
          Simd::add(sum, Simd::sub(Simd::load(row + k, static_cast<int>(end - k), shift), shift_v));
    }
    total += Simd::reduce_add(sum);
  }
  return total;
}

}  // namespace

#include "cpu/kd_loss_lanes.h"
#include "cpu/kd_loss_short.h"

namespace {

struct Hyper {
  RowParams<float> params;
  float inv_t;
  bool smoothing;
  std::int64_t classes;
  int revision_power;
};

// Where the exponentials of a row are stored for its gradient; null if there is no gradient.
struct StoredExponentials {
  float* z;
  float* v;
};

// Addresses to prefetch while the exponentials of a row are computed: the next row's logits and
// this row's gradient.
template <class Z, class V>
struct Prefetch {
  const Z* z;
  const V* v;
  Z* gradient;
};

// The sums of one row for the terms that its weights need.
template <int P, bool CE, bool KD, class Z, class V>
RowStats<float> sum_row(const Hyper& hyper, const Z* z, const V* v, StoredExponentials stored,
                        Prefetch<Z, V> prefetch) {
  // With both terms and an integer T, exp(z) is a power of exp(z / T); else it is an exponential of
  // its own.
  constexpr bool kSeparate = CE && KD && P == 0;
  constexpr int kPower = P == 0 ? 1 : P;
  const std::int64_t classes = hyper.classes;
  RowStats<float> stats = lrds::empty_row_stats<float>();
  stats.max_z = row_max(z, classes);
  if constexpr (KD) stats.max_v = row_max(v, classes);
  const float shift_z = lrds::anchor(stats.max_z);
  const Simd::V max_z = Simd::set(shift_z), max_v = Simd::set(lrds::anchor(stats.max_v));
  // Without the KD term exp(z) is the only exponential, and T is 1.
  const Simd::V inv_t = Simd::set(KD ? hyper.inv_t : 1.0f);
  if constexpr (CE) {
    if (hyper.smoothing) stats.sum_shift = row_sum_shift(z, classes, shift_z);
  }
  const auto sums = [&](auto store_constant) {
    constexpr bool kStore = decltype(store_constant)::value;
    for (std::int64_t block = 0; block < classes; block += kBlock) {
      const std::int64_t end = block + kBlock < classes ? block + kBlock : classes;
      Simd::V sum_z = Simd::set(0.0f), sum_zt = sum_z, sum_vt = sum_z, dot = sum_z;
      for_each_vector(block, end, [&](std::int64_t k, auto n) {
        __builtin_prefetch(prefetch.z + k);
        if constexpr (KD) __builtin_prefetch(prefetch.v + k);
        if (prefetch.gradient != nullptr) __builtin_prefetch(prefetch.gradient + k, 1);
        const Simd::V dz = Simd::sub(load(z + k, n), max_z);
        const Simd::V ez = Simd::exp(Simd::mul(dz, inv_t));
        if constexpr (CE && KD) {
          sum_z = Simd::add(sum_z, kSeparate ? Simd::exp(dz) : power<kPower>(ez));
        }
        sum_zt = Simd::add(sum_zt, ez);
        if constexpr (kStore) Simd::store(stored.z + k, ez);
        if constexpr (KD) {
          const Simd::V dv = Simd::sub(load(v + k, n), max_v);
          const Simd::V ev = Simd::exp(Simd::mul(dv, inv_t));
          sum_vt = Simd::add(sum_vt, ev);
          dot = Simd::fma_where_positive(ev, Simd::sub(dv, dz), dot);
          if constexpr (kStore) Simd::store(stored.v + k, ev);
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
  if (stored.z != nullptr) {
    sums(std::true_type());
  } else {
    sums(std::false_type());
  }
  return stats;
}

// sum exp((v_k - max_v) / R). stored: the exponentials exp((v_k - max_v) / T), or null.
template <class V>
float revision_sum(const Hyper& hyper, const V* v, const float* stored, float max_v) {
  const auto sum = [&](auto term) {
    float total = 0.0f;
    for (std::int64_t block = 0; block < hyper.classes; block += kBlock) {
      const std::int64_t end = block + kBlock < hyper.classes ? block + kBlock : hyper.classes;
      Simd::V first = Simd::set(0.0f), second = first;
      std::int64_t k = block;
      for (; k + kTwoVectors <= end; k += kTwoVectors) {
        first = Simd::add(first, term(k, std::integral_constant<int, kWidth>()));
        second = Simd::add(second, term(k + kWidth, std::integral_constant<int, kWidth>()));
      }
      for_each_vector(k, end,
                      [&](std::int64_t i, auto n) { first = Simd::add(first, term(i, n)); });
      total += Simd::reduce_add(Simd::add(first, second));
    }
    return total;
  };
  // The stored exponentials past the end of a row are 0.
  float of_stored = 0.0f;
  if (stored != nullptr && with_power(hyper.revision_power, [&](auto n) {
        of_stored = sum([&](std::int64_t k, auto) { return power<n()>(Simd::load(stored + k)); });
      })) {
    return of_stored;
  }
  const Simd::V shift = Simd::set(lrds::anchor(max_v));
  const Simd::V scale = Simd::set(hyper.params.inv_revise_temperature);
  return sum([&](std::int64_t k, auto n) {
    return Simd::exp(Simd::mul(Simd::sub(load(v + k, n), shift), scale));
  });
}

// The coefficients of the gradient of one row.
struct RowGradient {
  float on_z, on_zt, on_vt, smoothing, at_target;
  float shift_z, shift_v;
};

// Writes dL/dz of one row.
template <int P, bool CE, bool KD, class Z>
void write_row(const Hyper& hyper, const Z* z, std::int64_t y, StoredExponentials stored,
               const RowGradient& row, Z* gradient) {
  constexpr bool kSeparate = CE && KD && P == 0;
  constexpr int kPower = P == 0 ? 1 : P;
  const Simd::V shift_z = Simd::set(row.shift_z);
  const Simd::V on_z = Simd::set(row.on_z), on_zt = Simd::set(row.on_zt),
                on_vt = Simd::set(row.on_vt), smoothing = Simd::set(row.smoothing);
  for_each_vector(0, hyper.classes, [&](std::int64_t k, auto n) {
    const Simd::V ez = Simd::load(stored.z + k);
    Simd::V g;
    if constexpr (CE && KD) {
      const Simd::V ez1 =
          kSeparate ? Simd::exp(Simd::sub(load(z + k, n), shift_z)) : power<kPower>(ez);
      g = Simd::fma(on_zt, ez, Simd::sub(Simd::mul(on_z, ez1), smoothing));
    } else if constexpr (CE) {
      g = Simd::sub(Simd::mul(on_z, ez), smoothing);
    } else {
      g = Simd::mul(on_zt, ez);
    }
    if constexpr (KD) g = Simd::fnma(on_vt, Simd::load(stored.v + k), g);
    store(gradient + k, g, n);
  });
  // The element at the target is complete in float and rounded once.
  lrds::cpu::from_float(row.at_target, gradient + y);
}

// The teacher's row as V, which is float if its type differs from the student's.
template <class V>
const V* teacher_row(const KdLossArgs& args, std::int64_t row, float* converted) {
  const std::int64_t offset = row * args.teacher_stride;
  if constexpr (std::is_same_v<V, float>) {
    const auto convert = [&](const auto* from) -> const float* {
      for_each_vector(0, args.classes, [&](std::int64_t k, auto n) {
        Simd::store(converted + k, load(from + k, n));
      });
      return converted;
    };
    switch (args.teacher_type) {
      case lrds::DType::kBFloat16:
        return convert(static_cast<const lrds::cpu::BFloat16*>(args.teacher) + offset);
      case lrds::DType::kFloat16:
        return convert(static_cast<const lrds::cpu::Float16*>(args.teacher) + offset);
      default:
        break;
    }
  }
  return static_cast<const V*>(args.teacher) + offset;
}

// A row of a group between its sums and its gradient.
template <class Z, class V>
struct PendingRow {
  const Z* z;
  const V* v;  // null: no KD term
  Z* gradient;
  std::int64_t y;
  float z_y, v_y;
  int flags;
  RowWeights<float> weights;
  float scale;  // of the gradient
  RowStats<float> stats;
  float sum_vr;  // as in row_target
  // Set by finish_single or finish_group:
  float ce, kd;
  RowGradient coefficients;

  bool is_read() const { return weights.ce != 0.0f || weights.kd != 0.0f; }
};

// The scalar part of one row.
template <class Row>
void finish_single(const Hyper& hyper, Row& row) {
  const lrds::RowResult<float> result =
      lrds::finish_row(row.stats, row.z_y, row.v_y, row.sum_vr, hyper.params, row.weights,
                       static_cast<float>(hyper.classes), row.scale);
  const float shift_z = lrds::anchor(row.stats.max_z), shift_v = lrds::anchor(row.stats.max_v);
  const float dz = row.z_y - shift_z, dv = row.v_y - shift_v;
  float at_target = result.at_target - result.smoothing;
  if (row.weights.ce != 0.0f) at_target += result.coefficient_z * lrds::row_exp(dz);
  if (row.weights.kd != 0.0f) {
    at_target += result.coefficient_zt * lrds::row_exp(dz * hyper.inv_t) -
                 result.coefficient_vt * lrds::row_exp(dv * hyper.inv_t);
  }
  row.ce = result.ce;
  row.kd = result.kd;
  row.flags |= result.revised ? lrds::kRowRevised : 0;
  row.coefficients = RowGradient{result.coefficient_z,
                                 result.coefficient_zt,
                                 result.coefficient_vt,
                                 result.smoothing,
                                 at_target,
                                 shift_z,
                                 shift_v};
}

// The scalar part of a group of rows, one row per lane.
template <class Row>
void finish_group(const Hyper& hyper, Row* rows, int count) {
  Lanes lanes{};
  RowStats<Simd::V> stats = empty_lanes();
  for (int lane = 0; lane < count; ++lane) {
    const Row& row = rows[lane];
    if (!row.is_read()) continue;
    stats.max_z[lane] = row.stats.max_z;
    stats.sum_z[lane] = row.stats.sum_z;
    stats.sum_zt[lane] = row.stats.sum_zt;
    stats.sum_shift[lane] = row.stats.sum_shift;
    stats.max_v[lane] = row.stats.max_v;
    stats.sum_vt[lane] = row.stats.sum_vt;
    stats.dot[lane] = row.stats.dot;
    lanes.ce_weight[lane] = row.weights.ce;
    lanes.kd_weight[lane] = row.weights.kd;
    lanes.scale[lane] = row.scale;
    lanes.z_y[lane] = row.z_y;
    lanes.v_y[lane] = row.v_y;
    lanes.sum_vr[lane] = row.sum_vr;
  }
  const LaneTerms terms =
      finish_lanes(stats, lanes, hyper.params, static_cast<float>(hyper.classes));
  const Simd::V shift_z = anchor_lanes(stats.max_z), shift_v = anchor_lanes(stats.max_v);
  const Simd::V at_target = target_lanes(terms, lanes, shift_z, shift_v, hyper.inv_t);
  for (int lane = 0; lane < count; ++lane) {
    Row& row = rows[lane];
    row.ce = terms.ce[lane];
    row.kd = terms.kd[lane];
    row.flags |= terms.revised[lane] != 0.0f ? lrds::kRowRevised : 0;
    row.coefficients =
        RowGradient{terms.on_z[lane], terms.on_zt[lane], terms.on_vt[lane], terms.smoothing[lane],
                    at_target[lane],  shift_z[lane],     shift_v[lane]};
  }
}

// Calls with_terms with the constants (P, CE, KD) for the terms that the weights need.
template <int P, class WithTerms>
inline auto visit_terms(RowWeights<float> weights, WithTerms with_terms) {
  using One = std::integral_constant<int, 1>;
  if (weights.kd == 0.0f) return with_terms(One(), std::true_type(), std::false_type());
  if (weights.ce == 0.0f) return with_terms(One(), std::false_type(), std::true_type());
  return with_terms(std::integral_constant<int, P>(), std::true_type(), std::true_type());
}

// The inputs of a row other than its logits.
struct RowInputs {
  std::int64_t y = 0;
  RowWeights<float> weights{};
  int flags = 0;
  RowError error{RowError::kNone, 0};
};

// A row past the end gets weights of 0 and is not read.
inline RowInputs open_row(const KdLossArgs& args, const RowParams<float>& params,
                          std::int64_t index, std::int64_t end) {
  RowInputs row;
  if (index >= end) return row;
  float w;
  row.error = lrds::cpu::read_row(args, index, &row.y, &w);
  if (row.error.kind != RowError::kNone || row.y == args.ignore_index) return row;
  row.weights = lrds::row_weights(params, w);
  row.flags = lrds::kRowValid | (w > 0.0f ? lrds::kRowSelected : 0);
  return row;
}

// Computes rows in groups whose exponentials fit in the first-level cache: the sums of each row,
// then the scalar part of all rows in the lanes of a vector, then the gradient of each row. A long
// row is a group by itself.
template <int P, class Z, class V>
RowError sweep_rows(const KdLossArgs& args, double gradient_scale, std::int64_t begin,
                    std::int64_t end, float* scratch) {
  if (args.classes <= kShortClasses) {
    return sweep_short_rows<P, Z>(args, gradient_scale, begin, end);
  }
  const RowParams<float> params = lrds::row_params<float>(args);
  const Hyper hyper{params, params.inv_temperature, params.label_smoothing != 0.0f, args.classes,
                    revision_power(args)};
  const std::int64_t classes = args.classes;
  const std::int64_t padded = lrds::cpu::detail::scratch_padded(classes);
  const std::int64_t fit = lrds::cpu::detail::group_rows(classes);
  const std::int64_t group = fit < kWidth ? fit : kWidth;
  const bool stores = args.gradient != nullptr;
  const auto stored_of = [&](std::int64_t lane) {
    return stores
               ? StoredExponentials{scratch + 2 * lane * padded, scratch + (2 * lane + 1) * padded}
               : StoredExponentials{nullptr, nullptr};
  };
  // A teacher row converted to float. One is enough: in a group of several rows, the gradient reads
  // the stored exponentials only.
  float* const converted = scratch + 2 * group * padded;
  const V* converted_row = nullptr;  // the result of teacher_row if it converts
  if constexpr (std::is_same_v<V, float>) converted_row = converted;
  const float* const grad_output = static_cast<const float*>(args.grad_output);
  PendingRow<Z, V> pending[kWidth];

  RowInputs next = open_row(args, params, begin, end);
  for (std::int64_t first = begin; first < end; first += group) {
    const int count = static_cast<int>(group < end - first ? group : end - first);
    for (int lane = 0; lane < count; ++lane) {
      const std::int64_t index = first + lane;
      PendingRow<Z, V>& row = pending[lane];
      row = {};
      row.z = static_cast<const Z*>(args.student) + index * args.student_stride;
      if (args.gradient != nullptr) row.gradient = static_cast<Z*>(args.gradient) + index * classes;
      const RowInputs inputs = next;
      if (inputs.error.kind != RowError::kNone) return inputs.error;
      next = open_row(args, params, index + 1, end);
      row.y = inputs.y;
      row.weights = inputs.weights;
      row.flags = inputs.flags;
      if (!row.is_read()) continue;
      if (row.weights.kd != 0.0f) row.v = teacher_row<V>(args, index, converted);
      // If the next row is not read, prefetches this row again, which is in cache.
      Prefetch<Z, V> prefetch{row.z, row.v, row.gradient};
      if (next.weights.ce != 0.0f || next.weights.kd != 0.0f) prefetch.z += args.student_stride;
      if (next.weights.kd != 0.0f && row.v != nullptr && row.v != converted_row) {
        prefetch.v += args.teacher_stride;
      }
      row.stats = visit_terms<P>(row.weights, [&](auto p, auto ce, auto kd) {
        return sum_row<p(), ce(), kd(), Z, V>(hyper, row.z, row.v, stored_of(lane), prefetch);
      });
      row.z_y = lrds::cpu::to_float(row.z[row.y]);
      if (row.v != nullptr) {
        row.v_y = lrds::cpu::to_float(row.v[row.y]);
        if (lrds::needs_sum_vr(params, row.v_y, row.stats.max_v)) {
          row.sum_vr = revision_sum(hyper, row.v, stored_of(lane).v, row.stats.max_v);
        }
      }
      double scale = gradient_scale;
      if (grad_output != nullptr) scale *= grad_output[index * args.grad_output_stride];
      row.scale = static_cast<float>(scale);
    }
    // group, and so the choice, depends on the number of classes only.
    if (group > 1) {
      finish_group(hyper, pending, count);
    } else if (pending[0].is_read()) {
      finish_single(hyper, pending[0]);
    }
    for (int lane = 0; lane < count; ++lane) {
      const PendingRow<Z, V>& row = pending[lane];
      if (args.counts != nullptr) {
        static_cast<float*>(args.ce)[first + lane] = row.ce;
        static_cast<float*>(args.kd)[first + lane] = row.kd;
        args.flags[first + lane] = static_cast<std::uint8_t>(row.flags);
      }
      if (row.gradient == nullptr) continue;
      if (!row.is_read()) {
        std::memset(static_cast<void*>(row.gradient), 0, classes * sizeof(Z));
        continue;
      }
      visit_terms<P>(row.weights, [&](auto p, auto ce, auto kd) {
        write_row<p(), ce(), kd(), Z>(hyper, row.z, row.y, stored_of(lane), row.coefficients,
                                      row.gradient);
      });
    }
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

[[maybe_unused]] RowError sweep_by_type(const KdLossArgs& args, double gradient_scale,
                                        std::int64_t begin, std::int64_t end, void* scratch) {
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
