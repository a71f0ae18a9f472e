// Attributes of functions and loops, for kernels that several compilers compile.
#pragma once

// An inline function of host and device, which is always inlined.
#ifdef __CUDACC__
#define TOPN_INLINE __host__ __device__ __forceinline__
#else
#define TOPN_INLINE inline __attribute__((always_inline))
#endif

// Unroll the next loop on a GPU: an array that it indexes then stays in registers.
#ifdef __CUDA_ARCH__
#define TOPN_PRAGMA(text) _Pragma(#text)
#define TOPN_UNROLL _Pragma("unroll")
#define TOPN_UNROLL_BY(times) TOPN_PRAGMA(unroll times)
#else
#define TOPN_UNROLL
#define TOPN_UNROLL_BY(times)
#endif
