// Functions small enough to be part of every caller, on the host and on a device.
#pragma once

#ifdef __CUDACC__
#define TOPN_INLINE __host__ __device__ __forceinline__
#else
#define TOPN_INLINE inline __attribute__((always_inline))
#endif

// An array that is indexed in an unrolled loop stays in registers.
#ifdef __CUDA_ARCH__
#define TOPN_PRAGMA(text) _Pragma(#text)
#define TOPN_UNROLL _Pragma("unroll")
#define TOPN_UNROLL_BY(times) TOPN_PRAGMA(unroll times)
#else
#define TOPN_UNROLL
#define TOPN_UNROLL_BY(times)
#endif
