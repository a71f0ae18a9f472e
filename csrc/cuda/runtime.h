// The CUDA runtime, or what stands for it where the kernels run on the host (simt).
#pragma once

#ifdef TOPN_SIMT_HOST
#include "simt_host.h"
#else
#include <cuda_runtime.h>
#endif
