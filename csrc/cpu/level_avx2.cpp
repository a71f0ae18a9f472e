// The kernels for x86-64 processors with AVX2 and FMA (x86-64-v3).
#define TOPN_LEVEL avx2
#define TOPN_VECTOR_BYTES 32
#include "cpu/level.h"

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,bmi,bmi2")
#endif

#include "cpu/kernels-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
