#include "reference.h"

#include <algorithm>
#include <cmath>

#include "problem.h"

namespace topn_gating::bench {
namespace {

// SPEC step 3.
double gumbel(double u) {
  const auto log = [](double t) { return std::log(std::max(t, 1e-20)); };
  return -log(-log(u));
}

// One token: its logits z, scores s and gates p.
struct Token {
  std::vector<double> z, s, p;

  Token(const Problem& problem, int64_t token) {
    const int64_t experts = problem.shape.experts;
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t i = token * experts + e;
      z.push_back(problem.logits.get(i));
      s.push_back(problem.noise.count() == 0 ? z[e] : z[e] + problem.noise_mult * gumbel(problem.noise.get(i)));
    }
    p = softmax(s);
  }

  static double logsumexp(const std::vector<double>& x) {
    const double max = *std::max_element(x.begin(), x.end());
    double sum = 0;
    for (const double value : x) sum += std::exp(value - max);
    return max + std::log(sum);
  }
  static std::vector<double> softmax(std::vector<double> x) {
    const double total = logsumexp(x);
    for (double& value : x) value = std::exp(value - total);
    return x;
  }

  // SPEC step 5.
  std::vector<int32_t> topn(int64_t top_n) const {
    std::vector<int32_t> experts;
    std::vector<bool> taken(s.size());
    for (int64_t k = 0; k < top_n; ++k) {
      int32_t best = -1;
      for (int32_t e = 0; e < int32_t(s.size()); ++e) {
        if (!taken[e] && (best < 0 || s[e] > s[best])) best = e;
      }
      taken[best] = true;
      experts.push_back(best);
    }
    return experts;
  }
};

double real_tokens(const Problem& problem, int64_t first, int64_t last) {
  double real = 0;
  for (int64_t token = first; token < last; ++token) real += problem.is_real(token);
  return std::max(real, 1.0);
}

}  // namespace

Gates reference_gate(const Problem& problem) {
  const auto& [groups, tokens, dim, experts, top_n] = problem.shape;
  Gates result;
  result.importance.resize(groups * experts);
  result.top_count.resize(groups * experts);
  for (int64_t token = 0; token < groups * tokens; ++token) {
    const Token t(problem, token);
    const std::vector<int32_t> chosen = t.topn(top_n);
    double sum = 0;
    for (const int32_t e : chosen) sum += t.p[e];
    for (const int32_t e : chosen) {
      result.expert.push_back(e);
      result.weight.push_back(top_n == 1 ? t.p[e] : t.p[e] / std::max(sum, problem.eps));
    }
    if (!problem.is_real(token)) continue;
    const int64_t group = token / tokens;
    for (int64_t e = 0; e < experts; ++e) result.importance[group * experts + e] += t.p[e];
    result.top_count[group * experts + chosen[0]] += 1;
    const double z = Token::logsumexp(t.z);
    result.router_z_loss += z * z;
  }
  result.router_z_loss /= real_tokens(problem, 0, groups * tokens);
  for (int64_t group = 0; group < groups; ++group) {
    const double real = real_tokens(problem, group * tokens, (group + 1) * tokens);
    for (int64_t i = group * experts; i < (group + 1) * experts; ++i) {
      result.importance[i] /= real;
      result.balance_loss += result.importance[i] * (result.top_count[i] / real);
    }
  }
  result.balance_loss *= double(experts * experts) / double(groups * experts);
  return result;
}

std::vector<double> reference_gate_backward(const Problem& problem, const GateGradients& grad) {
  const auto& [groups, tokens, dim, experts, top_n] = problem.shape;
  const double real_of_all = real_tokens(problem, 0, groups * tokens);
  std::vector<double> result;
  for (int64_t group = 0; group < groups; ++group) {
    const double real = real_tokens(problem, group * tokens, (group + 1) * tokens);
    for (int64_t token = group * tokens; token < (group + 1) * tokens; ++token) {
      const Token t(problem, token);
      std::vector<double> grad_p(experts);

      // w_k = v_k / max(Σ v, eps) with v_k = p[expert_k], or v_0 alone.
      double sum = 0, dot = 0;
      for (int64_t k = 0; k < top_n; ++k) sum += t.p[problem.expert.get(token * top_n + k)];
      const double denominator = top_n == 1 ? 1 : std::max(sum, problem.eps);
      for (int64_t k = 0; k < top_n && top_n > 1 && sum > problem.eps; ++k) {
        dot += grad.weight.get(token * top_n + k) * t.p[problem.expert.get(token * top_n + k)] / sum;
      }
      for (int64_t k = 0; k < top_n; ++k) {
        grad_p[problem.expert.get(token * top_n + k)] = (grad.weight.get(token * top_n + k) - dot) / denominator;
      }

      // importance = Σ p / real; balance_loss = e / g Σ importance · top_count / real. Both of real tokens.
      for (int64_t e = 0; e < experts && problem.is_real(token); ++e) {
        const int64_t i = group * experts + e;
        const double density = problem.top_count.get(i) / real;
        grad_p[e] += grad.importance.get(i) / real;
        grad_p[e] += grad.balance_loss.get(0) * double(experts) / double(groups) * density / real;
      }

      // p = softmax(s); router_z_loss = Σ logsumexp(z)² / real, of the logits without noise.
      double mean = 0;
      for (int64_t e = 0; e < experts; ++e) mean += t.p[e] * grad_p[e];
      const std::vector<double> softmax_z = Token::softmax(t.z);
      const double z = Token::logsumexp(t.z), grad_z = problem.is_real(token) ? grad.router_z_loss.get(0) : 0;
      for (int64_t e = 0; e < experts; ++e) {
        result.push_back(t.p[e] * (grad_p[e] - mean) + grad_z * 2 * z / real_of_all * softmax_z[e]);
      }
    }
  }
  return result;
}

Slots reference_assign(const Problem& problem) {
  const auto& [groups, tokens, dim, experts, top_n] = problem.shape;
  const int64_t capacity = problem.capacity;
  Slots result;
  result.kept.resize(problem.pairs);
  result.slot.resize(problem.pairs, kBelowThreshold);
  result.source.resize(problem.rows, -1);
  result.demand.resize(groups * experts);
  for (int64_t group = 0; group < groups; ++group) {
    for (int64_t k = 0; k < top_n; ++k) {
      for (int64_t token = 0; token < tokens; ++token) {
        const int64_t pair = (group * tokens + token) * top_n + k;
        const double weight = problem.weight.get(pair), threshold = std::max(problem.threshold.get(k), problem.eps);
        // In the type of the weights, whose rounding decides.
        const double quotient = problem.real == Type::F32 ? float(weight / threshold) : weight / threshold;
        if (!problem.is_real(group * tokens + token) || (k > 0 && !(problem.draws.get(pair) < quotient))) continue;
        const int64_t of_expert = group * experts + int64_t(problem.expert.get(pair));
        const int32_t slot = result.demand[of_expert]++;  // as many as were routed before
        result.slot[pair] = slot < capacity ? slot : kOverCapacity;
        if (slot >= capacity) continue;
        result.kept[pair] = weight;
        result.source[of_expert * capacity + slot] = int32_t(token * top_n + k);
      }
    }
  }
  return result;
}

Matrix::Matrix(const host::Buffer& buffer, int64_t rows_of_it) : rows(rows_of_it), columns(buffer.count() / rows_of_it) {
  for (int64_t i = 0; i < buffer.count(); ++i) values.push_back(buffer.get(i));
}

Matrix Matrix::transposed() const {
  Matrix t = *this;
  std::swap(t.rows, t.columns);
  for (int64_t i = 0; i < t.rows; ++i) {
    for (int64_t j = 0; j < t.columns; ++j) t.values[size_t(i * t.columns + j)] = values[size_t(j * columns + i)];
  }
  return t;
}

std::vector<double> product(const Matrix& a, const Matrix& b) {
  std::vector<double> sums(size_t(a.rows * b.columns));
  for (int64_t i = 0; i < a.rows; ++i) {
    double* sum = sums.data() + i * b.columns;
    for (int64_t l = 0; l < a.columns; ++l) {
      const double factor = a.values[size_t(i * a.columns + l)], *row = b.values.data() + l * b.columns;
      for (int64_t j = 0; j < b.columns; ++j) sum[j] += factor * row[j];
    }
  }
  return sums;
}

}  // namespace topn_gating::bench
