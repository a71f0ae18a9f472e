// Tests of the emulator: correct kernels give correct results, and every planted fault is reported. `test_simt` runs all tests,
// `test_simt NAME...` those whose names begin with one of the arguments. A fault that a sanitizer reports ends the process, so
// each of them runs in a child process.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <string>
#include <thread>

#include "kernels.h"
#include "test_values.h"

namespace {

// What reports a fault, and (kTool) what this program is compiled with.
enum Tool { kScheduler, kAsan, kTsan };
#if defined(__SANITIZE_THREAD__)
constexpr int kTool = kTsan;
#elif defined(__SANITIZE_ADDRESS__)
constexpr int kTool = kAsan;  // with UBSan
#else
constexpr int kTool = kScheduler;
#endif

struct Schedule {
  const char* name;
  int kind;
  uint64_t seed;
};
constexpr Schedule kSchedules[] = {
    {"fifo", SIMT_FIFO, 0}, {"lifo", SIMT_LIFO, 0}, {"random1", SIMT_RANDOM, 1}, {"random2", SIMT_RANDOM, 2}};

struct Kernel {
  const char* name;
  Outcome (*run)(Fault);
};
constexpr Kernel kRight[] = {{"softmax", softmax},         {"block_scan", block_scan}, {"warp_reverse", warp_reverse},
                             {"grid_prefix", grid_prefix}, {"cluster_sums", cluster_sums},
                             {"chain", chain},             {"last_block", last_block}, {"histogram", histogram},
                             {"memory", memory},           {"operations", operations}, {"primitives", primitives}};

struct Planted {
  const char* name;  // in the comments that mark lines
  Outcome (*run)(Fault);
  Fault fault;
  Tool tool;           // what reports the fault
  const char* report;  // text that the report contains
};
constexpr const char* kRace = "ThreadSanitizer: data race";
constexpr Planted kPlanted[] = {
    {"NoFirstBarrier", block_scan, Fault::NoFirstBarrier, kTsan, kRace},
    {"NoSecondBarrier", block_scan, Fault::NoSecondBarrier, kTsan, kRace},
    {"NoSyncWarp", warp_reverse, Fault::NoSyncWarp, kTsan, kRace},
    {"ShuffleForSyncWarp", warp_reverse, Fault::ShuffleForSyncWarp, kTsan, kRace},
    {"HalfMasks", warp_reverse, Fault::HalfMasks, kTsan, kRace},
    {"NoGridSync", grid_prefix, Fault::NoGridSync, kTsan, kRace},
    {"NoClusterSync", cluster_sums, Fault::NoClusterSync, kTsan, kRace},
    {"EarlyExit", cluster_sums, Fault::EarlyExit, kTsan, kRace},
    {"EarlyRead", chain, Fault::EarlyRead, kTsan, kRace},
    {"EarlyWrite", chain, Fault::EarlyWrite, kTsan, kRace},
    {"PlainTicket", last_block, Fault::PlainTicket, kTsan, kRace},
    {"SharedAdd", histogram, Fault::SharedAdd, kTsan, kRace},
    {"BlocksAdd", histogram, Fault::BlocksAdd, kTsan, kRace},
    {"SharedOverrun", memory, Fault::SharedOverrun, kAsan, "AddressSanitizer: heap-buffer-overflow"},
    {"Misaligned", memory, Fault::Misaligned, kAsan, "misaligned address"},
    {"ShiftTooLarge", memory, Fault::ShiftTooLarge, kAsan, "shift exponent 32 is too large"},
    {"DivergentShuffle", operations, Fault::DivergentShuffle, kScheduler, "at different operations"},
    {"DivergentExit", operations, Fault::DivergentExit, kScheduler, "exit"},
    {"OutsideMask", operations, Fault::OutsideMask, kScheduler, "a lane outside its mask"},
    {"NotInOwnMask", operations, Fault::NotInOwnMask, kScheduler, "not in its own mask"},
    {"ExitedLane", operations, Fault::ExitedLane, kScheduler, "exit"},
    {"MissingLane", operations, Fault::MissingLane, kScheduler, "a lane that does not exist"},
    {"OtherOperation", operations, Fault::OtherOperation, kScheduler, "at different operations"},
    {"OtherCaller", operations, Fault::OtherCaller, kScheduler, "at different operations"},
    {"OtherMask", operations, Fault::OtherMask, kScheduler, "at different operations"},
    {"BadWidth", operations, Fault::BadWidth, kScheduler, "width of a shuffle"},
    {"ShuffleAgainstBarrier", operations, Fault::ShuffleAgainstBarrier, kScheduler, "barrier"},
    {"MissedBarrier", operations, Fault::MissedBarrier, kScheduler, "exit"},
    {"OtherLine", operations, Fault::OtherLine, kScheduler, "at different barriers"},
    {"NotCooperative", operations, Fault::NotCooperative, kScheduler, "not cooperative"},
    {"NoCluster", operations, Fault::NoCluster, kScheduler, "a launch that has none"},
    {"Deadlock", operations, Fault::Deadlock, kScheduler, "no thread can run"},
    {"NoWait", chain, Fault::NoWait, kScheduler, "never waited for the stream\n  block 1 thread 6"},
    {"TwoWaits", chain, Fault::TwoWaits, kScheduler, "a second time"},
};

int failures = 0;

void fail_at(int line, const std::string& what) {
  std::printf("FAILED (line %d): %s\n", line, what.c_str());
  ++failures;
}
#define CHECK(condition, what)                   \
  do {                                           \
    if (!(condition)) fail_at(__LINE__, (what)); \
  } while (false)

void set(const Schedule& schedule) { simt_set_schedule(schedule.kind, schedule.seed); }

// Tests that a correct kernel gives the right result, with the same bits in every schedule.
void test_right(const Kernel& kernel) {
  std::vector<unsigned> bits;
  for (const Schedule& schedule : kSchedules) {
    set(schedule);
    simt_reset();
    const Outcome outcome = kernel.run(Fault::None);
    CHECK(outcome.error == cudaSuccess, std::string(schedule.name) + ": " + simt_error());
    CHECK(outcome.right, std::string(schedule.name) + ": a wrong result");
    CHECK(bits.empty() || bits == outcome.bits, std::string(schedule.name) + ": its bits differ from those of another schedule");
    bits = outcome.bits;
  }
}

// Returns "file:line" of the lines that the source marks with the fault.
std::vector<std::string> marked_lines(const std::string& fault) {
  const std::string folder = std::string(__FILE__).substr(0, std::string(__FILE__).rfind("test_simt.cpp"));
  std::vector<std::string> lines;
  for (const char* file : {"kernels.cu", "dependent.cu", "misuse.cu"}) {
    std::ifstream source(folder + file);
    CHECK(source.good(), "cannot read " + folder + file);
    std::string line;
    for (int number = 1; std::getline(source, line); ++number) {
      const size_t mark = line.find("// fault ");
      if (mark == std::string::npos || (line.substr(mark + 8) + ",").find(" " + fault + ",") == std::string::npos) continue;
      lines.push_back(std::string(file) + ":" + std::to_string(number));
    }
  }
  return lines;
}

// Checks that a report has the fault's text and names the marked lines: all of them or, where the scheduler reports the fault,
// one, since the schedule decides which line is reached first. A thread that exits has none.
void check_report(const Planted& planted, const Schedule& schedule, const std::string& report) {
  const std::string name = std::string(planted.name) + ", " + schedule.name;
  CHECK(report.find(planted.report) != std::string::npos, name + ": reported as\n" + report);
  int named = 0;
  const std::vector<std::string> lines = marked_lines(planted.name);
  for (const std::string& line : lines) named += report.find(line) != std::string::npos;
  const int wanted = planted.tool == kScheduler ? 1 : int(lines.size());
  CHECK(lines.empty() || (named > 0 && named >= wanted), name + ": the wrong lines are named in\n" + report);
}

// Tests that the scheduler reports a fault in every schedule, and that later launches are not affected.
void test_misuse(const Planted& planted) {
  for (const Schedule& schedule : kSchedules) {
    set(schedule);
    simt_reset();
    const Outcome outcome = planted.run(planted.fault);
    CHECK(outcome.error == cudaErrorLaunchFailure, std::string(planted.name) + " was not reported in " + schedule.name);
    check_report(planted, schedule, simt_error());
    CHECK(softmax(Fault::None).right && grid_prefix(Fault::None).right, "the launches after a failed one are wrong");
  }
}

// Runs this program on one planted fault; returns what it printed, and sets `well` to whether it ended with exit code 0.
std::string child(const Planted& planted, const Schedule& schedule, bool* well) {
  const std::string options = "UBSAN_OPTIONS=\"halt_on_error=1:$UBSAN_OPTIONS\" "
                              "TSAN_OPTIONS=\"atexit_sleep_ms=0:$TSAN_OPTIONS\"";
  const std::string command = options + " /proc/" + std::to_string(getpid()) + "/exe --plant " + planted.name + " " +
                              schedule.name + " 2>&1";
  std::string report;
  FILE* pipe = popen(command.c_str(), "r");
  char part[4096];
  while (const size_t count = fread(part, 1, sizeof part, pipe)) report.append(part, count);
  const int status = pclose(pipe);
  *well = WIFEXITED(status) && WEXITSTATUS(status) == 0;
  return report;
}

// Tests that the sanitizer reports a fault in every schedule.
void test_sanitized(const Planted& planted) {
  for (const Schedule& schedule : kSchedules) {
    bool well = false;
    const std::string report = child(planted, schedule, &well);
    CHECK(!well, std::string(planted.name) + " was not reported in " + schedule.name);
    check_report(planted, schedule, report);
  }
}

// Returns whether the fault, a missing barrier, gives a wrong result in some schedule, so that it shows without ThreadSanitizer.
bool shows(Fault fault) {
  return fault == Fault::NoFirstBarrier || fault == Fault::NoSecondBarrier || fault == Fault::NoSyncWarp ||
         fault == Fault::NoGridSync || fault == Fault::NoClusterSync || fault == Fault::EarlyExit;
}

void test_wrong_result(const Planted& planted) {
  bool wrong = false;
  for (const Schedule& schedule : kSchedules) {
    set(schedule);
    wrong = wrong || !planted.run(planted.fault).right;
  }
  CHECK(wrong, std::string(planted.name) + " gives the right result in every schedule");
}

// Tests that launches beyond the limits of the device are refused.
void test_refused() {
  const auto launch = [](uint64_t grid, uint64_t block, size_t shared, bool cooperative) {
    struct Args {};
    void (*kernel)(Args) = [](Args) {};
    return cooperative ? SIMT_LAUNCH_COOPERATIVE(kernel, grid, block, shared, nullptr, Args{})
                       : SIMT_LAUNCH(kernel, grid, block, shared, nullptr, Args{});
  };
  simt_reset();
  CHECK(launch(1, 1025, 0, false) == cudaErrorInvalidConfiguration, "a block of 1025 threads");
  CHECK(std::string(simt_error()).find("1025") != std::string::npos, simt_error());
  CHECK(launch(1, 0, 0, false) == cudaErrorInvalidConfiguration, "a block of no threads");
  CHECK(launch(0, 32, 0, false) == cudaErrorInvalidConfiguration, "a grid of no blocks");
  CHECK(launch(1ull << 31, 32, 0, false) == cudaErrorInvalidConfiguration, "a grid of 2^31 blocks");
  CHECK(launch(1, 32, (227 << 10) + 1, false) == cudaErrorInvalidValue, "more than 227 KB of shared memory");
  CHECK(launch(1, 32, 227 << 10, false) == cudaSuccess, "227 KB of shared memory");
  CHECK(launch(2, 1024, 0, false) == cudaSuccess, "a block of 1024 threads");
  CHECK(launch(4, 32, 0, true) == cudaErrorCooperativeLaunchTooLarge, "more blocks than multiprocessors");
  simt_set_multiprocessors(4);
  CHECK(launch(4, 32, 0, true) == cudaSuccess, "as many blocks as multiprocessors");
  int count = 0;
  CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && count == 4, "the attribute");
  simt_set_multiprocessors(3);
  CHECK(simt_launches() == 9, "the number of launches");
  const auto launch_clusters = [](uint64_t grid, unsigned cluster) {
    struct Args {};
    void (*kernel)(Args) = [](Args) { simt_wait_for_stream(); };
    return SIMT_LAUNCH_CLUSTERS(kernel, grid, cluster, 32, 0, nullptr, Args{});
  };
  CHECK(launch_clusters(18, 9) == cudaErrorInvalidConfiguration, "9 blocks in a cluster");
  CHECK(launch_clusters(9, 2) == cudaErrorInvalidConfiguration, "a part of a cluster");
  CHECK(launch_clusters(16, 8) == cudaSuccess, "8 blocks in a cluster");
  const auto has_clusters = [] {
    int has = -1;
    return cudaDeviceGetAttribute(&has, cudaDevAttrClusterLaunch, 0) == cudaSuccess && has == 1;
  };
  CHECK(has_clusters() && simt_has_room_for_cluster(), "clusters initially");
  simt_set_clusters(SIMT_NO_CLUSTERS);
  CHECK(launch_clusters(16, 8) == cudaErrorInvalidConfiguration, "clusters on a device without");
  CHECK(!has_clusters() && !simt_has_room_for_cluster(), "a device without clusters");
  simt_set_clusters(SIMT_NO_ROOM_FOR_CLUSTERS);
  CHECK(launch_clusters(16, 8) == cudaErrorInvalidConfiguration, "clusters without room for them");
  CHECK(has_clusters() && !simt_has_room_for_cluster(), "a device without room for clusters");
  simt_set_clusters(SIMT_CLUSTERS);
}

// Tests launches from several OS threads at once, which run one after another.
void test_threads() {
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  const auto launch = [&] { right += last_block(Fault::None).right && block_scan(Fault::None).right; };
  for (int i = 0; i < 3; ++i) threads.emplace_back(launch);
  for (std::thread& thread : threads) thread.join();
  CHECK(right == 3, "wrong results");
}

void time_switches() {
  for (const Schedule& schedule : kSchedules) {
    set(schedule);
    const auto start = std::chrono::steady_clock::now();
    CHECK(many_switches(Fault::None).error == cudaSuccess, simt_error());
    const std::chrono::duration<double, std::nano> time = std::chrono::steady_clock::now() - start;
    std::printf("  %s: %.1f ns a warp operation and thread\n", schedule.name, time.count() / kSwitches);
  }
}

// Runs a test if `wanted`, of `count` elements, is empty or has a prefix of its name.
void run(const std::string& name, int count, char** wanted, const std::function<void()>& test) {
  bool chosen = count == 0;
  for (int i = 0; i < count; ++i) chosen = chosen || name.rfind(wanted[i], 0) == 0;
  if (!chosen) return;
  const int before = failures;
  test();
  std::printf("%s %s\n", failures == before ? "ok" : "FAILED", name.c_str());
  std::fflush(stdout);
}

// Runs a fault in a schedule: what the child process does.
int plant(const std::string& fault, const std::string& name) {
  for (const Schedule& schedule : kSchedules) {
    if (name == schedule.name) set(schedule);
  }
  for (const Planted& planted : kPlanted) {
    if (fault == planted.name) planted.run(planted.fault);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 4 && std::string(argv[1]) == "--plant") return plant(argv[2], argv[3]);
  const int count = argc - 1;
  char** wanted = argv + 1;
  run("half", count, wanted, [] { CHECK(wrong_halves() == "", wrong_halves()); });
  run("bits", count, wanted, [] { CHECK(wrong_bits() == "", wrong_bits()); });
  run("refused", count, wanted, test_refused);
  for (const Kernel& kernel : kRight) run(kernel.name, count, wanted, [&] { test_right(kernel); });
  for (const Planted& planted : kPlanted) {
    if (planted.tool == kScheduler) run(planted.name, count, wanted, [&] { test_misuse(planted); });
    if (planted.tool == kTool && kTool != kScheduler) run(planted.name, count, wanted, [&] { test_sanitized(planted); });
    if (shows(planted.fault) && kTool == kScheduler) run(planted.name, count, wanted, [&] { test_wrong_result(planted); });
  }
  run("threads", count, wanted, test_threads);
  run("time", count, wanted, time_switches);
  if (failures != 0) std::printf("%d checks failed\n", failures);
  return failures == 0 ? 0 : 1;
}
