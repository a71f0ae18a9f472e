// What a level (level_*.cpp) defines before it includes the kernels, and every standard header that they use.
//
// A level compiles the same kernels for one instruction set, in a namespace of its own. Standard headers come first,
// outside the level's target: the linker merges their inline functions across levels, so they must run everywhere.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/kernels.h"
