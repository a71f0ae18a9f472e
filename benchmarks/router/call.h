// A kernel's call: its tensors in a device's memory, how many bytes of them it must move, and what its results should be.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "device.h"

namespace topn_gating::bench {

using host::Type;

// How far a result may be from the plain loops': relative to it, and as such. What the result's own type rounds comes on top.
struct Tolerance {
  double relative = 0, absolute = 0;
};

template <class Args, class = void>
constexpr bool kHasWorkspace = false;
template <class Args>
constexpr bool kHasWorkspace<Args, std::void_t<decltype(Args::workspace)>> = true;

// Outputs and workspace hold a pattern that no result has, until it has run.
class Call {
 public:
  explicit Call(Device& device) : device_(device) {}

  // A tensor of the call's own.
  const Buffer& keep(Buffer buffer) { return kept_.emplace_back(std::move(buffer)); }

  // An input, of which the kernel needs so many elements; null where it is empty.
  template <class T>
  void reads(T*& pointer, const Buffer& buffer, int64_t elements) {
    pointer = buffer.count() == 0 ? nullptr : static_cast<T*>(on_device(buffer).get());
    bytes_ += elements * host::bytes_of(buffer.type());
  }
  template <class T>
  void reads(T*& pointer, const Buffer& buffer) {
    reads(pointer, buffer, buffer.count());
  }

  // An output, and what element i should be.
  using Expected = std::function<double(int64_t i)>;
  template <class T>
  void writes(T*& pointer, const char* name, Type type, int64_t count, Tolerance tolerance, Expected expected) {
    const Buffer& buffer = keep(Buffer(type, count, true, kPattern));
    outputs_.push_back({name, &buffer, on_device(buffer), tolerance, std::move(expected)});
    pointer = static_cast<T*>(memory_.back().get());
    bytes_ += buffer.bytes();
  }

  // What runs. Its arguments are complete but for the workspace.
  template <class Args>
  void runs(Args args) {
    if constexpr (kHasWorkspace<Args>) {
      args.workspace = on_device(keep(Buffer(Type::Bool, device_.workspace_bytes(args), true, kPattern))).get();
    }
    run_ = [this, args] { device_.run(args); };
  }

  const std::function<void()>& run() const { return run_; }
  int64_t bytes() const { return bytes_; }  // of those tensors
  std::string check() const;                // runs; what is wrong with the results, or nothing

 private:
  static constexpr int kPattern = 0x55;

  struct Output {
    const char* name;
    const Buffer* buffer;
    std::shared_ptr<void> memory;
    Tolerance tolerance;
    Expected expected;

    std::string check() const;  // what was read back
  };

  const std::shared_ptr<void>& on_device(const Buffer& buffer) { return memory_.emplace_back(device_.memory_of(buffer)); }

  Device& device_;
  std::deque<Buffer> kept_;  // whose elements stay where they are
  std::vector<std::shared_ptr<void>> memory_;
  std::vector<Output> outputs_;
  std::function<void()> run_;
  int64_t bytes_ = 0;
};

}  // namespace topn_gating::bench
