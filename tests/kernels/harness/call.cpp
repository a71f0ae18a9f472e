#include "call.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "reference.h"

namespace topn_gating::harness {
namespace {

// Sets the pointer at the address `field` to the memory.
void point(void* field, const Memory& memory) {
  void* const data = memory.get();
  std::memcpy(field, &data, sizeof data);
}

// Returns the largest magnitude of the finite elements.
double largest(const Buffer& buffer) {
  double most = 0;
  for (int64_t i = 0; i < buffer.count(); ++i) {
    if (std::isfinite(buffer.get(i))) most = std::max(most, std::abs(buffer.get(i)));
  }
  return most;
}

bool is_near(double got, double expected, double allowed) {
  if (std::isnan(got) || std::isnan(expected)) return std::isnan(got) && std::isnan(expected);
  return got == expected || std::abs(got - expected) <= allowed;
}

}  // namespace

Memory host_memory_of(const Buffer& buffer) {
  return Memory(buffer.data(), [](void*) {});
}

Tensors Call::attach(const MemoryOf& memory_of, const std::function<int64_t()>& workspace_bytes, bool aligned, int fill,
                     bool as_double) {
  Tensors tensors;
  for (const Input& input : inputs_) point(input.field, tensors.input_memory.emplace_back(memory_of(input.buffer)));
  for (const Output& output : outputs_) {
    const Type type = as_double && output.type != Type::I32 ? Type::F64 : output.type;
    const Buffer& buffer = tensors.outputs.emplace_back(type, output.count, aligned, fill);
    point(output.field, tensors.output_memory.emplace_back(memory_of(buffer)));
  }
  if (workspace_ != nullptr) {
    tensors.workspace = Buffer(Type::Bool, workspace_bytes(), true, fill);
    point(workspace_, tensors.workspace_memory = memory_of(tensors.workspace));
  }
  return tensors;
}

Tensors Call::run_reference() {
  Tensors tensors = attach(host_memory_of, [] { return 0; }, true, 0xff, true);
  visit([](const auto& args) { reference::run(args); });
  return tensors;
}

int64_t Call::reference_bytes() const {
  int64_t bytes = 0;
  for (const Output& output : outputs_) bytes += output.count * bytes_of(Type::F64);
  return bytes;
}

std::string Call::difference(const std::vector<Buffer>& got, const std::vector<Buffer>& expected, Expected which) const {
  for (size_t o = 0; o < outputs_.size(); ++o) {
    const Output& output = outputs_[o];
    const Bound& bound = output.bounds[int(which)];
    const bool integers = output.type == Type::I32;
    const int64_t count = output.count;
    const double floor = std::max(bound.absolute, bound.of_largest > 0 ? bound.of_largest * largest(expected[o]) : 0);
    const auto allowed = [&](double value) {
      if (integers || !std::isfinite(value)) return 0.0;
      return bound.ulps * ulp(output.type, value) + bound.relative * std::abs(value) + floor;
    };
    const auto unwritten = [&](int64_t i) { return !integers && got[o].all_ones(i); };
    int64_t first = count;
#pragma omp parallel for reduction(min : first)
    for (int64_t i = 0; i < count; ++i) {
      const double value = expected[o].get(i);
      if (i < first && (!is_near(got[o].get(i), value, allowed(value)) || unwritten(i))) first = i;
    }
    if (first == count) continue;
    const double value = expected[o].get(first);
    char text[200];
    std::snprintf(text, sizeof text, "%s[%lld of %lld] = %.17g, expected %.17g from %s (allowed: %.2g)%s", output.name,
                  static_cast<long long>(first), static_cast<long long>(count), got[o].get(first), value,
                  which == Expected::Reference ? "the plain loops" : "the CPU", allowed(value),
                  unwritten(first) ? ", never written" : "");
    return text;
  }
  return "";
}

std::string Call::difference_in_bits(const std::vector<Buffer>& got, const std::vector<Buffer>& expected) const {
  for (size_t o = 0; o < outputs_.size(); ++o) {
    const int64_t i = got[o].first_difference(expected[o]);
    if (i < 0) continue;
    return std::string(outputs_[o].name) + "[" + std::to_string(i) + "] = " + std::to_string(got[o].get(i)) + ", not " +
           std::to_string(expected[o].get(i));
  }
  return "";
}

}  // namespace topn_gating::harness
