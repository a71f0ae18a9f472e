// The kernels for the instructions that every processor of this architecture has.
#define TOPN_LEVEL baseline
#define TOPN_VECTOR_BYTES 16
#include "cpu/level.h"
#include "cpu/kernels-inl.h"
