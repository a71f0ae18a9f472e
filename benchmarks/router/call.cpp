#include "call.h"

#include <cmath>
#include <cstdio>

namespace topn_gating::bench {

std::string Call::check() const {
  run_();
  device_.wait();
  std::string wrong;
  for (const Output& output : outputs_) {
    device_.read_back(output.memory, *output.buffer);
    if (wrong.empty()) wrong = output.check();
  }
  return wrong;
}

std::string Call::Output::check() const {
  const double rounding = host::epsilon_of(buffer->type()) / 2, least = host::least_of(buffer->type()) / 2;
  const auto allowed = [&](double value) {
    return (tolerance.relative + rounding) * std::abs(value) + tolerance.absolute + least;
  };
  const int64_t count = buffer->count();
  int64_t first = count;
#pragma omp parallel for reduction(min : first)
  for (int64_t i = 0; i < count; ++i) {
    const double value = expected(i);
    if (!(std::abs(buffer->get(i) - value) <= allowed(value)) && i < first) first = i;
  }
  if (first == count) return "";
  char text[160];
  std::snprintf(text, sizeof text, "%s[%lld of %lld] = %.9g, but the plain loop gives %.9g (allowed: %.1g)", name,
                static_cast<long long>(first), static_cast<long long>(count), buffer->get(first), expected(first),
                allowed(expected(first)));
  return text;
}

}  // namespace topn_gating::bench
