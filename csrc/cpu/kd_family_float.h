// The float lanes of kd_family_sweep.h, on the Simd of the including translation unit.
#pragma once

#include "cpu/kd_family_sweep.h"
#include "cpu/simd_log.h"

namespace {

struct FloatLanes : Simd {
  using A = float;
  using Simd::load;
  using Simd::store;

  static void set_lane(V& v, int i, float x) { v[i] = x; }
  template <class T>
  static float widen(T x) {
    return lrds::cpu::to_float(x);
  }
  template <class T>
  static void narrow(float x, T* out) {
    lrds::cpu::from_float(x, out);
  }

  static V log(V x) { return log_lanes<Simd>(x); }
};

}  // namespace
