// A call of any kernel on any backend: its arguments, its inputs, and its outputs with the bounds of their errors.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "buffer.h"
#include "router.h"

namespace topn_gating::harness {

// The largest error of a result: `ulps` units in the last place of its type, plus `relative` times the expected value, plus the
// larger of `absolute` and `of_largest` times the largest expected element. All 0: the result must be the same number.
struct Bound {
  double ulps = 0, relative = 0, absolute = 0, of_largest = 0;
};

#define TOPN_GATING_TYPE(Args, name) Args,
using AnyArgs = std::variant<TOPN_GATING_KERNELS(TOPN_GATING_TYPE) TOPN_GATING_CPU_KERNELS(TOPN_GATING_TYPE) std::monostate>;
#undef TOPN_GATING_TYPE

template <class Args>
constexpr bool kOnCpuAlone = std::is_same_v<Args, Linear> || std::is_same_v<Args, LinearBackward> ||
                               std::is_same_v<Args, GroupedLinear> || std::is_same_v<Args, GroupedOuter> ||
                               std::is_same_v<Args, GroupedSum>;

// Memory of a device, and a function that returns memory with a buffer's contents; on the host it is the buffer's own memory.
using Memory = std::shared_ptr<void>;
using MemoryOf = std::function<Memory(const Buffer&)>;
Memory host_memory_of(const Buffer&);

// The tensors of a run, and the memory of the device that holds them.
struct Tensors {
  std::vector<Buffer> outputs;  // in host memory: outputs on another device must be read back
  std::vector<Memory> output_memory, input_memory;
  Buffer workspace;
  Memory workspace_memory;
};

// What gave the expected results: the plain loops, or another backend.
enum class Expected { Reference, OtherBackend };

class Call {
 public:
  Call() = default;
  Call(const Call&) = delete;  // inputs and outputs point to fields of the arguments

  // Sets all arguments except the tensors, which the functions below add.
  template <class Args>
  Args& arguments(Args args) {
    return args_.emplace<Args>(std::move(args));
  }

  // Adds an input, of which the kernel must read `elements` elements (negative: all) at `bytes_each` bytes each (0: their size).
  template <class T>
  void input(T*& field, Buffer buffer, int64_t elements = -1, int64_t bytes_each = 0) {
    bytes_ += (elements < 0 ? buffer.count() : elements) * (bytes_each > 0 ? bytes_each : bytes_of(buffer.type()));
    inputs_.push_back({&field, std::move(buffer)});
  }

  // Adds an output, with the bounds of its difference from the plain loops and from another backend.
  template <class T>
  void output(T*& field, const char* name, Type type, int64_t count, Bound to_reference = {}, Bound to_other_backend = {}) {
    outputs_.push_back({&field, name, type, count, {to_reference, to_other_backend}});
    bytes_ += count * bytes_of(type);
  }
  void workspace(void*& field) { workspace_ = &field; }

  // Allocates outputs and workspace, fills their bytes with `fill`, and points the arguments to all tensors. workspace_bytes() is
  // called after the arguments point to all inputs and outputs. `as_double`: floating-point outputs are double, as the plain
  // loops write them.
  Tensors attach(const MemoryOf& memory_of, const std::function<int64_t()>& workspace_bytes, bool aligned, int fill,
                 bool as_double = false);

  // Calls function(arguments), unless none are set.
  template <class F>
  void visit(const F& function) const {
    const auto call = [&](const auto& args) {
      if constexpr (!std::is_same_v<std::decay_t<decltype(args)>, std::monostate>) function(args);
    };
    std::visit(call, args_);
  }

  // Runs the plain loops and returns their tensors.
  Tensors run_reference();

  // Describes the first element of an output that exceeds its bounds, or was not written; "" if there is none.
  std::string difference(const std::vector<Buffer>& got, const std::vector<Buffer>& expected, Expected) const;
  // Describes the first element of an output whose bits differ; "" if there is none.
  std::string difference_in_bits(const std::vector<Buffer>& got, const std::vector<Buffer>& expected) const;

  const Buffer& input_of(size_t index) const { return inputs_[index].buffer; }
  int64_t bytes() const { return bytes_; }  // returns the bytes that the kernel must read and write
  int64_t reference_bytes() const;          // returns the bytes of the plain loops' outputs

 private:
  struct Input {
    void* field;  // address of the pointer among the arguments
    Buffer buffer;
  };
  struct Output {
    void* field;  // address of the pointer among the arguments
    const char* name;
    Type type;
    int64_t count;
    Bound bounds[2];  // indexed by Expected
  };

  AnyArgs args_ = std::monostate();
  std::deque<Input> inputs_;
  std::vector<Output> outputs_;
  void* workspace_ = nullptr;  // address of the pointer among the arguments
  int64_t bytes_ = 0;
};

}  // namespace topn_gating::harness
