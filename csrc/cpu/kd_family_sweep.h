// The sweep for every call that is not is_plain() (core/kd_loss.h): the row template of
// core/kd_row.h over SIMD positions. A row is first converted to float (or double) into scratch, so
// that the loops see whole vectors of one type; the target and the positions past the row's end
// hold -inf, which adds nothing to any sum.
//
// One translation unit per instruction set, and one for double, includes this after it defines
// Simd. Everything here has internal linkage.
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

// The mathematical functions of core/divergence.h on vectors of Simd.
template <class Simd>
struct RowMath {
  using A = typename Simd::A;
  using X = typename Simd::V;
  static X exp(X x, A scale) { return Simd::exp(x * scale); }
  static X log(X x) { return Simd::log(x); }
  static X divide(X a, X b) { return a / b; }
  static X where_positive(X condition, X x) { return condition > X{} ? x : X{}; }
  static X where_positive(X condition, X x, X otherwise) { return condition > X{} ? x : otherwise; }
  static X where_less(X a, A b, X x, X otherwise) { return a < (X{} + b) ? x : otherwise; }
  // a - b, and 0 where they are equal, even if both are -inf.
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
  // The most classes that a lane adds before its partial sum is added to the total.
  static constexpr int kBlockClasses = 4096;
};

// A row of any type as A, padded with -inf to whole vectors.
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

  // The moments of the rows, for calls with args.moments. Such calls have no soft targets, no class
  // weights and no Revise::kSwap.
  template <class D>
  RowError moments(std::int64_t begin, std::int64_t end) {
    A* const out = static_cast<A*>(args_.moments);
    // The scratch rows of options that such a call does not have.
    A* const g = g_;
    A* const h = w_;
    A* const r = t_;
    for (int k = 0; k < padded_; ++k) r[k] = A(0);
    for (std::int64_t row = begin; row < end; ++row) {
      std::int64_t y;
      A w;
      RowError error = lrds::cpu::read_row(args_, row, &y, &w);
      if (error.kind != RowError::kNone) return error;
      A row_moments[lrds::kMoments] = {};
      args_.teacher_top[row] = y;
      if (y != args_.ignore_index) {
        error = read_logits(row, true, D::kRevised, y);
        if (error.kind != RowError::kNone) return error;
        args_.teacher_top[row] = teacher_top();
        if (args_.direction != nullptr) {
          const A* const from =
              static_cast<const A*>(args_.direction) + row * args_.direction_stride;
          for (int k = 0; k < classes_; ++k) r[k] = from[k];
        }
        if (std::is_same_v<D, lrds::Kl> && params_.temperatures == 1 && !params_.standardize &&
            params_.revise != lrds::Revise::kMft && classes_ > 1) {
          kl_moments(g, h, r, row_moments);
        } else {
          row_moments[lrds::kMomentCe] = this->template gradient_of<D>(false, g).ce;
          row_moments[lrds::kMomentKd] = this->template gradient_of<D>(true, h).kd;
          multiply(g, h, r, row_moments);
        }
      }
      for (int i = 0; i < lrds::kMoments; ++i) out[i * args_.rows + row] = row_moments[i];
    }
    return RowError{RowError::kNone, 0};
  }

 private:
  // The logit gradient of one term, padded with zeros.
  template <class D>
  lrds::RowTerms<A> gradient_of(bool kd, A* gradient) {
    const lrds::RowTask<A> task = lrds::only_term(task_, kd);
    ScratchRow<Lanes> exec{z_, v_, nullptr, nullptr, gradient, classes_, y_};
    const lrds::RowTerms<A> terms =
        lrds::RowProgram<D, ScratchRow<Lanes>>(exec, params_, task).run();
    gradient[y_] = terms.at_target;
    for (int k = classes_; k < padded_; ++k) gradient[k] = A(0);
    return terms;
  }

  // The moments with the KL divergence. It takes three exponentials per class, exp(z), exp(z / T)
  // and exp(v / T), into scratch, then the sums, then the products of the gradients that they give.
  // No sum includes the target, because 1 - p_y and the like are sums over the others.
  void kl_moments(A* g, A* h, const A* r, A* row_moments) {
    using V = typename Lanes::V;
    ScratchRow<Lanes> exec{z_, v_, nullptr, nullptr, nullptr, classes_, y_};
    const A temperature = params_.temperature[0], inv_t = A(1) / temperature;
    const A z_y = task_.z_y, v_y = task_.v_y;
    const A others_z = exec.max([&](int k) { return exec.z(k); });
    const A others_v = others_v_;
    const A max_z = others_z > z_y ? others_z : z_y, max_v = others_v > v_y ? others_v : v_y;
    const V shift_z = V{} + max_z, shift_v = V{} + max_v, scale = V{} + inv_t;
    const bool revised = params_.revise != lrds::Revise::kNone && v_y < others_v;
    const bool elsewhere = revised && lrds::revises_elsewhere(args_, args_.temperature);
    A others_r[1] = {};
    if (elsewhere) {
      const V inv_r = V{} + A(1) / params_.revise_temperature;
      exec.template sum<1>(
          [&](int k, V* into) { into[0] += Lanes::exp((exec.v(k) - shift_v) * inv_r); }, others_r);
    }
    A sums[4];
    exec.template sum<4>(
        [&](int k, V* into) {
          const V dz = exec.z(k) - shift_z, dv = exec.v(k) - shift_v;
          const V e = Lanes::exp(dz), f = Lanes::exp(dz * scale), t = Lanes::exp(dv * scale);
          Lanes::store(g + k, e);
          Lanes::store(h + k, f);
          Lanes::store(v_ + k, t);
          into[0] += e;
          into[1] += f;
          into[2] += t;
          into[3] += RowMath<Lanes>::where_positive(t, t * (dv - dz));
        },
        sums);
    // The scalars of the row, in double.
    const double e_others = sums[0], f_others = sums[1], t_others = sums[2];
    const double dz_y = static_cast<double>(z_y) - max_z, dv_y = static_cast<double>(v_y) - max_v;
    const double e_y = std::exp(dz_y), f_y = std::exp(dz_y * inv_t), t_y = std::exp(dv_y * inv_t);
    const double e_sum = e_others + e_y, f_sum = f_others + f_y, t_sum = t_others + t_y;
    double beta = 1.0;
    if (elsewhere) {
      const double r = params_.revise_temperature, eta = params_.eta, y_r = std::exp(dv_y / r);
      const double lifted = y_r + ((others_r[0] + y_r) * (1.0 - eta) + (1.0 - y_r)) / eta;
      const double down = std::pow(lifted, -r * inv_t);
      beta = t_sum * down / (1.0 + t_others * down);
    } else if (revised) {
      const double p_max = std::exp((static_cast<double>(others_v) - max_v) * inv_t) / t_sum;
      beta = params_.eta / (1.0 + p_max - t_y / t_sum);
    }
    const double p_y = beta * t_y / t_sum + (1.0 - beta);
    const double log_f = std::log(f_sum), log_t = std::log(t_sum), log_beta = std::log(beta);
    double kl = 0.0;
    if (beta > 0.0) {
      kl = beta / t_sum * (sums[3] * inv_t + t_others * (log_beta - log_t + log_f));
    }
    if (p_y > 0.0) {
      // Without revision p_y may have underflowed; its logarithm is then taken in closed form.
      const double log_p_y = revised ? std::log(p_y) : dv_y * inv_t - log_t;
      kl += p_y * (log_p_y - (dz_y * inv_t - log_f));
    }
    row_moments[lrds::kMomentCe] =
        static_cast<A>(e_y > 1e-30 ? std::log1p(e_others / e_y) : std::log(e_sum) - dz_y);
    row_moments[lrds::kMomentKd] = static_cast<A>(temperature * temperature * kl);

    const V on_e = V{} + static_cast<A>(1.0 / e_sum);
    const V on_f = V{} + static_cast<A>(temperature / f_sum);
    const V on_t = V{} + static_cast<A>(temperature * beta / t_sum);
    A products[6];
    exec.template sum<6>(
        [&](int k, V* into) {
          const V a = Lanes::load(g + k) * on_e;
          const V b = Lanes::load(h + k) * on_f - Lanes::load(v_ + k) * on_t;
          const V along = Lanes::load(r + k);
          into[0] += a * a;
          into[1] += b * b;
          into[2] += a * b;
          into[3] += a * along;
          into[4] += b * along;
          into[5] += along;
        },
        products);
    const A a = static_cast<A>(-e_others / e_sum);
    const A b = static_cast<A>(temperature * (beta * t_others / t_sum - f_others / f_sum));
    row_moments[lrds::kMomentCeCe] = products[0] + a * a;
    row_moments[lrds::kMomentKdKd] = products[1] + b * b;
    row_moments[lrds::kMomentCeKd] = products[2] + a * b;
    row_moments[lrds::kMomentCeAlong] = products[3] + a * r[y_];
    row_moments[lrds::kMomentKdAlong] = products[4] + b * r[y_];
    row_moments[lrds::kMomentTarget] = r[y_] - products[5] / params_.classes;
  }

  void multiply(const A* g, const A* h, const A* r, A* row_moments) const {
    ScratchRow<Lanes> exec{z_, v_, nullptr, nullptr, nullptr, classes_, y_};
    A sums[6];
    exec.template sum<6>(
        [&](int k, typename Lanes::V* into) {
          const auto a = Lanes::load(g + k), b = Lanes::load(h + k), along = Lanes::load(r + k);
          into[0] += a * a;
          into[1] += b * b;
          into[2] += a * b;
          into[3] += a * along;
          into[4] += b * along;
          into[5] += along;
        },
        sums);
    for (int i = 0; i < 5; ++i) row_moments[lrds::kMomentCeCe + i] = sums[i];
    row_moments[lrds::kMomentTarget] = r[y_] - sums[5] / params_.classes;
  }

  // The teacher's top class: of several the target, if it is one of them, else the lowest.
  int teacher_top() {
    ScratchRow<Lanes> exec{z_, v_, nullptr, nullptr, nullptr, classes_, y_};
    others_v_ = exec.max([&](int k) { return exec.v(k); });
    if (!(task_.v_y < others_v_)) return y_;
    // Finds the first block that has it, in loops that the compiler vectorises, and then the class.
    constexpr int kBlock = 64;
    int k = 0;
    for (; k + kBlock <= classes_; k += kBlock) {
      int here = 0;
      for (int i = 0; i < kBlock; ++i) here |= v_[k + i] == others_v_;
      if (here) break;
    }
    while (k + 1 < classes_ && v_[k] != others_v_) ++k;
    return k;
  }

  void fill(A* out, const A* row) {
    for (int k = 0; k < classes_; ++k) out[k] = row[k];
    for (int k = classes_; k < padded_; ++k) out[k] = A(0);
  }

  // Converts the row into scratch and takes the target's logits out of it.
  RowError read_logits(std::int64_t row, bool with_teacher, bool revised, std::int64_t y) {
    y_ = static_cast<int>(y);
    task_.t_y = task_.t_margin = task_.t_sum = A(1);
    if (args_.soft_target != nullptr) {
      fill(t_, static_cast<const A*>(args_.soft_target) + row * args_.classes);
      y_ = 0;
      for (int k = 1; k < classes_; ++k) y_ = t_[k] > t_[y_] ? k : y_;
      A next = A(0);
      for (int k = 0; k < classes_; ++k) next = k != y_ && t_[k] > next ? t_[k] : next;
      ScratchRow<Lanes> exec{z_, v_, t_, nullptr, nullptr, classes_, y_};
      A others[1];
      exec.template sum<1>(
          [&](int k, typename Lanes::V* into) {
            const auto t = exec.others(k, exec.t(k));
            into[0] += RowMath<Lanes>::where_less(t, A(0), typename Lanes::V{}, t);
          },
          others);
      task_.t_y = t_[y_];
      task_.t_margin = t_[y_] - next;
      task_.t_sum = t_[y_] + others[0];
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
    // The cached logits use the gradient's row as a buffer; it is still free here.
    widen_row<Lanes>(args_.teacher_type, args_.teacher, row * args_.teacher_stride,
                     static_cast<int>(kept), static_cast<int>(kept), g_);
    const std::int64_t* const indices = args_.teacher_indices + row * kept;
    for (std::int64_t i = 0; i < kept; ++i) {
      if (indices[i] < 0 || indices[i] >= args_.classes) return {RowError::kTeacherIndex, row};
    }
    const A filler = lrds::cached_filler(
        args_.temperature, static_cast<const A*>(args_.teacher_rest)[row], classes_ - kept);
    for (int k = 0; k < classes_; ++k) v_[k] = filler;
    for (int k = classes_; k < padded_; ++k) v_[k] = lrds::negative_infinity<A>();
    for (std::int64_t i = 0; i < kept; ++i) v_[indices[i]] = g_[i];
    return RowError{RowError::kNone, 0};
  }

  // Revise::kSwap: exchanges the logits of the target and the (lowest) top class.
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
  A others_v_ = A(0);  // the teacher's largest logit except the target's; set by teacher_top
  lrds::RowTask<A> task_{};
};

template <class Lanes>
RowError family_rows(const KdLossArgs& args, const lrds::TermScales& scales, std::int64_t begin,
                     std::int64_t end, void* scratch) {
  FamilySweep<Lanes> sweep(args, scales, scratch);
  RowError error{RowError::kNone, 0};
  lrds::visit_divergence(args.divergence, [&](auto divergence) {
    using D = decltype(divergence);
    error = args.moments != nullptr ? sweep.template moments<D>(begin, end)
                                    : sweep.template rows<D>(begin, end);
  });
  return error;
}

}  // namespace
