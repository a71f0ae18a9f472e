// Settings and results of the kernels' launches on the host, in C so that ctypes can call them. The state is global to the
// process: launches from several threads run one after another, and a test that changes the settings must launch alone.
#pragma once

#include <stdint.h>

#define SIMT_EXPORT __attribute__((visibility("default")))

extern "C" {

// Selects which of the ready threads runs next, and the order of the blocks.
enum SimtSchedule {
  SIMT_FIFO = 0,    // the thread that became ready first; blocks ascending
  SIMT_LIFO = 1,    // the thread that became ready last; blocks descending
  SIMT_RANDOM = 2,  // a random thread, and a random order of blocks; every launch starts from the seed
};
SIMT_EXPORT void simt_set_schedule(int schedule, uint64_t seed);

// Sets the value of cudaDevAttrMultiProcessorCount, initially 3, which is also the most blocks of a cooperative launch.
SIMT_EXPORT void simt_set_multiprocessors(int count);

// Sets whether the device has clusters of blocks, and room for one, which it has initially.
enum SimtClusters {
  SIMT_NO_CLUSTERS = 0,
  SIMT_CLUSTERS = 1,
  SIMT_NO_ROOM_FOR_CLUSTERS = 2,  // it has them, and refuses to launch them: the process has a part of the device
};
SIMT_EXPORT void simt_set_clusters(int kind);

// Return the number of launches since the last reset, refused ones included, and the text of the last error ("": none).
SIMT_EXPORT long simt_launches(void);
SIMT_EXPORT const char* simt_error(void);
// Returns how often kernels have called simt_event since the last reset: by it, tests see that rare code runs, and runs rarely.
SIMT_EXPORT long simt_events(void);
// Sets the numbers of launches and events to 0 and clears the error.
SIMT_EXPORT void simt_reset(void);
}
