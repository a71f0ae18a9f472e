// Launches: their checks, the setup and cleanup of blocks, and the functions of the CUDA runtime that describe the device.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <numeric>
#include <utility>

#include "scheduler.h"

namespace simt {
namespace {

constexpr uint64_t kMaxBlock = 1024, kMaxGrid = 0x7fffffff, kMaxCluster = 8;
constexpr size_t kMaxShared = 227 << 10;  // bytes of shared memory of a block on an H100
// Number of fibers over which a launch spreads its blocks under ThreadSanitizer, which allows 8128 and whose cost grows with
// each. Blocks that run on the same fibers look ordered to it, so it misses races between them.
constexpr size_t kTsanFibers = 512;

std::mutex launching;

// Returns the error of a launch that CUDA would refuse, and sets its text; cudaSuccess: the launch may run.
cudaError_t refuse(const Request& request) {
  const auto because = [&](const char* what, uint64_t value, cudaError_t error) {
    settings.error = std::string("simt: kernel ") + request.kernel + ": " + what + std::to_string(value) + "\n";
    return error;
  };
  if (request.block < 1 || request.block > kMaxBlock) {
    return because("threads in a block: ", request.block, cudaErrorInvalidConfiguration);
  }
  if (request.grid < 1 || request.grid > kMaxGrid) {
    return because("blocks in a grid: ", request.grid, cudaErrorInvalidConfiguration);
  }
  if (request.shared_bytes > kMaxShared) {
    return because("bytes of shared memory: ", request.shared_bytes, cudaErrorInvalidValue);
  }
  if (request.cluster > kMaxCluster || (request.cluster != 0 && request.grid % request.cluster != 0)) {
    return because("blocks in a cluster: ", request.cluster, cudaErrorInvalidConfiguration);
  }
  if (request.cluster != 0 && settings.clusters != SIMT_CLUSTERS) {
    const char* const what = settings.clusters == SIMT_NO_CLUSTERS ? "no clusters on this device, blocks in a cluster: "
                                                                  : "no room for a cluster, blocks: ";
    return because(what, request.cluster, cudaErrorInvalidConfiguration);
  }
  if (request.cooperative && request.grid > uint64_t(settings.multiprocessors)) {
    return because("blocks in a cooperative grid: ", request.grid, cudaErrorCooperativeLaunchTooLarge);
  }
  return cudaSuccess;
}

// Returns a copy of the kernel and its arguments, made without the knowledge of ThreadSanitizer: they are the one memory that
// the threads of a dependent launch read although nothing orders it before them.
void* copy_call(const Request& request) {
  void* copy = std::malloc(request.call_bytes);
  if (copy == nullptr) throw std::bad_alloc();
  const auto* from = static_cast<const volatile char*>(request.call);  // volatile: a loop, where memcpy would be reported
  for (size_t i = 0; i < request.call_bytes; ++i) static_cast<volatile char*>(copy)[i] = from[i];
  return copy;
}

// Allocates shared memory with every bit set: NaN as a float, -1 as an integer.
void* allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes) != 0) throw std::bad_alloc();
  std::memset(memory, 0xff, bytes);
  return memory;
}

// Initialises a block's threads and warps, except for the threads' fibers.
void set_threads(Block& block) {
  const size_t count = machine.request.block;
  block.exited = 0;
  block.barrier.arrived = 0;
  block.threads.assign(count, Thread());
  block.warps.assign((count + 31) / 32, Warp());
  for (size_t i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.warp = &block.warps[i / 32];
    thread.index = unsigned(i);
    thread.lane = unsigned(i % 32);
  }
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const size_t lanes = count - w * 32;
    block.warps[w].threads = &block.threads[w * 32];
    block.warps[w].existing = lanes >= 32 ? ~0u : (1u << lanes) - 1;
  }
}

// Allocates a block's shared memory and tokens and prepares its fibers. Under ThreadSanitizer the setter does so: the launcher
// comes after all earlier blocks, so that their races with this one would be missed. The threads of a dependent launch come
// after the launcher when they have waited for the stream: memory that they access before races with what wrote it.
void set_memory(Block& block, size_t first_fiber) {
  if (has_tsan()) {
    become(machine.setter);
    if (!machine.request.dependent) acquire(&machine.tokens->start);
    block.tokens = new Tokens();
  }
  block.shared = allocate_shared(machine.request.shared_bytes);
  for (Thread& thread : block.threads) thread.fiber = &prepare_fiber(first_fiber + thread.index);
  if (!has_tsan()) return;
  release(&block.tokens->start);
  become(machine.launcher.tsan);
  for (const Thread& thread : block.threads) {
    const std::string name = "block " + std::to_string(block.index) + " thread " + std::to_string(thread.index);
    __tsan_set_fiber_name(thread.fiber->tsan, name.c_str());
  }
}

// Sets a block up and queues its threads.
void set_block(Block& block, unsigned index, size_t first_fiber) {
  block.index = index;
  set_threads(block);
  set_memory(block, first_fiber);
  for (Thread& thread : block.threads) make_ready(thread);
  machine.running += block.threads.size();
}

// Orders the accesses of the block's threads, also of those that did not finish, before the launcher's next ones, for
// ThreadSanitizer, and frees the tokens.
void join_threads(Block& block) {
  if (machine.error != nullptr) {
    for (Thread& thread : block.threads) {
      become(thread.fiber->tsan);
      release(&block.tokens->end);
    }
    become(machine.launcher.tsan);
  }
  acquire(&block.tokens->end);
  delete block.tokens;
  for (Warp& warp : block.warps) {
    while (warp.rounds != nullptr) delete std::exchange(warp.rounds, warp.rounds->next);
  }
}

// Frees a block's memory. All blocks that ran with it are joined.
void clear_block(Block& block, size_t first_fiber) {
  std::free(block.shared);
  if (machine.error == nullptr) return;
  // The fibers of a failed launch may have stopped anywhere in the kernel, so they are deleted.
  for (const Thread& thread : block.threads) machine.fibers[first_fiber + thread.index].reset();
}

// Runs the blocks that run at the same time: of those in `indices`, as many as machine.blocks has.
void run_blocks(const unsigned* indices, size_t first_fiber) {
  const size_t threads = machine.request.block;
  machine.running = 0;
  machine.ready_count = 0;
  machine.grid.arrived = 0;
  for (size_t i = 0; i < machine.blocks.size(); ++i) set_block(machine.blocks[i], indices[i], first_fiber + i * threads);
  run_ready();
  if (machine.error != nullptr) settings.error = describe_error();
  for (Block& block : machine.blocks) {
    if (has_tsan()) join_threads(block);
  }
  for (size_t i = 0; i < machine.blocks.size(); ++i) clear_block(machine.blocks[i], first_fiber + i * threads);
}

// Returns the blocks' indices in the order in which the schedule runs them: clusters of so many blocks one after another.
std::vector<unsigned> block_order(size_t count, unsigned cluster) {
  std::vector<unsigned> order(count / cluster);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.schedule == SIMT_LIFO) std::reverse(order.begin(), order.end());
  if (settings.schedule == SIMT_RANDOM) {
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  }
  std::vector<unsigned> blocks;
  for (const unsigned first : order) {
    for (unsigned rank = 0; rank < cluster; ++rank) blocks.push_back(first * cluster + rank);
  }
  return blocks;
}

// Chooses the fibers of a launch. Those of a dependent one are not those of the launch before it, with which ThreadSanitizer
// would see no races.
void choose_fibers(size_t count) {
  const bool others = has_tsan() && machine.request.dependent && count > machine.first_fiber;
  machine.first_fiber = others ? machine.last_fiber : 0;
  machine.last_fiber = machine.first_fiber + count;
  machine.fibers.resize(max(machine.fibers.size(), machine.last_fiber));
}

// Runs a launch that was not refused.
void run(const Request& request) {
  machine.request = request;
  machine.error = nullptr;
  blockDim = dim3(unsigned(request.block));
  gridDim = dim3(unsigned(request.grid));
  start_random();
  const unsigned cluster = max(request.cluster, 1u);
  const std::vector<unsigned> order = block_order(request.grid, cluster);
  const size_t live = request.cooperative ? request.grid : cluster, fibers = live * request.block;
  const size_t sets = has_tsan() ? max(kTsanFibers / fibers, size_t(1)) : 1;  // sets of fibers that blocks use in turn
  machine.blocks.resize(live);
  size_t ring = 1;
  while (ring < fibers) ring *= 2;
  machine.ready.resize(ring);
  choose_fibers(sets * fibers);
  if (has_tsan()) {
    machine.launcher.tsan = __tsan_get_current_fiber();
    if (machine.setter == nullptr) machine.setter = __tsan_create_fiber(0);
    machine.tokens = new Tokens();
    release(&machine.tokens->start);
    become(machine.setter);
  }
  void* const call = copy_call(request);
  machine.request.call = call;
  if (has_tsan()) become(machine.launcher.tsan);
  for (size_t i = 0; i < order.size() && machine.error == nullptr; i += live) {
    run_blocks(&order[i], machine.first_fiber + i / live % sets * fibers);
  }
  std::free(call);
  delete std::exchange(machine.tokens, nullptr);
}

}  // namespace

cudaError_t launch(const Request& request) {
  const std::lock_guard<std::mutex> lock(launching);
  ++settings.launches;
  const cudaError_t refused = refuse(request);
  if (refused != cudaSuccess) return refused;
  run(request);
  return machine.error == nullptr ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace simt

extern "C" {

void simt_set_schedule(int schedule, uint64_t seed) {
  simt::settings.schedule = schedule;
  simt::settings.seed = seed;
}
void simt_set_multiprocessors(int count) { simt::settings.multiprocessors = count; }
void simt_set_clusters(int kind) { simt::settings.clusters = kind; }
long simt_launches(void) { return simt::settings.launches; }
long simt_events(void) { return simt::settings.events; }
const char* simt_error(void) { return simt::settings.error.c_str(); }
void simt_reset(void) {
  simt::settings.launches = simt::settings.events = 0;
  simt::settings.error.clear();
}
}

bool simt_has_room_for_cluster() { return simt::settings.clusters == SIMT_CLUSTERS; }
void simt_event() { ++simt::settings.events; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
    case cudaErrorCooperativeLaunchTooLarge: return "too many blocks in cooperative launch";
  }
  return "unrecognized error code";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidValue;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = simt::settings.multiprocessors; return cudaSuccess;
    case cudaDevAttrClusterLaunch: *value = simt::settings.clusters != SIMT_NO_CLUSTERS; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = int(simt::kMaxShared); return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
