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

enum class State { kRunnable, kBarrier, kCollective, kDone };

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes;
};

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  Index index{};
  State state = State::kDone;
  std::source_location where;
  unsigned mask = 0;
  std::uint64_t value = 0;
  std::uint64_t gathered[kWarpSize] = {};
  std::vector<Copy> copies;                  // of the open group
  std::deque<std::vector<Copy>> unfinished;  // groups
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
  Fiber* running = nullptr;
  unsigned threads = 0;
  unsigned waiting_at_barrier = 0;
  unsigned done = 0;
  unsigned char* shared = nullptr;
  const std::function<void()>* body = nullptr;
  Order order = Order::kForward;
  std::mt19937 random;
  int device = 0;
  Launches launches{};
  std::map<std::pair<int, const void*>, int> allowed_shared;  // by device and kernel
};

Machine machine;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "simt: %s in block %u\n", what, blockIdx.x);
  // One line per place that threads stand at.
  std::map<std::string, std::pair<unsigned, unsigned>> places;
  for (unsigned t = 0; t < machine.threads; ++t) {
    const Fiber& fiber = *machine.fibers[t];
    std::string place = "has exited";
    if (fiber.state == State::kBarrier || fiber.state == State::kCollective) {
      place = fiber.state == State::kBarrier ? "waits at the block barrier at "
                                             : "waits at the warp collective at ";
      place += std::string(fiber.where.file_name()) + ":" + std::to_string(fiber.where.line());
    } else if (fiber.state == State::kRunnable) {
      place = "runs";
    }
    auto [entry, added] = places.try_emplace(place, t, 0u);
    ++entry->second.second;
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
  ++machine.done;
  to_scheduler(true);
}

void prepare(unsigned threads) {
  while (machine.fibers.size() < threads) {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber->stack == MAP_FAILED) {
      std::fprintf(stderr, "simt: no memory for %u fibers\n", threads);
      std::abort();
    }
    machine.fibers.push_back(std::move(fiber));
  }
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = *machine.fibers[t];
#if defined(__SANITIZE_ADDRESS__)
    // The last owner of this stack never returned from its frames.
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);
#endif
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    fiber.index = {t, 0, 0};
    fiber.state = State::kRunnable;
    fiber.copies.clear();
    fiber.unfinished.clear();
  }
  machine.threads = threads;
  machine.waiting_at_barrier = 0;
  machine.done = 0;
}

void release_barrier() {
  const std::source_location& first = machine.fibers[0]->where;
  for (unsigned t = 1; t < machine.threads; ++t) {
    const std::source_location& other = machine.fibers[t]->where;
    if (other.line() != first.line() || std::strcmp(other.file_name(), first.file_name()) != 0) {
      fail("threads of a block met at different barriers");
    }
  }
  for (unsigned t = 0; t < machine.threads; ++t) machine.fibers[t]->state = State::kRunnable;
  machine.waiting_at_barrier = 0;
}

// Runs the warp's fibers that can run, each to its next barrier or collective.
bool step_warp(unsigned warp) {
  bool progress = false;
  const unsigned first = warp * kWarpSize;
  const unsigned lanes = std::min(static_cast<unsigned>(kWarpSize), machine.threads - first);
  for (unsigned i = 0; i < lanes; ++i) {
    const unsigned lane = machine.order == Order::kBackward ? lanes - 1 - i : i;
    Fiber& fiber = *machine.fibers[first + lane];
    if (fiber.state != State::kRunnable) continue;
    to_fiber(fiber);
    progress = true;
  }
  return progress;
}

// One turn of every warp.
bool step_block() {
  const unsigned warps = (machine.threads + kWarpSize - 1) / kWarpSize;
  bool progress = false;
  for (unsigned i = 0; i < warps; ++i) {
    if (machine.order == Order::kShuffled) {
      progress |= step_warp(static_cast<unsigned>(machine.random() % warps));
      continue;
    }
    const unsigned warp = machine.order == Order::kForward ? i : warps - 1 - i;
    while (step_warp(warp)) progress = true;
  }
  return progress;
}

void run_block() {
  while (machine.done < machine.threads) {
    if (step_block()) continue;
    if (machine.waiting_at_barrier == machine.threads) {
      release_barrier();
      continue;
    }
    // Chance may have passed over the warps that can go on.
    const bool stuck = std::none_of(
        machine.fibers.begin(), machine.fibers.begin() + machine.threads,
        [](const std::unique_ptr<Fiber>& fiber) { return fiber->state == State::kRunnable; });
    if (stuck) fail("divergent barrier: no thread can go on");
  }
}

}  // namespace

unsigned char* dynamic_shared() { return machine.shared; }

void block_barrier(std::source_location where) {
  Fiber& fiber = *machine.running;
  fiber.state = State::kBarrier;
  fiber.where = where;
  ++machine.waiting_at_barrier;
  to_scheduler(false);
}

void warp_exchange(unsigned mask, std::uint64_t value, std::uint64_t* gathered,
                   std::source_location where) {
  Fiber& self = *machine.running;
  const unsigned lane = self.index.x % kWarpSize;
  const unsigned first = self.index.x - lane;
  self.where = where;
  self.mask = mask;
  self.value = value;
  self.state = State::kCollective;
  if ((mask >> lane & 1) == 0) fail("a lane is not in its own collective's mask");

  bool complete = true;
  for (unsigned l = 0; l < kWarpSize && complete; ++l) {
    if ((mask >> l & 1) == 0) continue;
    if (first + l >= machine.threads) fail("a collective's mask names lanes that do not exist");
    const Fiber& other = *machine.fibers[first + l];
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
      Fiber& other = *machine.fibers[first + to];
      for (unsigned from = 0; from < kWarpSize; ++from) {
        if (mask >> from & 1) other.gathered[from] = machine.fibers[first + from]->value;
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

const Device& device(int index) {
  static const Device devices[kDevices] = {
      {132, 232448, 233472}, {1, 4096 + 2560, 8192}, {2, 101376, 16384}};
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

bool allow_shared(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > device(machine.device).shared_per_block) return false;
  machine.allowed_shared[{machine.device, kernel}] = bytes;
  return true;
}

bool launch(const void* kernel, unsigned grid, unsigned block, std::size_t shared_bytes,
            const std::function<void()>& body) {
  if (grid == 0 || block == 0 || block > kMaxBlock) return false;
  const auto allowed = machine.allowed_shared.find({machine.device, kernel});
  const int most = allowed == machine.allowed_shared.end() ? kSharedWithoutAsking : allowed->second;
  if (shared_bytes > static_cast<std::size_t>(most)) return false;
  ++machine.launches.kernels;
  gridDim = {grid, 1, 1};
  blockDim = {block, 1, 1};
  machine.body = &body;
  std::vector<unsigned> blocks(grid);
  std::iota(blocks.begin(), blocks.end(), 0u);
  if (machine.order == Order::kBackward) std::reverse(blocks.begin(), blocks.end());
  if (machine.order == Order::kShuffled) {
    std::shuffle(blocks.begin(), blocks.end(), machine.random);
  }
  for (const unsigned b : blocks) {
    blockIdx = {b, 0, 0};
    // Exactly as long as asked for, so that AddressSanitizer sees the first byte past the end; full
    // of NaNs, so that reading what nobody wrote shows.
    void* shared = nullptr;
    if (posix_memalign(&shared, 16, shared_bytes == 0 ? 1 : shared_bytes) != 0) std::abort();
    std::memset(shared, 0xff, shared_bytes);
    machine.shared = static_cast<unsigned char*>(shared);
    prepare(block);
    run_block();
    machine.shared = nullptr;
    std::free(shared);
  }
  return true;
}

}  // namespace simt
