// Kernels of the host run's own tests: right ones, and the same ones with a fault planted.
#pragma once

#include <vector>

#include "simt_host.h"

enum class Fault {
  None,
  // Races.
  NoFirstBarrier, NoSecondBarrier, NoSyncWarp, ShuffleForSyncWarp, HalfMasks, NoGridSync, PlainTicket, SharedAdd, BlocksAdd,
  // What a warp operation or a barrier forbids.
  DivergentShuffle, DivergentExit, OutsideMask, NotInOwnMask, ExitedLane, MissingLane, OtherOperation, OtherCaller,
  OtherMask, BadWidth, ShuffleAgainstBarrier, MissedBarrier, OtherLine, NotCooperative, Deadlock,
  // What a sanitizer sees.
  SharedOverrun, Misaligned, WideShift,
};

struct Outcome {
  cudaError_t error;
  bool right;
  std::vector<unsigned> bits;  // of the output
};

Outcome softmax(Fault);        // a warp a row, by shuffles
Outcome block_scan(Fault);     // tiles through shared memory, two barriers each
Outcome warp_reverse(Fault);   // through shared memory, by __syncwarp
Outcome grid_prefix(Fault);    // a cooperative launch
Outcome last_block(Fault);     // the last block done sums what all blocks left
Outcome histogram(Fault);      // atomics on shared and global memory
Outcome memory(Fault);         // 16-byte loads and shifts
Outcome operations(Fault);     // one of the misuses of warp operations and barriers, or none
Outcome primitives(Fault);     // every warp operation against its definition
Outcome many_switches(Fault);  // for timing
constexpr int kSwitches = 64 * 20000;  // of many_switches
