// What a test sets and asks about the kernels' runs on the host, in C so that ctypes reaches it too. The state is the
// process's own and one: launches from several threads run one after another, and a test that sets it launches alone.
#pragma once

#include <stdint.h>

#define SIMT_EXPORT __attribute__((visibility("default")))

extern "C" {

// Who runs next, of the threads that can; and the order of the blocks.
enum SimtSchedule {
  SIMT_FIFO = 0,    // who was made ready first; blocks ascending
  SIMT_LIFO = 1,    // who was made ready last; blocks descending
  SIMT_RANDOM = 2,  // anyone, and any order, by the seed; every launch starts from the seed
};
SIMT_EXPORT void simt_set_schedule(int schedule, uint64_t seed);

// What cudaDevAttrMultiProcessorCount says, 3 at first: a cooperative launch takes as many blocks.
SIMT_EXPORT void simt_set_multiprocessors(int count);

// Since the last reset: how many launches there were, refused ones too, and the text of the last error, or "".
SIMT_EXPORT long simt_launches(void);
SIMT_EXPORT const char* simt_error(void);
SIMT_EXPORT void simt_reset(void);
}
