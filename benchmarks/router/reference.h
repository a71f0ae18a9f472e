// SPEC in plain loops and in double: what the kernels' results are compared with. `gate` and `assign` walk the tokens, `linear`
// multiplies matrices; of all else, an element is a formula of its index, and stands where kernels.cpp expects it.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.h"

namespace topn_gating::bench {

struct Problem;

struct Gates {
  std::vector<double> weight;      // (g, n, k)
  std::vector<int32_t> expert;     // (g, n, k)
  std::vector<double> importance;  // (g, e)
  std::vector<int32_t> top_count;  // (g, e)
  double balance_loss = 0, router_z_loss = 0;
};
Gates reference_gate(const Problem&);

struct GateGradients {
  const host::Buffer &weight, &importance, &balance_loss, &router_z_loss;
};
std::vector<double> reference_gate_backward(const Problem&, const GateGradients&);  // (g, n, e)

struct Slots {
  std::vector<double> kept;     // (g, n, k)
  std::vector<int32_t> slot;    // (g, n, k)
  std::vector<int32_t> source;  // (g, e, C)
  std::vector<int32_t> demand;  // (g, e)
};
Slots reference_assign(const Problem&);

// A matrix by its rows, and the product of two.
struct Matrix {
  int64_t rows, columns;
  std::vector<double> values;

  Matrix(const host::Buffer&, int64_t rows);
  Matrix transposed() const;
};
std::vector<double> product(const Matrix& a, const Matrix& b);

}  // namespace topn_gating::bench
