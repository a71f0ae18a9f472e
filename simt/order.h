// Tells ThreadSanitizer which synchronisation orders memory accesses: one thread releases a token and another acquires it.
// Switching fibers alone orders nothing.
#pragma once

#include <cstdlib>

#include "sanitizers.h"

namespace simt {

// The tokens of a barrier that the same threads reach repeatedly. Its rounds alternate between two tokens: with one token, a
// thread that is already at the next round would release its newer accesses to threads that have yet to leave the last round.
struct Rounds {
  unsigned mask;  // lanes that meet, for __syncwarp: each mask has tokens of its own
  unsigned round = 0;
  Rounds* next = nullptr;  // of another mask of the same warp
  long tokens[2] = {};

  explicit Rounds(unsigned lanes = 0) : mask(lanes) {}
  void* token() { return &tokens[round & 1]; }
};

// The tokens of a launch or of a block. They are allocated separately: freeing them makes ThreadSanitizer forget their order.
struct Tokens {
  long start = 0, end = 0;
  Rounds barrier;
  Rounds cluster;  // in the tokens of a cluster's first block
};

// Releases the current token on construction, before a thread waits, and acquires it on destruction, after the wait. Does
// nothing if `rounds` is null.
class Order {
 public:
  explicit Order(Rounds* rounds) : token_(rounds == nullptr ? nullptr : rounds->token()) {
    if (token_ != nullptr) release(token_);
  }
  ~Order() {
    if (token_ != nullptr) acquire(token_);
  }
  Order(const Order&) = delete;
  Order& operator=(const Order&) = delete;

 private:
  void* token_;
};

}  // namespace simt
