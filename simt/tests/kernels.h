// Kernels that test the emulator, each correct or with a fault planted.
#pragma once

#include <vector>

#include "simt_host.h"

enum class Fault {
  None,
  // Races between threads, which ThreadSanitizer reports.
  NoFirstBarrier, NoSecondBarrier, NoSyncWarp, ShuffleForSyncWarp, HalfMasks, NoGridSync, NoClusterSync, EarlyExit,
  PlainTicket, SharedAdd, BlocksAdd, EarlyRead, EarlyWrite,
  // Wrong uses of warp operations and barriers, which the scheduler reports.
  DivergentShuffle, DivergentExit, OutsideMask, NotInOwnMask, ExitedLane, MissingLane, OtherOperation, OtherCaller,
  OtherMask, BadWidth, ShuffleAgainstBarrier, MissedBarrier, OtherLine, NotCooperative, NoCluster, Deadlock,
  NoWait, TwoWaits,
  // Wrong accesses and shifts, which AddressSanitizer and UndefinedBehaviorSanitizer report.
  SharedOverrun, Misaligned, ShiftTooLarge,
};

struct Outcome {
  cudaError_t error;
  bool right;                  // whether the output is near what is expected
  std::vector<unsigned> bits;  // bits of the output
};

// Launch a kernel with a fault that it can have, or without any.
Outcome softmax(Fault);        // softmax of rows, one warp to a row, by shuffles
Outcome block_scan(Fault);     // inclusive sums of tiles through shared memory, with two barriers a tile
Outcome warp_reverse(Fault);   // exchange of values through shared memory, with __syncwarp
Outcome grid_prefix(Fault);    // sums over the blocks of a cooperative launch, with a barrier of the grid
Outcome cluster_sums(Fault);   // sums of the shared memory of a cluster's blocks, with barriers of the cluster
Outcome chain(Fault);          // two dependent launches, the second of which uses what the first has written
Outcome last_block(Fault);     // sum by the block that finishes last of what all blocks have stored
Outcome histogram(Fault);      // atomics on shared and global memory
Outcome memory(Fault);         // 16-byte loads, shared memory and a shift
Outcome operations(Fault);     // one of the wrong uses of warp operations and barriers
Outcome primitives(Fault);     // comparison of every warp operation with its definition
Outcome many_switches(Fault);  // many warp operations, to be timed
constexpr int kSwitches = 64 * 20000;  // number of operations times threads in many_switches
