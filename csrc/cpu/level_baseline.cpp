// The kernels for what every processor of this architecture has.
#include "cpu/level.h"

#define TOPN_LEVEL baseline
#define TOPN_VECTOR_BYTES 16
#include "cpu/kernels-inl.h"
