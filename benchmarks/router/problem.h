// A shape's inputs, and the routing that the plain loops of reference.h make of them.
#pragma once

#include <string>

#include "buffer.h"
#include "router.h"

namespace topn_gating::bench {

using host::Buffer;
using host::Type;

struct Shape {
  int64_t groups, tokens, dim, experts, top_n;

  int64_t capacity() const;  // SPEC step 1, with the module's defaults
  std::string name() const;
};

// Timed: what a model would bring. Hard: what would show a mistake, too: equal scores, noise, padding, experts that overflow
// and others that stay empty, thresholds of 0 and 1.
enum class Inputs { Timed, Hard };

struct Problem {
  const Shape shape;
  const DType dtype;
  const Type type, real;                        // of the dtype, and "Real" of router.h
  const int64_t tokens, pairs, capacity, rows;  // over all groups; rows of the experts' buffers
  const double eps = 1e-9, noise_mult = 1;
  const Policy policy = Policy::Random;

  Buffer logits, noise, mask;               // noise and mask: empty where there is none
  Buffer draws, threshold;
  Buffer weight, expert, top_count;         // of the reference's gate
  Buffer slot, source;                      // of the reference's assign
  int64_t held_pairs = 0, held_tokens = 0;  // which hold a slot

  Problem(const Shape&, DType, Inputs);

  bool is_real(int64_t token) const { return mask.count() == 0 || mask.get(token) != 0; }
  int64_t row_of(int64_t pair) const;                        // that the pair holds, of (g, e, C); -1: none
  int64_t pair_of(int64_t row) const;                        // that holds the row, of (g, n, k); -1: none
  double precision() const;                                  // of Real: SPEC's, relative
  Buffer uniform(Type, int64_t count, uint64_t seed) const;  // in [-1, 1)
};

}  // namespace topn_gating::bench
