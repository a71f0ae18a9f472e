// What a test sets and asks about the kernels' runs on the host, in C so that ctypes reaches it too. The state is the
// process's own and one: launches from several threads run one after another, and a test that sets it launches alone.
#pragma once

#include <stdint.h>

#define SIMT_EXPORT __attribute__((visibility("default")))

extern "C" {

// Which of the ready threads runs next, and the order of the blocks.
enum SimtSchedule {
  SIMT_FIFO = 0,    // the thread that became ready first; blocks ascending
  SIMT_LIFO = 1,    // the thread that became ready last; blocks descending
  SIMT_RANDOM = 2,  // a random thread, and a random order of blocks; every launch starts from the seed
};
SIMT_EXPORT void simt_set_schedule(int schedule, uint64_t seed);

// Sets the value of cudaDevAttrMultiProcessorCount, initially 3: a cooperative launch has as many blocks.
SIMT_EXPORT void simt_set_multiprocessors(int count);

// Return the number of launches since the last reset, refused ones too, and the text of the last error, or "".
SIMT_EXPORT long simt_launches(void);
SIMT_EXPORT const char* simt_error(void);
SIMT_EXPORT void simt_reset(void);
}
