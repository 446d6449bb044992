// Every divergence, in the order of their codes: lrds_fast/divergences.py numbers them alike.
#pragma once

#include "core/divergence_dkd.h"
#include "core/divergence_jsd.h"
#include "core/divergence_kl.h"
#include "core/divergence_mse_logits.h"
#include "core/divergence_mse_probs.h"
#include "core/divergence_nkd.h"
#include "core/divergence_rkl.h"
#include "core/divergence_rld.h"

namespace lrds {

template <class... D>
struct DivergenceList {
  static constexpr int kCount = sizeof...(D);
};

using Divergences = DivergenceList<Kl, Rkl, Dkd, Rld, Nkd, MseLogits, MseProbs, Jsd>;

// The type at `code` of a list; the host's way from KdLossArgs::divergence to an instantiation:
// visit_divergence(code, [](auto d) { using D = decltype(d); ... }), false for an unknown code.
template <class Visitor, class... D>
inline bool visit_divergence(int code, Visitor visitor, DivergenceList<D...>) {
  int index = 0;
  bool found = false;
  // One of the comparisons holds at most.
  ((index++ == code ? (visitor(D{}), found = true) : false), ...);
  return found;
}

template <class Visitor>
inline bool visit_divergence(int code, Visitor visitor) {
  return visit_divergence(code, visitor, Divergences());
}

}  // namespace lrds
