// A device on which kernels run: its memory, its copies and its clock.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "harness/call.h"

namespace topn_gating::bench {

using harness::Buffer;
using harness::Call;
using harness::Memory;

// A timer: seconds() makes `calls` calls one after the other and returns their total time in seconds.
struct Stopwatch {
  int64_t calls;
  std::function<double()> seconds;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual const char* name() const = 0;
  virtual bool is_cpu() const { return false; }
  virtual std::string description() const = 0;

  // Returns memory of the device with a buffer's contents (on the CPU the buffer's own memory), and copies such memory back.
  virtual Memory memory_of(const Buffer&) = 0;
  virtual void read_back(const Memory& memory, const Buffer& to) = 0;

  // Returns several ways to copy memory of the device; the fastest one gives its bandwidth.
  virtual std::vector<std::function<void()>> copies(void* to, const void* from, int64_t bytes) = 0;
  virtual Stopwatch stopwatch(std::function<void()> call) = 0;
  virtual void wait() = 0;  // returns when every call has ended

  virtual int64_t workspace_bytes(const Call&) const = 0;
  virtual void run(const Call&) = 0;
};

std::unique_ptr<Device> cpu_device(int threads);
// Returns the GPU, or null if there is none, and then sets the reason.
std::unique_ptr<Device> cuda_device(std::string* why_not);

}  // namespace topn_gating::bench
