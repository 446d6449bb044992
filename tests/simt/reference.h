// kd_loss of one row in double precision, computed from its definition: distributions as vectors,
// one class after another. It shares no code with csrc/.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace reference {

struct Options {
  double temperature;
  double ce_weight;
  double ce_weight_unselected;
  double kd_weight;
  double eta;
  double label_smoothing;
  bool revise;
  double revise_temperature;  // 0: temperature
};

struct RowResult {
  double ce = 0.0;
  double kd = 0.0;
  bool revised = false;
  std::vector<double> gradient;  // of ce + kd
};

inline std::vector<double> log_softmax(const std::vector<double>& x, double temperature) {
  double top = -std::numeric_limits<double>::infinity();
  for (const double value : x) top = std::fmax(top, value);
  double sum = 0.0;
  for (const double value : x) sum += std::exp((value - top) / temperature);
  std::vector<double> out = x;
  for (double& value : out) value = (value - top) / temperature - std::log(sum);
  return out;
}

// w is the row's selection weight. Logits of terms whose weight is 0 are not read.
inline RowResult kd_loss_row(const std::vector<double>& z, const std::vector<double>& v,
                             std::size_t y, double w, const Options& options) {
  RowResult out;
  const std::size_t classes = z.size();
  out.gradient.assign(classes, 0.0);
  const double ce_weight = w * options.ce_weight + (1.0 - w) * options.ce_weight_unselected;
  const double kd_weight = w * options.kd_weight;
  if (ce_weight != 0.0) {
    const std::vector<double> log_q = log_softmax(z, 1.0);
    const double smoothing = options.label_smoothing;
    double ce = 0.0;
    for (std::size_t k = 0; k < classes; ++k) {
      const double wanted = (k == y ? 1.0 - smoothing : 0.0) + smoothing / double(classes);
      if (wanted != 0.0) ce -= wanted * log_q[k];
      out.gradient[k] += ce_weight * (std::exp(log_q[k]) - wanted);
    }
    out.ce = ce_weight * ce;
  }
  if (kd_weight != 0.0) {
    const double t = options.temperature;
    const std::vector<double> log_q = log_softmax(z, t), log_p = log_softmax(v, t);
    double top = -std::numeric_limits<double>::infinity();
    for (const double value : v) top = std::fmax(top, value);
    std::vector<double> p = log_p;
    for (double& value : p) value = std::exp(value);
    if (options.revise && v[y] < top) {
      const double r = options.revise_temperature > 0.0 ? options.revise_temperature : t;
      const std::vector<double> log_p_r = log_softmax(v, r);
      double p_top = 0.0;
      for (const double value : log_p_r) p_top = std::fmax(p_top, std::exp(value));
      const double beta = options.eta / (1.0 + (p_top - std::exp(log_p_r[y])));
      for (std::size_t k = 0; k < classes; ++k) p[k] = beta * std::exp(log_p_r[k]);
      p[y] += 1.0 - beta;
      if (r != t) {
        // p^(R / T), normalised. The probabilities of the others come from logarithms, because p
        // may have underflowed.
        std::vector<double> logits(classes);
        for (std::size_t k = 0; k < classes; ++k) {
          logits[k] = r * (k == y ? std::log(p[k]) : std::log(beta) + log_p_r[k]);
        }
        p = log_softmax(logits, t);
        for (double& value : p) value = std::exp(value);
      }
      out.revised = true;
    }
    double kl = 0.0;
    for (std::size_t k = 0; k < classes; ++k) {
      if (!(p[k] == 0.0)) kl += p[k] * (std::log(p[k]) - log_q[k]);
      out.gradient[k] += kd_weight * t * (std::exp(log_q[k]) - p[k]);
    }
    out.kd = kd_weight * t * t * kl;
  }
  return out;
}

}  // namespace reference
