// Launches, and what they ask of the device: the part of simt.cuh that runs on the host.
#pragma once

#include "cuda/runtime.h"

#ifndef TOPN_SIMT_HOST
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

// Launches a kernel that may start while the one before it in the stream still runs: every thread must call `wait_for_stream`.
#define SIMT_LAUNCH_DEPENDENT(kernel, grid, block, smem, stream, args) \
  ::topn_gating::cuda::launch_dependent(kernel, grid, 0, block, smem, stream, args)
// Does so in clusters of so many neighbouring blocks, at most 8, which can call `sync_cluster`. See `has_room_for_cluster`.
#define SIMT_LAUNCH_CLUSTERS(kernel, grid, cluster, block, smem, stream, args) \
  ::topn_gating::cuda::launch_dependent(kernel, grid, cluster, block, smem, stream, args)
// Launches a kernel whose blocks are all resident, so that they can call `sync_grid`. It starts when the stream is done.
#define SIMT_LAUNCH_COOPERATIVE(kernel, grid, block, smem, stream, args) \
  ::topn_gating::cuda::launch_cooperative(kernel, grid, block, smem, stream, args)
#endif

namespace topn_gating::cuda {

constexpr int kDefaultShared = 48 << 10;  // bytes of shared memory that need no opt-in

// Returns an attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

#ifndef TOPN_SIMT_HOST
// What the answer to a question about a launch depends on, beside the device.
struct LaunchKey {
  const void* kernel;
  unsigned cluster = 0, block = 0;
  size_t smem = 0;
};

// Returns ask() about a launch on the current device, which is asked once: such questions cost more than the launch.
template <class Ask>
bool asked_once(const LaunchKey& key, const Ask& ask) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, unsigned, unsigned, size_t>, bool> answers;
  int device = -1;
  cudaGetDevice(&device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto [answer, is_new] = answers.try_emplace({device, key.kernel, key.cluster, key.block, key.smem});
  if (is_new) answer->second = ask();
  return answer->second;
}

// Returns whether a question was answered. An error that is expected must not stay the last one, which others look at.
inline bool answered(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess;
}

// Lets a kernel have that much dynamic shared memory.
template <class Args>
cudaError_t allow_shared(void (*kernel)(Args), size_t smem) {
  if (smem <= kDefaultShared) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(smem));
}

// Returns how many blocks of a kernel a multiprocessor runs at once, at least 1.
template <class Args>
int resident_blocks(void (*kernel)(Args), unsigned block, size_t smem) {
  int blocks = 1;
  const bool known = answered(allow_shared(kernel, smem)) &&
                     answered(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, int(block), smem));
  return known && blocks > 1 ? blocks : 1;
}

// Returns whether a kernel's code is for devices of compute capability 9.0 or newer.
inline bool is_for_sm90(const void* kernel) {
  cudaFuncAttributes attributes{};
  return answered(cudaFuncGetAttributes(&attributes, kernel)) && attributes.ptxVersion >= 90;
}

// Returns whether `launch_dependent` may start a kernel early: the device can, and the kernel's code waits. Before CUDA 12.3 a
// graph could not record such a launch.
inline bool starts_early(const void* kernel) {
#if CUDART_VERSION >= 12030
  return asked_once({kernel}, [&] {
    const char* const wanted = std::getenv("TOPN_GATING_DEPENDENT_LAUNCH");
    int driver = 0;
    return (wanted == nullptr || std::strcmp(wanted, "0") != 0) && answered(cudaDriverGetVersion(&driver)) &&
           driver >= 12030 && device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && is_for_sm90(kernel);
  });
#else
  return false;
#endif
}

// Returns a launch's configuration, without a stream. Its attributes, of which there is the cluster's size at most, are in
// `attributes`.
inline cudaLaunchConfig_t configuration(unsigned grid, unsigned cluster, unsigned block, size_t smem,
                                        cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = smem;
  config.attrs = attributes;
  if (cluster > 0) {
    cudaLaunchAttribute& size = attributes[config.numAttrs++];
    size.id = cudaLaunchAttributeClusterDimension;
    size.val.clusterDim.x = cluster;
    size.val.clusterDim.y = size.val.clusterDim.z = 1;
  }
  return config;
}

template <class Args>
cudaError_t launch_dependent(void (*kernel)(Args), unsigned grid, unsigned cluster, unsigned block, size_t smem,
                             cudaStream_t stream, Args args) {
  const cudaError_t refused = allow_shared(kernel, smem);
  if (refused != cudaSuccess) return refused;
  const void* const function = reinterpret_cast<const void*>(kernel);
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config = configuration(grid, cluster, block, smem, attributes);
  config.stream = stream;
  if (starts_early(function)) {
    cudaLaunchAttribute& early = attributes[config.numAttrs++];
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
  }
  void* parameters[] = {&args};
  return cudaLaunchKernelExC(&config, function, parameters);
}

template <class Args>
cudaError_t launch_cooperative(void (*kernel)(Args), unsigned grid, unsigned block, size_t smem, cudaStream_t stream,
                               Args args) {
  const cudaError_t refused = allow_shared(kernel, smem);
  if (refused != cudaSuccess) return refused;
  void* parameters[] = {&args};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(grid), dim3(block), parameters, smem, stream);
}

// Returns whether a kernel's code is for devices with clusters, and the current device has room for one of so many blocks: the
// part of a device that MIG or MPS leaves to the process may not have it.
template <class Args>
bool has_room_for_cluster(void (*kernel)(Args), unsigned cluster, unsigned block, size_t smem) {
  const void* const function = reinterpret_cast<const void*>(kernel);
  return asked_once({function, cluster, block, smem}, [&] {
    if (!is_for_sm90(function) || !answered(allow_shared(kernel, smem))) return false;
    cudaLaunchAttribute size{};
    const cudaLaunchConfig_t config = configuration(cluster, cluster, block, smem, &size);
    int clusters = 0;
    return answered(cudaOccupancyMaxActiveClusters(&clusters, function, &config)) && clusters > 0;
  });
}
#else
template <class Args>
bool has_room_for_cluster(void (* /*kernel*/)(Args), unsigned /*cluster*/, unsigned /*block*/, size_t /*smem*/) {
  return simt_has_room_for_cluster();
}

template <class Args>
int resident_blocks(void (* /*kernel*/)(Args), unsigned /*block*/, size_t /*smem*/) {
  return 1;
}
#endif

// Returns whether the current device has clusters. Whether a launch can use them is for `has_room_for_cluster` to say.
inline bool has_clusters() { return device_attribute(cudaDevAttrClusterLaunch) != 0; }

}  // namespace topn_gating::cuda
