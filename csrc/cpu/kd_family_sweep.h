// Rows of every divergence, revision and target that kd_loss_sweep.h does not know: the row
// template of core/kd_row.h over SIMD positions. A row is widened into scratch first, so that the
// loops see whole vectors of float (or double) and nothing else: past the row's end and at the
// target stand -inf, which no sum notices.
//
// Included with Simd defined, by one translation unit per instruction set and one for double; all
// of it has internal linkage.
#pragma once

#include "core/divergences.h"
#include "core/kd_row.h"
#include "cpu/half.h"
#include "cpu/kd_loss.h"
#include "cpu/kd_loss_row.h"

namespace {

using lrds::KdLossArgs;
using lrds::RowParams;
using lrds::RowWeights;
using lrds::cpu::RowError;

// The math of core/divergence.h over Simd's vectors.
template <class Simd>
struct RowMath {
  using A = typename Simd::A;
  using X = typename Simd::V;
  static X exp(X x) { return Simd::exp(x); }
  static X log(X x) { return Simd::log(x); }
  static X where_positive(X condition, X x) { return condition > X{} ? x : X{}; }
  static X where_positive(X condition, X x, X otherwise) { return condition > X{} ? x : otherwise; }
  static X where_less(X a, A b, X x, X otherwise) { return a < (X{} + b) ? x : otherwise; }
  // a - b, 0 where they are equal: also where both are -inf.
  static X difference(X a, X b) { return a == b ? X{} : a - b; }
};

template <class Simd>
class ScratchRow {
 public:
  using M = RowMath<Simd>;
  using A = typename M::A;
  using X = typename M::X;

  const A* student;
  const A* teacher;
  const A* soft_target;
  const A* class_weight;
  A* gradient;
  int classes;
  int target;

  X z(int k) const { return Simd::load(student + k); }
  X v(int k) const { return Simd::load(teacher + k); }
  X t(int k) const { return Simd::load(soft_target + k); }
  X w(int k) const { return Simd::load(class_weight + k); }
  X others(int k, X x) const {
    if (target >= k && target < k + kLanes) Simd::set_lane(x, target - k, A(0));
    for (int i = classes - k; i < kLanes; ++i) Simd::set_lane(x, i, A(0));
    return x;
  }
  template <class F>
  A max(F f) const {
    X top = X{} + lrds::negative_infinity<A>();
    for (int k = 0; k < classes; k += kLanes) top = Simd::max(top, f(k));
    return Simd::reduce_max(top);
  }
  template <int N, class F>
  void sum(F f, A* out) const {
    for (int i = 0; i < N; ++i) out[i] = A(0);
    for (int block = 0; block < classes; block += kBlockClasses) {
      const int end = block + kBlockClasses < classes ? block + kBlockClasses : classes;
      X sums[N] = {};
      for (int k = block; k < end; k += kLanes) f(k, sums);
      for (int i = 0; i < N; ++i) out[i] += Simd::reduce_add(sums[i]);
    }
  }
  template <class F>
  void each(F f) const {
    for (int k = 0; k < classes; k += kLanes) f(k);
  }
  void store(int k, X x) const { Simd::store(gradient + k, x); }

 private:
  static constexpr int kLanes = Simd::kWidth;
  // A lane adds at most so many classes before its partial sum joins the total.
  static constexpr int kBlockClasses = 4096;
};

// A row of any stored type as A, padded with -inf to whole vectors.
template <class Lanes, class T>
void widen_row(const void* base, std::int64_t offset, int classes, int padded,
               typename Lanes::A* out) {
  const T* const row = static_cast<const T*>(base) + offset;
  int k = 0;
  for (; k + Lanes::kWidth <= classes; k += Lanes::kWidth)
    Lanes::store(out + k, Lanes::load(row + k));
  for (; k < classes; ++k) out[k] = Lanes::widen(row[k]);
  for (; k < padded; ++k) out[k] = lrds::negative_infinity<typename Lanes::A>();
}

template <class Lanes>
void widen_row(lrds::DType type, const void* base, std::int64_t offset, int classes, int padded,
               typename Lanes::A* out) {
  switch (type) {
    case lrds::DType::kFloat64:
      if constexpr (std::is_same_v<typename Lanes::A, double>) {
        widen_row<Lanes, double>(base, offset, classes, padded, out);
      }
      return;
    case lrds::DType::kFloat32:
      return widen_row<Lanes, float>(base, offset, classes, padded, out);
    case lrds::DType::kBFloat16:
      return widen_row<Lanes, lrds::cpu::BFloat16>(base, offset, classes, padded, out);
    case lrds::DType::kFloat16:
      return widen_row<Lanes, lrds::cpu::Float16>(base, offset, classes, padded, out);
  }
}

template <class Lanes, class T>
void narrow_row(const typename Lanes::A* row, int classes, void* base, std::int64_t offset) {
  T* const out = static_cast<T*>(base) + offset;
  int k = 0;
  for (; k + Lanes::kWidth <= classes; k += Lanes::kWidth)
    Lanes::store(out + k, Lanes::load(row + k));
  for (; k < classes; ++k) Lanes::narrow(row[k], out + k);
}

template <class Lanes>
void narrow_row(lrds::DType type, const typename Lanes::A* row, int classes, void* base,
                std::int64_t offset) {
  switch (type) {
    case lrds::DType::kFloat64:
      if constexpr (std::is_same_v<typename Lanes::A, double>) {
        narrow_row<Lanes, double>(row, classes, base, offset);
      }
      return;
    case lrds::DType::kFloat32:
      return narrow_row<Lanes, float>(row, classes, base, offset);
    case lrds::DType::kBFloat16:
      return narrow_row<Lanes, lrds::cpu::BFloat16>(row, classes, base, offset);
    case lrds::DType::kFloat16:
      return narrow_row<Lanes, lrds::cpu::Float16>(row, classes, base, offset);
  }
}

template <class Lanes>
class FamilySweep {
 public:
  using A = typename Lanes::A;

  FamilySweep(const KdLossArgs& args, const lrds::TermScales& scales, void* scratch)
      : args_(args),
        scales_(scales),
        params_(lrds::distill_params<A>(args)),
        weights_(lrds::row_params<A>(args)),
        classes_(static_cast<int>(args.classes)),
        padded_(static_cast<int>(lrds::cpu::detail::family_padded(args.classes))) {
    A* memory = static_cast<A*>(scratch);
    const auto take = [&] {
      A* const row = memory;
      memory += padded_;
      return row;
    };
    z_ = take();
    v_ = take();
    g_ = take();
    t_ = take();
    w_ = take();
    if (args.class_weight != nullptr) fill(w_, static_cast<const A*>(args.class_weight));
  }

  template <class D>
  RowError rows(std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      std::int64_t y;
      A w;
      RowError error = lrds::cpu::read_row(args_, row, &y, &w);
      if (error.kind != RowError::kNone) return error;
      const bool valid = args_.soft_target != nullptr || y != args_.ignore_index;
      const RowWeights<A> weights =
          valid ? lrds::row_weights(weights_, w) : RowWeights<A>{A(0), A(0)};
      const int flags = valid ? lrds::kRowValid | (w > A(0) ? lrds::kRowSelected : 0) : 0;
      lrds::RowTerms<A> terms{};
      if (weights.ce != A(0) || weights.kd != A(0)) {
        error = read_logits(row, weights.kd != A(0), D::kRevised, y);
        if (error.kind != RowError::kNone) return error;
        terms = this->template sweep<D>(row, weights);
        if (args_.gradient != nullptr) g_[y_] = terms.at_target;
      } else if (args_.gradient != nullptr) {
        for (int k = 0; k < classes_; ++k) g_[k] = A(0);
      }
      if (args_.gradient != nullptr) {
        narrow_row<Lanes>(args_.student_type, g_, classes_, args_.gradient, row * args_.classes);
      }
      if (args_.counts == nullptr) continue;
      static_cast<A*>(args_.ce)[row] = terms.ce;
      static_cast<A*>(args_.kd)[row] = terms.kd;
      const bool revised = terms.revised || (weights.kd != A(0) && swapped_);
      args_.flags[row] = static_cast<std::uint8_t>(flags | (revised ? lrds::kRowRevised : 0));
    }
    return RowError{RowError::kNone, 0};
  }

 private:
  void fill(A* out, const A* row) {
    for (int k = 0; k < classes_; ++k) out[k] = row[k];
    for (int k = classes_; k < padded_; ++k) out[k] = A(0);
  }

  // The row into scratch, the target's logits out of it.
  RowError read_logits(std::int64_t row, bool with_teacher, bool revised, std::int64_t y) {
    y_ = static_cast<int>(y);
    task_.t_y = task_.t_margin = A(1);
    if (args_.soft_target != nullptr) {
      fill(t_, static_cast<const A*>(args_.soft_target) + row * args_.classes);
      y_ = 0;
      for (int k = 1; k < classes_; ++k) y_ = t_[k] > t_[y_] ? k : y_;
      A next = A(0);
      for (int k = 0; k < classes_; ++k) next = k != y_ && t_[k] > next ? t_[k] : next;
      task_.t_y = t_[y_];
      task_.t_margin = t_[y_] - next;
    }
    widen_row<Lanes>(args_.student_type, args_.student, row * args_.student_stride, classes_,
                     padded_, z_);
    task_.z_y = z_[y_];
    z_[y_] = lrds::negative_infinity<A>();
    task_.v_y = A(0);
    swapped_ = false;
    if (with_teacher) {
      const RowError error = read_teacher(row);
      if (error.kind != RowError::kNone) return error;
      if (revised && args_.revise == lrds::Revise::kSwap) swap_top();
      task_.v_y = v_[y_];
      v_[y_] = lrds::negative_infinity<A>();
    }
    task_.w_y = args_.class_weight != nullptr ? w_[y_] : A(1);
    return RowError{RowError::kNone, 0};
  }

  RowError read_teacher(std::int64_t row) {
    const std::int64_t kept = args_.kept_classes;
    if (kept == 0) {
      widen_row<Lanes>(args_.teacher_type, args_.teacher, row * args_.teacher_stride, classes_,
                       padded_, v_);
      return RowError{RowError::kNone, 0};
    }
    // The cached logits pass through the gradient's row, which is not in use yet.
    widen_row<Lanes>(args_.teacher_type, args_.teacher, row * args_.teacher_stride,
                     static_cast<int>(kept), static_cast<int>(kept), g_);
    const std::int64_t* const indices = args_.teacher_indices + row * kept;
    const double log_sum = static_cast<const A*>(args_.teacher_logsumexp)[row];
    double rest = 1.0;
    for (std::int64_t i = 0; i < kept; ++i) {
      if (indices[i] < 0 || indices[i] >= args_.classes) return {RowError::kTeacherIndex, row};
      rest -= std::exp(static_cast<double>(g_[i]) / args_.temperature - log_sum);
    }
    const double each = (rest > 0.0 ? rest : 0.0) / static_cast<double>(classes_ - kept);
    const A filler = kept == classes_
                         ? lrds::negative_infinity<A>()
                         : static_cast<A>(args_.temperature * (log_sum + std::log(each)));
    for (int k = 0; k < classes_; ++k) v_[k] = filler;
    for (int k = classes_; k < padded_; ++k) v_[k] = lrds::negative_infinity<A>();
    for (std::int64_t i = 0; i < kept; ++i) v_[indices[i]] = g_[i];
    return RowError{RowError::kNone, 0};
  }

  // Revise::kSwap: the target and the (lowest) top class change places.
  void swap_top() {
    int top = 0;
    for (int k = 1; k < classes_; ++k) top = v_[k] > v_[top] ? k : top;
    if (!(v_[y_] < v_[top])) return;
    const A v_y = v_[y_];
    v_[y_] = v_[top];
    v_[top] = v_y;
    swapped_ = true;
  }

  template <class D>
  lrds::RowTerms<A> sweep(std::int64_t row, RowWeights<A> weights) {
    double by = 1.0;
    if (args_.grad_output != nullptr) {
      by = static_cast<const A*>(args_.grad_output)[row * args_.grad_output_stride];
    }
    task_.ce_weight = weights.ce;
    task_.kd_weight = weights.kd;
    task_.ce_scale = static_cast<A>(scales_.ce * by);
    task_.kd_scale = static_cast<A>(scales_.kd * by);
    ScratchRow<Lanes> exec{z_, v_, t_, w_, g_, classes_, y_};
    return lrds::RowProgram<D, ScratchRow<Lanes>>(exec, params_, task_).run();
  }

  const KdLossArgs& args_;
  const lrds::TermScales scales_;
  const lrds::DistillParams<A> params_;
  const RowParams<A> weights_;
  const int classes_;
  const int padded_;
  A *z_, *v_, *g_, *t_, *w_;
  int y_ = 0;
  bool swapped_ = false;
  lrds::RowTask<A> task_{};
};

template <class Lanes>
RowError family_rows(const KdLossArgs& args, const lrds::TermScales& scales, std::int64_t begin,
                     std::int64_t end, void* scratch) {
  FamilySweep<Lanes> sweep(args, scales, scratch);
  RowError error{RowError::kNone, 0};
  lrds::visit_divergence(args.divergence, [&](auto divergence) {
    error = sweep.template rows<decltype(divergence)>(begin, end);
  });
  return error;
}

}  // namespace
