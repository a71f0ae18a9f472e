// Tells ThreadSanitizer what orders memory: a thread releases a token and another acquires it. Switching fibers orders nothing.
#pragma once

#include <cstdlib>

#include "sanitizers.h"

namespace simt {

// A rendezvous takes two tokens in turn: a thread that runs ahead to the next one would, with a single token, pass on
// what it did in between to those that have yet to leave the last.
struct Rounds {
  unsigned mask;  // of a warp's lanes; one pair of tokens for every set of threads that meets
  unsigned round = 0;
  Rounds* next = nullptr;
  long tokens[2] = {};

  explicit Rounds(unsigned lanes = 0) : mask(lanes) {}
  void* token() { return &tokens[round & 1]; }
};

// The tokens of a launch or of a block. They lie in memory of their own, for its release clears what they passed on.
struct Tokens {
  long start = 0, end = 0;
  Rounds barrier;
};

// Released on the way into a rendezvous and acquired on the way out, or nothing at all where there are no rounds.
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
