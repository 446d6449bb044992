// Every loss in float64, one class at a time, with the standard library's exp and log. It serves
// gradient checks.
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/kd_family_sweep.h"

namespace {

struct DoubleLane {
  using A = double;
  using V = double;
  static constexpr int kWidth = 1;
  template <class T>
  static double widen(T x) {
    if constexpr (std::is_same_v<T, double>) {
      return x;
    } else {
      return lrds::cpu::to_float(x);
    }
  }
  template <class T>
  static void narrow(double x, T* out) {
    if constexpr (std::is_same_v<T, double>) {
      *out = x;
    } else {
      lrds::cpu::from_float(static_cast<float>(x), out);
    }
  }
  template <class T>
  static double load(const T* p) {
    return widen(*p);
  }
  template <class T>
  static void store(T* p, double x) {
    narrow(x, p);
  }
  static void set_lane(double& lane, int, double x) { lane = x; }
  static double max(double a, double b) { return a > b ? a : b; }
  static double reduce_max(double x) { return x; }
  static double reduce_add(double x) { return x; }
  static double exp(double x) { return std::exp(x); }
  static double log(double x) { return std::log(x); }
};

}  // namespace

namespace lrds::cpu::detail {

RowError kd_family_rows_double(const KdLossArgs& args, const TermScales& scales, std::int64_t begin,
                               std::int64_t end, void* scratch) {
  return family_rows<DoubleLane>(args, scales, begin, end, scratch);
}

}  // namespace lrds::cpu::detail
