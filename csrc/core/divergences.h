// All divergences. The index in the list is the code in lrds_fast/divergences.py.
#pragma once

#include "core/divergence_dkd.h"
#include "core/divergence_jsd.h"
#include "core/divergence_kl.h"
#include "core/divergence_mse_logits.h"
#include "core/divergence_mse_probs.h"
#include "core/divergence_nkd.h"
#include "core/divergence_rkl.h"
#include "core/divergence_rld.h"
#include "core/divergence_skl.h"
#include "core/divergence_srkl.h"
#include "core/divergence_tvd.h"

namespace lrds {

template <class... D>
struct DivergenceList {
  static constexpr int kCount = sizeof...(D);
};

using Divergences =
    DivergenceList<Kl, Rkl, Dkd, Rld, Nkd, MseLogits, MseProbs, Jsd, Tvd, Skl, Srkl>;

// Calls visitor(D{}) for the divergence D with this code; false for an unknown code. This is how
// the host gets from KdLossArgs::divergence to a template instantiation: visit_divergence(code,
// [](auto d) { using D = decltype(d); ... }).
template <class Visitor, class... D>
inline bool visit_divergence(int code, Visitor visitor, DivergenceList<D...>) {
  int index = 0;
  bool known = false;
  // At most one comparison is true.
  ((index++ == code ? (visitor(D{}), known = true) : false), ...);
  return known;
}

template <class Visitor>
inline bool visit_divergence(int code, Visitor visitor) {
  return visit_divergence(code, visitor, Divergences());
}

}  // namespace lrds
