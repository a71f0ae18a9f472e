// Where kernels run: its memory, its copies, its clock.
#pragma once

#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "buffer.h"
#include "router.h"

namespace topn_gating::bench {

using host::Buffer;

// Runs what it was made for `calls` times, one after the other, and gives the seconds of them all.
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

  // The buffer's contents in memory of the device, which on the CPU is the buffer itself; and from there back into it.
  virtual std::shared_ptr<void> memory_of(const Buffer&) = 0;
  virtual void read_back(const std::shared_ptr<void>& memory, const Buffer& to) = 0;

  // Ways to copy memory of the device: the fastest is what its bandwidth allows.
  virtual std::vector<std::function<void()>> copies(void* to, const void* from, int64_t bytes) = 0;
  virtual Stopwatch stopwatch(std::function<void()> call) = 0;
  virtual void wait() = 0;  // until all calls have ended

  virtual int64_t workspace_bytes(const Gate&) const = 0;
  virtual int64_t workspace_bytes(const GateBackward&) const = 0;
  virtual int64_t workspace_bytes(const Assign&) const = 0;

  virtual void run(const Gate&) = 0;
  virtual void run(const GateBackward&) = 0;
  virtual void run(const Assign&) = 0;
  virtual void run(const AssignBackward&) = 0;
  virtual void run(const Dense&) = 0;
  virtual void run(const DenseBackward&) = 0;
  virtual void run(const Dispatch&) = 0;
  virtual void run(const DispatchBackward&) = 0;
  virtual void run(const Combine&) = 0;
  virtual void run(const CombineBackward&) = 0;

  // On the CPU alone.
  virtual int64_t workspace_bytes(const LinearBackward&) const { throw std::logic_error("no such kernel here"); }
  virtual void run(const Linear&) { throw std::logic_error("no such kernel here"); }
  virtual void run(const LinearBackward&) { throw std::logic_error("no such kernel here"); }
};

std::unique_ptr<Device> cpu_device(int threads);
std::unique_ptr<Device> cuda_device(std::string* why_not);  // null where there is no card

}  // namespace topn_gating::bench
