// Functions small enough to be part of every caller, on the host and on a device.
#pragma once

#ifdef __CUDACC__
#define TOPN_INLINE __host__ __device__ __forceinline__
#else
#define TOPN_INLINE inline __attribute__((always_inline))
#endif
