#include "reference.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.h"

namespace topn_gating::reference {
namespace {

using harness::compute_type_of;
using harness::Type;
using harness::type_of;
using harness::View;

// A floating-point output, in double.
struct Result {
  void* data;

  double& operator[](int64_t i) const { return static_cast<double*>(data)[i]; }
  void fill(int64_t count, double value) const { std::fill_n(static_cast<double*>(data), count, value); }
};

// Returns Gumbel noise of a uniform number (docs/spec.md, step 3).
double gumbel(double u) {
  const auto log = [](double t) { return std::log(std::max(t, 1e-20)); };
  return -log(-log(u));
}

double logsumexp(const std::vector<double>& x) {
  const double max = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double value : x) sum += std::exp(value - max);
  return max + std::log(sum);
}

std::vector<double> softmax(std::vector<double> x) {
  const double total = logsumexp(x);
  for (double& value : x) value = std::exp(value - total);
  return x;
}

// One token's logits, its scores (the logits with noise) and its gates (their softmax).
struct Token {
  std::vector<double> logits, scores, gates;

  Token(const GateInputs& a, int64_t token) {
    const View input{type_of(a.dtype), a.logits}, noise{compute_type_of(a.dtype), a.noise};
    for (int64_t i = token * a.experts; i < (token + 1) * a.experts; ++i) {
      logits.push_back(input[i]);
      scores.push_back(a.noise == nullptr ? input[i] : input[i] + a.noise_mult * gumbel(noise[i]));
    }
    gates = softmax(scores);
  }

  // Returns the experts of the top_n largest scores, in descending order (docs/spec.md, step 5).
  std::vector<int32_t> topn(int64_t top_n) const {
    std::vector<int32_t> experts;
    std::vector<bool> chosen(scores.size());
    for (int64_t k = 0; k < top_n; ++k) {
      int32_t best = -1;
      for (int32_t e = 0; e < int32_t(scores.size()); ++e) {
        if (!chosen[e] && (best < 0 || scores[e] > scores[best])) best = e;
      }
      chosen[best] = true;
      experts.push_back(best);
    }
    return experts;
  }
};

template <class Args>
bool is_valid(const Args& a, int64_t token) {
  return a.token_mask == nullptr || a.token_mask[token];
}

// Returns the number of valid tokens in [first, last), at least 1.
double valid_tokens(const GateInputs& a, int64_t first, int64_t last) {
  double count = 0;
  for (int64_t token = first; token < last; ++token) count += is_valid(a, token);
  return std::max(count, 1.0);
}

int64_t pairs_of(const RoutingSizes& a) { return a.groups * a.tokens * a.top_n; }
int64_t rows_of(const Assignment& a) { return a.groups * a.rows; }

// Returns the index in (g, e, C) or (R) of the row that a pair holds: the one that `slot` gives, if its `source` is the pair;
// else -1.
int64_t row_of(const Assignment& a, int64_t pair) {
  const int64_t group = pair / (a.tokens * a.top_n), e = a.expert[pair], c = a.slot[pair];
  if (e < 0 || e >= a.experts || c < 0) return -1;
  int64_t start = (group * a.experts + e) * a.capacity, end = start + a.capacity;
  if (a.offsets != nullptr) start = e > 0 ? a.offsets[e - 1] : 0, end = a.offsets[e];
  if (start + c < 0 || start + c >= end || end > rows_of(a)) return -1;
  return a.source[start + c] == pair % (a.tokens * a.top_n) ? start + c : -1;
}

// Returns the pair that holds a row, or -1.
int64_t pair_of(const Assignment& a, int64_t row) {
  const int64_t per_group = a.tokens * a.top_n, source = a.source[row];
  if (source < 0 || source >= per_group) return -1;
  const int64_t pair = row / a.rows * per_group + source;
  return row_of(a, pair) == row ? pair : -1;
}

// Returns the dot product of two rows.
double dot(int64_t dim, View a, int64_t row_of_a, View b, int64_t row_of_b) {
  double sum = 0;
  for (int64_t j = 0; j < dim; ++j) sum += a[row_of_a * dim + j] * b[row_of_b * dim + j];
  return sum;
}

// Sets each token's row to the sum over its pairs of factor(pair) times the row that the pair holds.
template <class Factor>
void sum_rows(const AssignedRows& a, View rows, Result sums, const Factor& factor) {
  const Assignment& held = a.assignment;
  sums.fill(held.groups * held.tokens * a.dim, 0);
  for (int64_t pair = 0; pair < pairs_of(held); ++pair) {
    const int64_t row = row_of(held, pair), token = pair / held.top_n;
    for (int64_t j = 0; row >= 0 && j < a.dim; ++j) sums[token * a.dim + j] += factor(pair) * rows[row * a.dim + j];
  }
}

// Sets each row to factor(pair) times the row of the token whose pair holds it, or to 0 if none does.
template <class Factor>
void fill_rows(const AssignedRows& a, View rows, Result filled, const Factor& factor) {
  const Assignment& held = a.assignment;
  for (int64_t row = 0; row < rows_of(held); ++row) {
    const int64_t pair = pair_of(held, row);
    for (int64_t j = 0; j < a.dim; ++j) {
      filled[row * a.dim + j] = pair < 0 ? 0 : factor(pair) * rows[pair / held.top_n * a.dim + j];
    }
  }
}

// Sets the gradient of each pair's factor: the dot product of the row that it holds and of its token's.
void dot_pairs(const AssignedRows& a, View held, View of_tokens, Result products) {
  for (int64_t pair = 0; pair < pairs_of(a.assignment); ++pair) {
    const int64_t row = row_of(a.assignment, pair);
    products[pair] = row < 0 ? 0 : dot(a.dim, held, row, of_tokens, pair / a.assignment.top_n);
  }
}

// A matrix whose element (i, j) is at i * row_stride + j * column_stride.
struct Matrix {
  View values;
  int64_t row_stride, column_stride;

  double at(int64_t i, int64_t j) const { return values[i * row_stride + j * column_stride]; }
};

void multiply(Matrix a, Matrix b, int64_t rows, int64_t inner, int64_t columns, Result product) {
  std::vector<double> right(size_t(inner * columns));
  for (int64_t i = 0; i < inner * columns; ++i) right[size_t(i)] = b.at(i / columns, i % columns);
  product.fill(rows * columns, 0);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t l = 0; l < inner; ++l) {
      const double factor = a.at(i, l);
      for (int64_t j = 0; j < columns; ++j) product[i * columns + j] += factor * right[size_t(l * columns + j)];
    }
  }
}

}  // namespace

void run(const Gate& a) {
  const Result weight{a.weight}, importance{a.importance}, balance_loss{a.balance_loss}, z_loss{a.router_z_loss};
  importance.fill(a.groups * a.experts, 0);
  std::fill_n(a.counts, a.groups * a.experts, 0);
  balance_loss[0] = z_loss[0] = 0;
  for (int64_t token = 0; token < a.groups * a.tokens; ++token) {
    const Token t(a, token);
    const std::vector<int32_t> chosen = t.topn(a.top_n);
    double sum = 0;
    for (const int32_t e : chosen) sum += t.gates[e];
    for (int64_t k = 0; k < a.top_n; ++k) {
      a.expert[token * a.top_n + k] = chosen[k];
      weight[token * a.top_n + k] = a.top_n == 1 ? t.gates[chosen[k]] : t.gates[chosen[k]] / std::max(sum, a.eps);
    }
    if (!a.losses || !is_valid(a, token)) continue;
    const int64_t group_offset = token / a.tokens * a.experts;
    for (int64_t e = 0; e < a.experts; ++e) importance[group_offset + e] += t.gates[e];
    a.counts[group_offset + chosen[0]] += 1;
    z_loss[0] += std::pow(logsumexp(t.logits), 2);
  }
  z_loss[0] /= valid_tokens(a, 0, a.groups * a.tokens);
  for (int64_t i = 0; i < a.groups * a.experts; ++i) {
    const int64_t group = i / a.experts;
    const double valid = valid_tokens(a, group * a.tokens, (group + 1) * a.tokens);
    importance[i] /= valid;
    balance_loss[0] += importance[i] * (a.counts[i] / valid) * double(a.experts) / double(a.groups);
  }
}

void run(const GateBackward& a) {
  const Type compute_type = compute_type_of(a.dtype);
  const View grad_weight{compute_type, a.grad_weight}, grad_importance{compute_type, a.grad_importance},
      grad_balance{compute_type, a.grad_balance_loss}, grad_z{compute_type, a.grad_router_z_loss};
  const Result grad_logits{a.grad_logits};
  const double valid_of_all = valid_tokens(a, 0, a.groups * a.tokens);
  for (int64_t token = 0; token < a.groups * a.tokens; ++token) {
    const int64_t group = token / a.tokens;
    const double valid = valid_tokens(a, group * a.tokens, (group + 1) * a.tokens);
    const Token t(a, token);
    std::vector<double> grad_gates(size_t(a.experts));

    // w_k = v_k / max(Σ v, eps) with v_k = gates[expert_k]; w_0 = v_0 where there is one rank.
    std::vector<int64_t> routed;  // pairs of the token that have an expert
    double sum = 0, mean = 0;
    for (int64_t pair = token * a.top_n; pair < (token + 1) * a.top_n; ++pair) {
      if (a.expert[pair] < 0 || a.expert[pair] >= a.experts) continue;
      routed.push_back(pair);
      sum += t.gates[a.expert[pair]];
    }
    const double denominator = a.top_n == 1 ? 1 : std::max(sum, a.eps);
    if (a.top_n > 1 && sum > a.eps) {
      for (const int64_t pair : routed) mean += grad_weight[pair] * t.gates[a.expert[pair]] / sum;
    }
    for (const int64_t pair : routed) grad_gates[a.expert[pair]] += (grad_weight[pair] - mean) / denominator;

    // importance = Σ gates / valid and balance_loss = e / g · Σ importance · counts / valid, over valid tokens.
    for (int64_t e = 0; e < a.experts && is_valid(a, token); ++e) {
      const int64_t i = group * a.experts + e;
      const double density = a.counts[i] / valid;
      grad_gates[e] += (grad_importance[i] + grad_balance[0] * double(a.experts) / double(a.groups) * density) / valid;
    }

    // gates = softmax(scores); router_z_loss = Σ logsumexp(logits)² / valid tokens.
    mean = 0;
    for (int64_t e = 0; e < a.experts; ++e) mean += t.gates[e] * grad_gates[e];
    const std::vector<double> softmax_z = softmax(t.logits);
    const double of_z = is_valid(a, token) ? grad_z[0] * 2 * logsumexp(t.logits) / valid_of_all : 0;
    for (int64_t e = 0; e < a.experts; ++e) {
      grad_logits[token * a.experts + e] = t.gates[e] * (grad_gates[e] - mean) + of_z * softmax_z[e];
    }
  }
}

void run(const Assign& a) {
  const Type type = a.is_double ? Type::F64 : Type::F32;
  const View weight{type, a.weight}, draws{type, a.draws}, threshold{type, a.threshold};
  const View keys{type, a.keys};
  const Result kept{a.kept};
  kept.fill(pairs_of(a), 0);
  std::fill_n(a.slot, pairs_of(a), kBelowThreshold);
  std::fill_n(a.source, a.groups * a.rows, -1);
  std::fill_n(a.demand, a.groups * a.experts, 0);
  const auto is_routed = [&](int64_t pair, int64_t rank) {
    if (rank == 0 || a.policy == Policy::All) return true;
    if (a.policy == Policy::Threshold) return weight[pair] > threshold[rank];
    const double quotient = a.policy == Policy::None ? 0 : weight[pair] / std::max(threshold[rank], a.eps);
    return a.policy == Policy::Random && draws[pair] < (a.is_double ? quotient : float(quotient));  // rounded as in kernels
  };
  std::vector<std::vector<int64_t>> queues(size_t(a.groups * a.experts));  // routed pairs of each expert in the order of slots
  const auto give_slot = [&](int64_t group, int64_t token, int64_t k) {
    const int64_t pair = (group * a.tokens + token) * a.top_n + k, e = a.expert[pair];
    if (!is_valid(a, group * a.tokens + token) || e < 0 || e >= a.experts || !is_routed(pair, k)) return;
    const int32_t slot = a.demand[group * a.experts + e]++;  // the number of pairs routed before this one
    a.slot[pair] = a.dropless() || slot < a.capacity ? slot : kOverCapacity;
    queues[size_t(group * a.experts + e)].push_back(pair);
  };
  for (int64_t group = 0; group < a.groups; ++group) {
    for (int64_t i = 0; i < a.tokens * a.top_n; ++i) {  // token by token, or rank by rank
      a.dropless() ? give_slot(group, i / a.top_n, i % a.top_n) : give_slot(group, i % a.tokens, i / a.tokens);
    }
  }
  for (const std::vector<int64_t>& queue : queues) {
    if (a.keys == nullptr) break;
    std::vector<int64_t> by_key = queue;  // the largest key first, NaN last
    std::stable_sort(by_key.begin(), by_key.end(), [&](int64_t one, int64_t other) {
      return keys[one] > keys[other] || (keys[one] == keys[one] && keys[other] != keys[other]);
    });
    if (int64_t(by_key.size()) > a.capacity) by_key.resize(size_t(a.capacity));
    int32_t slot = 0;
    for (const int64_t pair : queue) {
      a.slot[pair] = std::find(by_key.begin(), by_key.end(), pair) != by_key.end() ? slot++ : kOverCapacity;
    }
  }
  int32_t end = 0;
  for (int64_t e = 0; a.dropless() && e < a.experts; ++e) {
    end += a.demand[e];
    while (end % a.align != 0) ++end;
    a.offsets[e] = end;
  }
  for (int64_t pair = 0; pair < pairs_of(a); ++pair) {
    if (a.slot[pair] < 0) continue;
    const int64_t per_group = a.tokens * a.top_n, group = pair / per_group, e = a.expert[pair];
    const int64_t start = !a.dropless() ? (group * a.experts + e) * a.capacity : e > 0 ? a.offsets[e - 1] : 0;
    kept[pair] = weight[pair];
    a.source[start + a.slot[pair]] = int32_t(pair % per_group);
  }
}

void run(const AssignBackward& a) {
  const View grad_kept{a.is_double ? Type::F64 : Type::F32, a.grad_kept};
  for (int64_t pair = 0; pair < a.pairs; ++pair) Result{a.grad_weight}[pair] = a.slot[pair] >= 0 ? grad_kept[pair] : 0;
}

void run(const Dense& a) {
  const int64_t per_token = a.assignment.experts * a.assignment.capacity;
  const View weight{compute_type_of(a.dtype), a.weight};
  for (void* const output : {a.dispatch, a.combine})
    Result{output}.fill(a.assignment.groups * a.assignment.tokens * per_token, 0);
  for (int64_t pair = 0; pair < pairs_of(a.assignment); ++pair) {
    const int64_t row = row_of(a.assignment, pair), at = pair / a.assignment.top_n * per_token + row % per_token;
    if (row < 0) continue;
    Result{a.dispatch}[at] = 1;
    Result{a.combine}[at] = weight[pair];
  }
}

void run(const DenseBackward& a) {
  const Assignment& held = a.assignment;
  for (int64_t pair = 0; pair < pairs_of(held); ++pair) {
    const int64_t row = row_of(held, pair), token = pair / held.top_n;
    const auto element = [&](const void* grad, const int64_t* strides) {
      if (row < 0 || grad == nullptr) return 0.0;
      const int64_t at = token / held.tokens * strides[0] + token % held.tokens * strides[1] +
                         row / held.capacity % held.experts * strides[2] + row % held.capacity * strides[3];
      return View{type_of(a.dtype), grad}[at];
    };
    Result{a.grad_weight}[pair] = element(a.grad_dispatch, a.dispatch_strides) + element(a.grad_combine, a.combine_strides);
  }
}

void run(const Dispatch& a) {
  fill_rows(a, {type_of(a.dtype), a.x}, {a.y}, [](int64_t) { return 1.0; });
}

void run(const DispatchBackward& a) {
  const View grad_y{type_of(a.dtype), a.grad_y};
  sum_rows(a, grad_y, {a.grad_x}, [](int64_t) { return 1.0; });
  if (a.x != nullptr) dot_pairs(a, grad_y, {type_of(a.dtype), a.x}, {a.grad_weight});
}

void run(const Combine& a) {
  const View weight{compute_type_of(a.dtype), a.weight};
  sum_rows(a, {type_of(a.dtype), a.y}, {a.out}, [&](int64_t pair) { return weight[pair]; });
}

void run(const CombineBackward& a) {
  const View weight{compute_type_of(a.dtype), a.weight}, grad_out{type_of(a.dtype), a.grad_out};
  fill_rows(a, grad_out, {a.grad_y}, [&](int64_t pair) { return weight[pair]; });
  dot_pairs(a, {type_of(a.dtype), a.y}, grad_out, {a.grad_weight});
}

void run(const Linear& a) {
  const View x{type_of(a.dtype), a.x}, weight{type_of(a.dtype), a.weight};
  multiply({x, a.dim, 1}, {weight, 1, a.dim}, a.tokens, a.dim, a.experts, {a.logits});
}

void run(const LinearBackward& a) {
  const View grad{type_of(a.dtype), a.grad_logits}, x{type_of(a.dtype), a.x}, weight{type_of(a.dtype), a.weight};
  multiply({grad, a.experts, 1}, {weight, a.dim, 1}, a.tokens, a.experts, a.dim, {a.grad_x});
  multiply({grad, 1, a.experts}, {x, a.dim, 1}, a.experts, a.tokens, a.dim, {a.grad_weight});
}

void run(const GroupedLinear& a) {
  const View rows{type_of(a.dtype), a.rows}, weight{type_of(a.dtype), a.weight}, bias{type_of(a.dtype), a.bias};
  const Result result{a.result};
  for (int64_t group = 0; group < a.groups; ++group) {
    for (int64_t row = a.start[group]; row < a.start[group + 1]; ++row) {
      for (int64_t column = 0; column < a.out; ++column) {
        double sum = bias[group * a.out + column];
        for (int64_t i = 0; i < a.in; ++i) {
          const int64_t element = group * a.weight_strides[0] + i * a.weight_strides[1] + column * a.weight_strides[2];
          sum += rows[row * a.row_stride + i] * weight[element];
        }
        result[row * a.out + column] = sum;
      }
    }
  }
}

void run(const GroupedOuter& a) {
  const View left{type_of(a.dtype), a.left}, right{type_of(a.dtype), a.right};
  for (int64_t group = 0; group < a.groups; ++group) {
    const int64_t first = a.start[group], rows = a.start[group + 1] - first;
    for (int64_t i = 0; i < a.in; ++i) {
      for (int64_t j = 0; j < a.out; ++j) {
        double sum = 0;
        for (int64_t row = first; row < first + rows; ++row) {
          sum += left[row * a.left_stride + i] * right[row * a.right_stride + j];
        }
        Result{a.result}[(group * a.in + i) * a.out + j] = sum;
      }
    }
  }
}

void run(const GroupedSum& a) {
  const View rows{type_of(a.dtype), a.rows};
  for (int64_t group = 0; group < a.groups; ++group) {
    for (int64_t column = 0; column < a.columns; ++column) {
      double sum = 0;
      for (int64_t row = a.start[group]; row < a.start[group + 1]; ++row) sum += rows[row * a.row_stride + column];
      Result{a.result}[group * a.columns + column] = sum;
    }
  }
}

}  // namespace topn_gating::reference
