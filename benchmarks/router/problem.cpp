#include "problem.h"

#include <algorithm>
#include <cmath>

#include "reference.h"

namespace topn_gating::bench {

using host::Random;

int64_t Shape::capacity() const {
  constexpr double factor = 1.25;
  constexpr int64_t least = 4;
  return std::max(std::min(tokens, int64_t(double(tokens) * factor / double(experts))), least);
}

std::string Shape::name() const {
  const auto part = [](const char* letter, int64_t size) { return letter + (":" + std::to_string(size)); };
  return part("b", groups) + part("/n", tokens) + part("/d", dim) + part("/e", experts) + part("/k", top_n);
}

namespace {

// The scores' differences are multiples of 1/8, or far from them where the noise differs: no order hangs on a rounding.
double hard_logit(Random& random, int64_t expert, int64_t experts) {
  const double wanted = expert < 2 ? 2 : expert == experts - 1 ? -3 : 0;
  return std::round(8 * (random.normal() / 2 + wanted)) / 8;
}

template <class Values>
Buffer buffer_of(Type type, const Values& values) {
  return Buffer::of(type, int64_t(values.size()), true, [&](int64_t i) { return double(values[size_t(i)]); });
}

}  // namespace

Problem::Problem(const Shape& s, DType d, Inputs inputs)
    : shape(s), dtype(d), type(host::type_of(d)), real(host::real_of(d)), tokens(s.groups * s.tokens), pairs(tokens * s.top_n),
      capacity(s.capacity()), rows(s.groups * s.experts * capacity) {
  const bool hard = inputs == Inputs::Hard;
  Random random(1);
  logits = Buffer::of(type, tokens * s.experts, true, [&](int64_t i) {
    return hard ? hard_logit(random, i % s.experts, s.experts) : random.normal();
  });
  noise = Buffer::of(real, hard ? logits.count() : 0, true, [&](int64_t) { return double(random.below(8)) / 8; });
  mask = Buffer::of(Type::Bool, hard ? tokens : 0, true, [&](int64_t) { return random.chance(0.8); });
  draws = Buffer::of(real, pairs, true, [&](int64_t) { return random.uniform(); });
  threshold = Buffer::of(real, s.top_n, true, [&](int64_t k) { return hard ? double(k % 3) / 2 : 0.2; });

  const Gates gates = reference_gate(*this);
  weight = buffer_of(real, gates.weight);
  expert = buffer_of(Type::I32, gates.expert);
  top_count = buffer_of(Type::I32, gates.top_count);
  const Slots slots = reference_assign(*this);
  slot = buffer_of(Type::I32, slots.slot);
  source = buffer_of(Type::I32, slots.source);
  for (int64_t token = 0; token < tokens; ++token) {
    int64_t held = 0;
    for (int64_t k = 0; k < s.top_n; ++k) held += row_of(token * s.top_n + k) >= 0;
    held_pairs += held;
    held_tokens += held > 0;
  }
}

int64_t Problem::row_of(int64_t pair) const {
  const int64_t held = slot.as<int32_t>()[pair], group = pair / (shape.tokens * shape.top_n);
  return held < 0 ? -1 : (group * shape.experts + expert.as<int32_t>()[pair]) * capacity + held;
}

int64_t Problem::pair_of(int64_t row) const {
  const int64_t pair = source.as<int32_t>()[row], group = row / (shape.experts * capacity);
  return pair < 0 ? -1 : group * shape.tokens * shape.top_n + pair;
}

double Problem::precision() const {
  if (real == Type::F64) return 1e-13;
  return noise.count() == 0 ? 1e-6 : 4e-6;  // noise rounds the scores
}

Buffer Problem::uniform(Type of, int64_t count, uint64_t seed) const {
  Random random(seed);
  return Buffer::of(of, count, true, [&](int64_t) { return 2 * random.uniform() - 1; });
}

}  // namespace topn_gating::bench
