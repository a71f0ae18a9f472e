// What every header of the CPU kernels includes first: the level's macros and the standard headers.
//
// A level is the same kernels compiled for one instruction set, in the namespace topn_gating::cpu::TOPN_LEVEL. A level_*.cpp
// defines TOPN_LEVEL and TOPN_VECTOR_BYTES, includes this, and then the kernels inside a region of the compiler's target
// pragma. So standard headers are outside of the region: the linker merges their inline functions across levels, so these must
// run on every processor. All code on vectors is inside of it, since GCC lowers vector operations before it inlines functions.
// Whatever a level does not always inline is in its namespace, or is a template over a type of its own, so that the linker
// merges nothing.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <numeric>
#include <type_traits>
#include <utility>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"
#include "cpu/pages.h"
#include "cpu/workspace.h"

#ifndef TOPN_LEVEL  // a header that is opened alone
#define TOPN_LEVEL baseline
#define TOPN_VECTOR_BYTES 16
#endif
