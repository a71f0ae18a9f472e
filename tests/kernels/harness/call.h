// A call of a kernel, whichever and on whichever backend: its arguments, its inputs, and its outputs with the bounds of their
// errors.
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

// How far a result may be from what is expected: units in the last place of its type, relative to the expected value, and the
// larger of an absolute bound and one relative to the tensor's largest element. 0: the same number.
struct Bound {
  double ulps = 0, relative = 0, absolute = 0, of_largest = 0;
};

#define TOPN_GATING_TYPE(Args, name) Args,
using AnyArgs = std::variant<TOPN_GATING_KERNELS(TOPN_GATING_TYPE) TOPN_GATING_CPU_KERNELS(TOPN_GATING_TYPE) std::monostate>;
#undef TOPN_GATING_TYPE

template <class Args>
constexpr bool kOnCpuAlone = std::is_same_v<Args, Linear> || std::is_same_v<Args, LinearBackward>;

// Returns memory of a device that has a buffer's contents; on the host it is the buffer's own.
using Memory = std::shared_ptr<void>;
using MemoryOf = std::function<Memory(const Buffer&)>;
Memory host_memory_of(const Buffer&);

// The tensors of a run.
struct Tensors {
  std::vector<Buffer> outputs;  // host memory: what a device writes elsewhere must be read back
  std::vector<Memory> of_outputs, of_inputs;
  Buffer workspace;
  Memory of_workspace;
};

enum class Expected { Reference, OtherBackend };  // the plain loops, or another backend

class Call {
 public:
  Call() = default;
  Call(const Call&) = delete;  // tensors refer to fields of the arguments

  // Sets the arguments but for the tensors, which the functions below add.
  template <class Args>
  Args& arguments(Args args) {
    return args_.emplace<Args>(std::move(args));
  }

  // Adds an input. The kernel must read `elements` of it (all if negative), each as `bytes_each` bytes (its own if 0).
  template <class T>
  void input(T*& field, Buffer buffer, int64_t elements = -1, int64_t bytes_each = 0) {
    bytes_ += (elements < 0 ? buffer.count() : elements) * (bytes_each > 0 ? bytes_each : bytes_of(buffer.type()));
    inputs_.push_back({&field, std::move(buffer)});
  }

  // Adds an output, with its bounds to the plain loops and to another backend.
  template <class T>
  void output(T*& field, const char* name, Type type, int64_t count, Bound to_reference = {}, Bound to_other_backend = {}) {
    outputs_.push_back({&field, name, type, count, {to_reference, to_other_backend}});
    bytes_ += count * bytes_of(type);
  }
  void workspace(void*& field) { workspace_ = &field; }

  // Allocates outputs and workspace, every byte of them `fill`, and points the arguments to all tensors; workspace_bytes() is
  // asked for once the arguments point to all others. `as_double`: floating-point outputs are double, as the plain loops
  // write them.
  Tensors attach(const MemoryOf& memory_of, const std::function<int64_t()>& workspace_bytes, bool aligned, int fill,
                 bool as_double = false);

  // function(arguments).
  template <class F>
  void visit(const F& function) const {
    const auto call = [&](const auto& args) {
      if constexpr (!std::is_same_v<std::decay_t<decltype(args)>, std::monostate>) function(args);
    };
    std::visit(call, args_);
  }

  Tensors run_reference();  // in plain loops

  // Says where outputs are out of their bounds; "" if nowhere.
  std::string difference(const std::vector<Buffer>& got, const std::vector<Buffer>& expected, Expected) const;
  // Says where outputs differ in any bit; "" if nowhere.
  std::string difference_in_bits(const std::vector<Buffer>& got, const std::vector<Buffer>& expected) const;

  const Buffer& input_of(size_t index) const { return inputs_[index].buffer; }
  int64_t bytes() const { return bytes_; }  // that the kernel must read and write
  int64_t reference_bytes() const;          // of the plain loops' outputs

 private:
  struct Input {
    void* field;  // a pointer among the arguments
    Buffer buffer;
  };
  struct Output {
    void* field;  // a pointer among the arguments
    const char* name;
    Type type;
    int64_t count;
    Bound bounds[2];  // by Expected
  };

  AnyArgs args_ = std::monostate();
  std::deque<Input> inputs_;
  std::vector<Output> outputs_;
  void* workspace_ = nullptr;  // a pointer among the arguments
  int64_t bytes_ = 0;
};

}  // namespace topn_gating::harness
