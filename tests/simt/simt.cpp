#include "simt.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

Index threadIdx, blockIdx, blockDim, gridDim;

namespace {

constexpr std::size_t kStackBytes = 128 * 1024;
constexpr unsigned kMaxBlock = 1024;
constexpr int kSharedWithoutAsking = 48 * 1024;

constexpr unsigned kMaxCluster = 8;

enum class State { kRunnable, kBarrier, kCollective, kMbarrier, kClusterBarrier, kDone };

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

struct BulkCopy {
  Copy copy;
  void* barrier;
  unsigned block;           // index in the cluster, of the block whose memory is written
  unsigned char value[16];  // the stored value, if `from` is null
};

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  Index index{};
  unsigned block = 0;  // index in the cluster
  State state = State::kDone;
  std::source_location where;
  unsigned mask = 0;
  std::uint64_t value = 0;
  std::uint64_t gathered[kWarpSize] = {};
  void* mbarrier = nullptr;  // State::kMbarrier
  unsigned parity = 0;
  std::vector<Copy> copies;                  // the open group
  std::deque<std::vector<Copy>> unfinished;  // closed groups
};

struct Block {
  unsigned index = 0;
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  unsigned waiting_at_barrier = 0;
  unsigned done = 0;
};

struct Machine {
  // The threads of a cluster. Those of a block begin at a multiple of the warp size.
  std::vector<std::unique_ptr<Fiber>> fibers;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  Fiber* running = nullptr;
  bool yielded = false;  // to other warps, in the middle of a step
  unsigned threads = 0;  // per block
  unsigned stride = 0;   // from block to block
  std::vector<Block> blocks;
  unsigned waiting_at_cluster_barrier = 0;
  std::vector<BulkCopy> bulk_copies;
  const std::function<void()>* body = nullptr;
  Order order = Order::kForward;
  std::mt19937 random;
  int device = 0;
  Launches launches{};
  std::map<std::pair<int, const void*>, int> allowed_shared;  // by device and kernel

  Block& own_block() { return blocks[running->block]; }
  Fiber& fiber(unsigned block, unsigned thread) { return *fibers[block * stride + thread]; }
};

// NOLINTNEXTLINE(bugprone-throwing-static-initialization): its members are empty, nothing throws
Machine machine;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "simt: %s in block %u\n", what, blockIdx.x);
  // One line per place where threads wait.
  std::map<std::string, std::pair<unsigned, unsigned>> places;
  const char* const names[] = {"runs",
                               "waits at the block barrier",
                               "waits at the warp collective",
                               "waits for a barrier in shared memory",
                               "waits at the cluster barrier",
                               "has exited"};
  for (unsigned b = 0; b < machine.blocks.size(); ++b) {
    for (unsigned t = 0; t < machine.threads; ++t) {
      const Fiber& fiber = machine.fiber(b, t);
      std::string place = names[static_cast<int>(fiber.state)];
      if (fiber.state != State::kRunnable && fiber.state != State::kDone) {
        place += std::string(" at ") + fiber.where.file_name() + ":" +
                 std::to_string(fiber.where.line());
      }
      auto [entry, added] = places.try_emplace(place, t, 0u);
      ++entry->second.second;
    }
  }
  for (const auto& [place, who] : places) {
    std::fprintf(stderr, "simt:   thread %u and %u others: %s\n", who.first, who.second - 1,
                 place.c_str());
  }
  std::fflush(stderr);
  std::_Exit(70);
}

void to_scheduler(bool forever) {
  Fiber& fiber = *machine.running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake_stack, machine.scheduler_stack,
                                 machine.scheduler_stack_bytes);
#endif
  swapcontext(&fiber.context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  (void)forever;
}

void to_fiber(Fiber& fiber) {
  machine.running = &fiber;
  threadIdx = fiber.index;
  blockIdx = {machine.blocks[fiber.block].index, 0, 0};
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
#endif
  swapcontext(&machine.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  machine.running = nullptr;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack,
                                  &machine.scheduler_stack_bytes);
#endif
  (*machine.body)();
  machine.running->state = State::kDone;
  ++machine.own_block().done;
  to_scheduler(true);
}

void prepare() {
  const auto blocks = static_cast<unsigned>(machine.blocks.size());
  const std::size_t needed = std::size_t{blocks} * machine.stride;
  while (machine.fibers.size() < needed) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber->stack == MAP_FAILED) {
      std::fprintf(stderr, "simt: no memory for %zu fibers\n", needed);
      std::abort();
    }
    machine.fibers.push_back(std::move(fiber));
  }
  for (unsigned b = 0; b < blocks; ++b) {
    for (unsigned t = 0; t < machine.threads; ++t) {
      Fiber& fiber = machine.fiber(b, t);
#if defined(__SANITIZE_ADDRESS__)
      // The previous fiber on this stack never returned from its frames.
      __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack;
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, fiber_main, 0);
      fiber.index = {t, 0, 0};
      fiber.block = b;
      fiber.state = State::kRunnable;
      fiber.copies.clear();
      fiber.unfinished.clear();
    }
  }
  machine.waiting_at_cluster_barrier = 0;
}

// --- Barriers in shared memory ---

// 8 bytes: pending arrivals, arrivals per phase, pending bytes (plus kNoBytes), and the parity of
// the phase. The highest bit is 0, which it is not in memory that was never written.
constexpr unsigned kCountBits = 16;
constexpr std::uint64_t kCountMask = (1u << kCountBits) - 1;
constexpr unsigned kBytesShift = 2 * kCountBits, kParityShift = 62;
constexpr std::uint64_t kBytesMask = (std::uint64_t{1} << 30) - 1, kNoBytes = 1u << 29;

struct Phase {
  std::uint64_t pending, arrivals, bytes, parity;
};

Phase load_phase(const void* barrier) {
  if (reinterpret_cast<std::uintptr_t>(barrier) % 8 != 0) fail("a barrier that is misaligned");
  std::uint64_t bits;
  std::memcpy(&bits, barrier, sizeof bits);
  if (bits >> 63 != 0) fail("a barrier that was not initialised");
  return {bits & kCountMask, bits >> kCountBits & kCountMask, bits >> kBytesShift & kBytesMask,
          bits >> kParityShift & 1};
}

void store_phase(void* barrier, Phase phase) {
  if (phase.pending == 0 && phase.bytes == kNoBytes) {
    phase.pending = phase.arrivals;
    phase.parity ^= 1;
  }
  const std::uint64_t bits = phase.pending | phase.arrivals << kCountBits |
                             phase.bytes << kBytesShift | phase.parity << kParityShift;
  std::memcpy(barrier, &bits, sizeof bits);
}

bool phase_ended(const void* barrier, unsigned parity) {
  return load_phase(barrier).parity != parity;
}

void finish_bulk_copy(std::size_t i) {
  const BulkCopy bulk = machine.bulk_copies[i];
  machine.bulk_copies.erase(machine.bulk_copies.begin() + static_cast<std::ptrdiff_t>(i));
  if (machine.blocks[bulk.block].done == machine.threads) {
    fail("shared memory of a block that has exited");
  }
  std::memcpy(bulk.copy.to, bulk.copy.from != nullptr ? bulk.copy.from : bulk.value,
              bulk.copy.bytes);
  Phase phase = load_phase(bulk.barrier);
  phase.bytes -= bulk.copy.bytes;
  store_phase(bulk.barrier, phase);
}

// --- Scheduling ---

void release_barrier(unsigned block) {
  const std::source_location& first = machine.fiber(block, 0).where;
  for (unsigned t = 1; t < machine.threads; ++t) {
    const std::source_location& other = machine.fiber(block, t).where;
    if (other.line() != first.line() || std::strcmp(other.file_name(), first.file_name()) != 0) {
      fail("threads of a block met at different barriers");
    }
  }
  for (unsigned t = 0; t < machine.threads; ++t) {
    machine.fiber(block, t).state = State::kRunnable;
  }
  machine.blocks[block].waiting_at_barrier = 0;
}

bool can_run(Fiber& fiber) {
  if (fiber.state == State::kMbarrier && phase_ended(fiber.mbarrier, fiber.parity)) {
    fiber.state = State::kRunnable;
  }
  return fiber.state == State::kRunnable;
}

// Runs the runnable fibers of a warp, each to its next barrier or collective.
bool step_warp(unsigned block, unsigned warp) {
  bool progress = false;
  const unsigned first = warp * kWarpSize;
  const unsigned lanes = std::min(static_cast<unsigned>(kWarpSize), machine.threads - first);
  for (unsigned i = 0; i < lanes; ++i) {
    const unsigned lane = machine.order == Order::kBackward ? lanes - 1 - i : i;
    Fiber& fiber = machine.fiber(block, first + lane);
    if (!can_run(fiber)) continue;
    to_fiber(fiber);
    progress = true;
    if (std::exchange(machine.yielded, false)) break;
  }
  return progress;
}

// One step of every warp of the cluster.
bool step_cluster() {
  const unsigned warps = (machine.threads + kWarpSize - 1) / kWarpSize;
  const auto all = warps * static_cast<unsigned>(machine.blocks.size());
  bool progress = false;
  for (unsigned i = 0; i < all; ++i) {
    if (machine.order == Order::kShuffled) {
      const auto any = static_cast<unsigned>(machine.random() % all);
      progress |= step_warp(any / warps, any % warps);
      if (!machine.bulk_copies.empty() && machine.random() % 8 == 0) {
        finish_bulk_copy(machine.random() % machine.bulk_copies.size());
        progress = true;
      }
      continue;
    }
    const unsigned turn = machine.order == Order::kForward ? i : all - 1 - i;
    while (step_warp(turn / warps, turn % warps)) progress = true;
  }
  return progress;
}

bool release_barriers() {
  for (unsigned b = 0; b < machine.blocks.size(); ++b) {
    if (machine.blocks[b].waiting_at_barrier == machine.threads) {
      release_barrier(b);
      return true;
    }
  }
  const auto blocks = static_cast<unsigned>(machine.blocks.size());
  if (machine.waiting_at_cluster_barrier == blocks * machine.threads) {
    for (unsigned b = 0; b < blocks; ++b) {
      for (unsigned t = 0; t < machine.threads; ++t) {
        machine.fiber(b, t).state = State::kRunnable;
      }
    }
    machine.waiting_at_cluster_barrier = 0;
    return true;
  }
  return false;
}

void run_cluster() {
  const auto blocks = static_cast<unsigned>(machine.blocks.size());
  const auto any_fiber = [&](auto predicate) {
    for (unsigned b = 0; b < blocks; ++b) {
      for (unsigned t = 0; t < machine.threads; ++t) {
        if (predicate(machine.fiber(b, t))) return true;
      }
    }
    return false;
  };
  while (any_fiber([](Fiber& fiber) { return fiber.state != State::kDone; })) {
    if (step_cluster() || release_barriers()) continue;
    // The random order may have skipped the warps that can continue.
    if (any_fiber(can_run)) continue;
    if (!machine.bulk_copies.empty()) {
      finish_bulk_copy(machine.order == Order::kBackward ? machine.bulk_copies.size() - 1 : 0);
      continue;
    }
    fail("divergent barrier: no thread can go on");
  }
  if (!machine.bulk_copies.empty()) fail("a bulk copy that nobody waited for");
}

}  // namespace

unsigned char* dynamic_shared() { return machine.own_block().shared; }

void block_barrier(std::source_location where) {
  Fiber& fiber = *machine.running;
  fiber.state = State::kBarrier;
  fiber.where = where;
  ++machine.own_block().waiting_at_barrier;
  to_scheduler(false);
}

void mbarrier_init(void* barrier, unsigned arrivals) {
  if (arrivals == 0 || arrivals > kCountMask) fail("a barrier for too many arrivals");
  const std::uint64_t bits =
      arrivals | std::uint64_t{arrivals} << kCountBits | kNoBytes << kBytesShift;
  std::memcpy(barrier, &bits, sizeof bits);
}

void mbarrier_arrive(void* barrier, unsigned announced_bytes) {
  Phase phase = load_phase(barrier);
  if (phase.pending == 0) fail("more arrivals than a barrier was initialised for");
  --phase.pending;
  phase.bytes += announced_bytes;
  store_phase(barrier, phase);
  // Threads that waited for this may run before the rest of the warp.
  if (machine.order == Order::kShuffled) {
    machine.yielded = true;
    to_scheduler(false);
  }
}

void mbarrier_wait(void* barrier, unsigned parity, std::source_location where) {
  Fiber& fiber = *machine.running;
  if (phase_ended(barrier, parity)) return;
  fiber.state = State::kMbarrier;
  fiber.where = where;
  fiber.mbarrier = barrier;
  fiber.parity = parity;
  to_scheduler(false);
}

void bulk_copy(void* to, const void* from, std::size_t bytes, void* barrier) {
  const Block& block = machine.own_block();
  auto* const begin = static_cast<unsigned char*>(to);
  if (begin < block.shared || begin + bytes > block.shared + block.shared_bytes) {
    fail("a bulk copy to memory that is not the block's");
  }
  if (bytes == 0 || bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(to) % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    fail("a bulk copy of a size or alignment that CUDA does not have");
  }
  machine.bulk_copies.push_back({{to, from, bytes}, barrier, machine.running->block, {}});
  if (machine.order == Order::kForward) finish_bulk_copy(machine.bulk_copies.size() - 1);
}

unsigned cluster_rank() { return machine.running->block; }

void cluster_barrier(std::source_location where) {
  Fiber& fiber = *machine.running;
  fiber.state = State::kClusterBarrier;
  fiber.where = where;
  ++machine.waiting_at_cluster_barrier;
  to_scheduler(false);
}

void* map_shared(void* here, unsigned rank) {
  const Block& block = machine.own_block();
  const auto at = static_cast<std::size_t>(static_cast<unsigned char*>(here) - block.shared);
  if (rank >= machine.blocks.size() || at >= block.shared_bytes) {
    fail("an address that the cluster's shared memory does not have");
  }
  if (machine.blocks[rank].done == machine.threads) {
    fail("shared memory of a block that has exited");
  }
  return machine.blocks[rank].shared + at;
}

void warp_exchange(unsigned mask, std::uint64_t value, std::uint64_t* gathered,
                   std::source_location where) {
  Fiber& self = *machine.running;
  const unsigned lane = self.index.x % kWarpSize;
  const unsigned first = self.index.x - lane, block = self.block;
  self.where = where;
  self.mask = mask;
  self.value = value;
  self.state = State::kCollective;
  if ((mask >> lane & 1) == 0) fail("a lane is not in its own collective's mask");

  bool complete = true;
  for (unsigned l = 0; l < kWarpSize && complete; ++l) {
    if ((mask >> l & 1) == 0) continue;
    if (first + l >= machine.threads) fail("a collective's mask names lanes that do not exist");
    const Fiber& other = machine.fiber(block, first + l);
    if (other.state != State::kCollective) {
      complete = false;
    } else if (other.mask != mask || other.where.line() != where.line() ||
               std::strcmp(other.where.file_name(), where.file_name()) != 0) {
      fail("lanes of a warp met at different collectives");
    }
  }
  if (complete) {
    for (unsigned to = 0; to < kWarpSize; ++to) {
      if ((mask >> to & 1) == 0) continue;
      Fiber& other = machine.fiber(block, first + to);
      for (unsigned from = 0; from < kWarpSize; ++from) {
        if (mask >> from & 1) other.gathered[from] = machine.fiber(block, first + from).value;
      }
      other.state = State::kRunnable;
    }
  } else {
    to_scheduler(false);
  }
  std::memcpy(gathered, self.gathered, sizeof self.gathered);
}

void async_copy(void* to, const void* from, std::size_t bytes) {
  const auto misaligned = [&](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % bytes != 0;
  };
  if ((bytes != 4 && bytes != 8 && bytes != 16) || misaligned(to) || misaligned(from)) {
    fail("an asynchronous copy of a size or alignment that CUDA does not have");
  }
  if (machine.order == Order::kForward) {
    std::memcpy(to, from, bytes);
  } else {
    machine.running->copies.push_back({to, from, bytes});
  }
}

void async_commit() {
  Fiber& fiber = *machine.running;
  fiber.unfinished.push_back(std::exchange(fiber.copies, {}));
}

void async_wait(std::size_t unfinished) {
  std::deque<std::vector<Copy>>& groups = machine.running->unfinished;
  for (; groups.size() > unfinished; groups.pop_front()) {
    for (const Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
  }
}

void async_store(void* here, unsigned rank, const void* value, std::size_t bytes, void* barrier) {
  if (bytes != 16 || reinterpret_cast<std::uintptr_t>(here) % 16 != 0) {
    fail("an asynchronous store of a size or alignment that CUDA does not have");
  }
  BulkCopy store{{map_shared(here, rank), nullptr, bytes}, map_shared(barrier, rank), rank, {}};
  std::memcpy(store.value, value, bytes);
  machine.bulk_copies.push_back(store);
  if (machine.order == Order::kForward) finish_bulk_copy(machine.bulk_copies.size() - 1);
}

const Device& device(int index) {
  static const Device devices[kDevices] = {
      {90, 132, 232448, 233472, 50 << 20, 18}, {80, 1, 4096 + 2560, 8192, 1 << 20, 1},
      {86, 2, 101376, 16384, 6 << 20, 2},      {90, 8, 58368, 65536, 50 << 20, 8},
      {90, 1, 232448, 233472, 50 << 20, 1},    {90, 10, 232448, 233472, 50 << 20, 5}};
  return devices[index];
}
void set_device(int index) { machine.device = index; }
int current_device() { return machine.device; }
void set_order(Order order, std::uint32_t seed) {
  machine.order = order;
  machine.random.seed(seed);
}

Launches take_launches() {
  const Launches taken = machine.launches;
  machine.launches = {};
  return taken;
}
void count_memset() { ++machine.launches.memsets; }

int resident_blocks(unsigned block, std::size_t shared_bytes) {
  ++machine.launches.queries;
  const auto shared = static_cast<std::size_t>(device(machine.device).shared_per_multiprocessor);
  return std::min(static_cast<int>(2048 / block), static_cast<int>(shared / (shared_bytes + 1024)));
}
int resident_clusters(unsigned block, unsigned cluster, std::size_t shared_bytes) {
  const Device& here = device(machine.device);
  const int each = resident_blocks(block, shared_bytes);
  int clusters = 0;
  for (int left = here.multiprocessors; left > 0; left -= here.group) {
    clusters += std::min(left, here.group) * each / static_cast<int>(cluster);
  }
  return clusters;
}

bool allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > device(machine.device).shared_per_block) return false;
  machine.allowed_shared[{machine.device, kernel}] = bytes;
  return true;
}

bool launch(const void* kernel, unsigned grid, unsigned block, unsigned cluster,
            std::size_t shared_bytes, const std::function<void()>& body) {
  if (grid == 0 || block == 0 || block > kMaxBlock) return false;
  if (cluster == 0 || cluster > kMaxCluster || grid % cluster != 0) return false;
  if (cluster > 1 && device(machine.device).compute_capability < 90) return false;
  const auto allowed = machine.allowed_shared.find({machine.device, kernel});
  const int most = allowed == machine.allowed_shared.end() ? kSharedWithoutAsking : allowed->second;
  if (shared_bytes > static_cast<std::size_t>(most)) return false;
  ++machine.launches.kernels;
  machine.launches.largest_grid = std::max(machine.launches.largest_grid, grid);
  gridDim = {grid, 1, 1};
  blockDim = {block, 1, 1};
  machine.body = &body;
  machine.threads = block;
  machine.stride = (block + kWarpSize - 1) / kWarpSize * kWarpSize;
  std::vector<unsigned> clusters(grid / cluster);
  std::iota(clusters.begin(), clusters.end(), 0u);
  if (machine.order == Order::kBackward) std::reverse(clusters.begin(), clusters.end());
  if (machine.order == Order::kShuffled) {
    std::shuffle(clusters.begin(), clusters.end(), machine.random);
  }
  for (const unsigned c : clusters) {
    machine.blocks.assign(cluster, Block{});
    for (unsigned b = 0; b < cluster; ++b) {
      // Exactly as long as requested, so that AddressSanitizer detects an access past the end; and
      // filled with NaNs, so that reads of unwritten memory change results.
      void* shared = nullptr;
      if (posix_memalign(&shared, 16, shared_bytes == 0 ? 1 : shared_bytes) != 0) std::abort();
      std::memset(shared, 0xff, shared_bytes);
      machine.blocks[b] = {c * cluster + b, static_cast<unsigned char*>(shared), shared_bytes, 0,
                           0};
    }
    prepare();
    run_cluster();
    for (const Block& done : machine.blocks) std::free(done.shared);
    machine.blocks.clear();
  }
  return true;
}

}  // namespace simt
