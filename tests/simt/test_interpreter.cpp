// Tests the interpreter: one kernel that must run, and kernels with one fault each that it must
// detect.
//   simt_interpreter FAULT
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

int* dynamic_ints() { return reinterpret_cast<int*>(simt::dynamic_shared()); }

// out = the block's input reversed, plus the results of three warp collectives of the lane numbers:
// 496 + 16 + 3.
__global__ void reverse(const int* in, int* out) {
  int* const kept = dynamic_ints();
  kept[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  int sum = lane;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  const unsigned even = __ballot_sync(kAll, lane % 2 == 0);
  __syncwarp();
  const int third = __shfl_sync(kAll, lane, 3);
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      kept[blockDim.x - 1 - threadIdx.x] + sum + __builtin_popcount(even & 0x55555555u) + third;
}

// Collectives of groups smaller than a warp, and votes. Every line adds 1 if the result is right.
__global__ void collectives(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int third_of_four = lane / 4 * 4 + 2;
  int right = 0;
  right += __shfl_down_sync(kAll, lane, 3) == (lane + 3 < 32 ? lane + 3 : lane);
  right += __shfl_down_sync(kAll, lane, 2, 8) == (lane % 8 + 2 < 8 ? lane + 2 : lane);
  right += __shfl_xor_sync(kAll, 0.5 * lane, 5, 8) == 0.5 * (lane ^ 5);
  right += __shfl_xor_sync(kAll, lane, 16, 16) == (lane < 16 ? lane : lane ^ 16);
  right += __shfl_sync(kAll, static_cast<float>(lane), 2, 4) == static_cast<float>(third_of_four);
  right += __shfl_sync(kAll, 1ull << lane, 31) == 1ull << 31;
  right += __ballot_sync(kAll, lane > 29) == 0xc0000000u;
  right += __any_sync(kAll, lane == 7) == 1 && __any_sync(kAll, 0) == 0;
  right += __all_sync(kAll, lane < 32) == 1 && __all_sync(kAll, lane < 31) == 0;
  right += __reduce_add_sync(kAll, static_cast<unsigned>(lane)) == 496;
  // The halves of a warp diverge, as on hardware.
  if (lane < 16) {
    right += __shfl_xor_sync(0x0000ffffu, lane, 1) == (lane ^ 1);
  } else {
    right += __shfl_xor_sync(0xffff0000u, lane, 2) == (lane ^ 2);
  }
  out[threadIdx.x] = right;
}

__global__ void half_of_the_block_exits(int*) {
  if (threadIdx.x < blockDim.x / 2) return;
  __syncthreads();
}

__global__ void two_barriers(int*) {
  // NOLINTNEXTLINE(bugprone-branch-clone): the fault is that threads meet at two barriers
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// Without a data race, because the lanes that skip the barrier access nothing, but divergent.
__global__ void barrier_in_a_branch(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x < 48) {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}

__global__ void two_shuffles(int* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 2, 1);
  }
}

__global__ void lane_left_the_shuffle(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}

__global__ void lane_outside_its_mask(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 1);
}

// Each thread reads what its neighbour in the next warp wrote, without a barrier between.
__global__ void missing_barrier(int* out) {
  dynamic_ints()[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = dynamic_ints()[(threadIdx.x + 32) % blockDim.x];
}

// One barrier per round is too few: the writes of the next round may overtake the reads of this
// one.
__global__ void overtaken(int* out) {
  int sum = 0;
  for (int round = 0; round < 3; ++round) {
    dynamic_ints()[threadIdx.x] = round * 1000 + static_cast<int>(threadIdx.x);
    __syncthreads();
    sum += dynamic_ints()[(threadIdx.x + 32) % blockDim.x];
  }
  out[threadIdx.x] = sum;
}

__global__ void static_overflow(int* out) {
  __shared__ int kept[64];
  kept[threadIdx.x + 1] = 1;
  out[threadIdx.x] = kept[threadIdx.x];
}

__global__ void misaligned(int* out) {
  struct alignas(16) Vector {
    int element[4];
  };
  *reinterpret_cast<Vector*>(out + 1) = Vector{{1, 2, 3, 4}};
}

__global__ void shared_overflow(int*) { dynamic_ints()[threadIdx.x + 1] = 1; }

__global__ void async_copy_read_early(int* out) {
  if (threadIdx.x != 0) return;
  alignas(16) static int source[4] = {1, 2, 3, 4};
  simt::async_copy(dynamic_ints(), source, 16);
  simt::async_commit();
  out[0] = dynamic_ints()[0];
  simt::async_wait(0);
}

__global__ void async_waits_for_too_few(int* out) {
  if (threadIdx.x != 0) return;
  alignas(16) static int source[4] = {1, 2, 3, 4};
  for (std::size_t group = 0; group < 2; ++group) {
    simt::async_copy(dynamic_ints() + 4 * group, source, 16);
    simt::async_commit();
  }
  simt::async_wait(1);
  out[0] = dynamic_ints()[0] == 1 ? dynamic_ints()[4] : 2;
}

__global__ void async_not_committed(int* out) {
  if (threadIdx.x != 0) return;
  alignas(16) static int source[4] = {1, 2, 3, 4};
  simt::async_copy(dynamic_ints(), source, 16);
  simt::async_wait(0);
  out[0] = dynamic_ints()[0];
}

// --- Barriers in shared memory, bulk copies, clusters ---

struct ClusterMemory {
  alignas(16) int copied[32];
  int sent[8];
  std::uint64_t full, all_sent;
};
ClusterMemory& cluster_memory() {
  return *reinterpret_cast<ClusterMemory*>(simt::dynamic_shared());
}
void wait_for(std::uint64_t& barrier, unsigned parity, Where where = Where::current()) {
  simt::mbarrier_wait(&barrier, parity, where);
}

// Two rounds: one thread issues two bulk copies of 128 bytes in all, and every thread waits for
// them. Then block r of the cluster sends round + copied[r] to every block. out[block * 64 +
// thread] counts the right values.
__global__ void cluster_rounds(const int* in, int blocks, int* out) {
  ClusterMemory& memory = cluster_memory();
  const unsigned rank = simt::cluster_rank();
  if (threadIdx.x == 0) {
    simt::mbarrier_init(&memory.full, 1);
    simt::mbarrier_init(&memory.all_sent, static_cast<unsigned>(blocks));
  }
  simt::cluster_barrier(Where::current());
  int right = 0;
  for (unsigned round = 0; round < 2; ++round) {
    if (threadIdx.x == 0) {
      const int* const from = in + std::size_t{32} * round;
      simt::mbarrier_arrive(&memory.full, 128);
      simt::bulk_copy(memory.copied, from, 64, &memory.full);
      simt::bulk_copy(memory.copied + 16, from + 16, 64, &memory.full);
    }
    wait_for(memory.full, round);
    const int sent_value = memory.copied[rank];
    right += memory.copied[threadIdx.x % 32] == in[32 * round + threadIdx.x % 32];
    if (threadIdx.x < static_cast<unsigned>(blocks)) {
      auto& there = *static_cast<ClusterMemory*>(simt::map_shared(&memory, threadIdx.x));
      there.sent[rank] = static_cast<int>(round) + sent_value;
      simt::mbarrier_arrive(&there.all_sent, 0);
    }
    wait_for(memory.all_sent, round);
    for (int from = 0; from < blocks; ++from) {
      right +=
          memory.sent[from] == static_cast<int>(round) + in[32 * static_cast<int>(round) + from];
    }
    simt::cluster_barrier(Where::current());
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = right;
}

// Every block sends a packet of 16 bytes to every block. Barriers count the bytes; the rounds need
// no other barrier, because the two sets of packets are used alternately.
struct Packets {
  alignas(16) int of_block[2][8][4];
  std::uint64_t arrived[2];
};
Packets& packets() { return *reinterpret_cast<Packets*>(simt::dynamic_shared()); }
void send(unsigned to, unsigned set, int value, int rank) {
  const int packet[4] = {value, value + 1, value + 2, value + 3};
  simt::async_store(packets().of_block[set][rank], to, packet, 16, &packets().arrived[set]);
}

__global__ void async_rounds(int blocks, int* out) {
  const int rank = static_cast<int>(simt::cluster_rank());
  if (threadIdx.x == 0) {
    for (std::uint64_t& barrier : packets().arrived) simt::mbarrier_init(&barrier, 1);
  }
  simt::cluster_barrier(Where::current());
  int right = 0;
  for (unsigned round = 0; round < 5; ++round) {
    const unsigned set = round % 2;
    if (threadIdx.x == 0) {
      simt::mbarrier_arrive(&packets().arrived[set], static_cast<unsigned>(16 * blocks));
      for (int to = 0; to < blocks; ++to) {
        send(static_cast<unsigned>(to), set, static_cast<int>(round) * 100 + rank * 10, rank);
      }
    }
    wait_for(packets().arrived[set], round / 2 % 2);
    for (int from = 0; from < blocks; ++from) {
      for (int i = 0; i < 4; ++i) {
        right += packets().of_block[set][from][i] == static_cast<int>(round) * 100 + from * 10 + i;
      }
    }
    // All threads of the block have read before thread 0 sends again.
    __syncthreads();
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = right;
}

// Block 0 sends two packets to block 1, the first to the set `set_of_first`. Block 1 announces
// `announced` bytes of set 0, and reads it before or after it waits for them.
void two_packets(int* out, unsigned set_of_first, unsigned announced, bool reads_early) {
  if (threadIdx.x == 0) {
    for (std::uint64_t& barrier : packets().arrived) simt::mbarrier_init(&barrier, 1);
  }
  simt::cluster_barrier(Where::current());
  if (threadIdx.x != 0) return;
  if (simt::cluster_rank() == 0) {
    send(1, set_of_first, 5, 0);
    send(1, 0, 7, 1);
    return;
  }
  simt::mbarrier_arrive(&packets().arrived[0], announced);
  if (!reads_early) wait_for(packets().arrived[0], 0);
  out[0] = packets().of_block[0][1][0];
  if (reads_early) wait_for(packets().arrived[0], 0);
}
__global__ void async_store_read_early(int* out) { two_packets(out, 0, 32, true); }
__global__ void async_store_announces_too_little(int* out) { two_packets(out, 0, 16, false); }
__global__ void async_store_nobody_waits_for(int* out) { two_packets(out, 1, 16, false); }

// Both packets count on one barrier, although the receiver has not announced the second one's
// phase.
__global__ void async_store_of_a_later_phase(int*) {
  if (threadIdx.x == 0) simt::mbarrier_init(&packets().arrived[0], 1);
  simt::cluster_barrier(Where::current());
  if (threadIdx.x != 0) return;
  for (unsigned round = 0; round < 2; ++round) {
    if (simt::cluster_rank() == 0) {
      send(1, 0, static_cast<int>(round), 0);
    } else {
      simt::mbarrier_arrive(&packets().arrived[0], 16);
      wait_for(packets().arrived[0], round);
    }
  }
}

__global__ void arrives_before_it_is_initialised(int*) {
  ClusterMemory& memory = cluster_memory();
  if (threadIdx.x == 0) {
    simt::mbarrier_init(&memory.full, 2);
    auto& there = *static_cast<ClusterMemory*>(simt::map_shared(&memory, 1 - simt::cluster_rank()));
    simt::mbarrier_arrive(&there.full, 0);
  }
}

__global__ void sends_to_a_block_that_left(int*) {
  if (simt::cluster_rank() == 0) return;
  static_cast<ClusterMemory*>(simt::map_shared(&cluster_memory(), 0))->sent[0] = 1;
}

alignas(16) int bulk_source[8] = {1, 2, 3, 4, 5, 6, 7, 8};

__global__ void bulk_copy_read_early(int* out) {
  if (threadIdx.x != 0) return;
  ClusterMemory& memory = cluster_memory();
  simt::mbarrier_init(&memory.full, 1);
  simt::mbarrier_arrive(&memory.full, 16);
  simt::bulk_copy(memory.copied, bulk_source, 16, &memory.full);
  out[0] = memory.copied[0];
  wait_for(memory.full, 0);
}

__global__ void bulk_copy_announces_too_little(int* out) {
  if (threadIdx.x != 0) return;
  ClusterMemory& memory = cluster_memory();
  simt::mbarrier_init(&memory.full, 1);
  simt::mbarrier_arrive(&memory.full, 16);
  simt::bulk_copy(memory.copied + 4, bulk_source + 4, 16, &memory.full);
  simt::bulk_copy(memory.copied, bulk_source, 16, &memory.full);
  wait_for(memory.full, 0);
  out[0] = memory.copied[0] == 1 ? memory.copied[4] : memory.copied[0];
}

__global__ void bulk_copy_nobody_waits_for(int*) {
  if (threadIdx.x != 0) return;
  ClusterMemory& memory = cluster_memory();
  simt::mbarrier_init(&memory.full, 1);
  simt::mbarrier_arrive(&memory.full, 16);
  simt::bulk_copy(memory.copied, bulk_source, 16, &memory.full);
}

__global__ void bulk_copy_misaligned(int*) {
  if (threadIdx.x != 0) return;
  ClusterMemory& memory = cluster_memory();
  simt::mbarrier_init(&memory.full, 1);
  simt::bulk_copy(memory.copied, bulk_source + 1, 16, &memory.full);
}

__global__ void waits_for_the_wrong_phase(int*) {
  ClusterMemory& memory = cluster_memory();
  if (threadIdx.x == 0) simt::mbarrier_init(&memory.full, 64);
  __syncthreads();
  simt::mbarrier_arrive(&memory.full, 0);
  wait_for(memory.full, 1);
  wait_for(memory.full, 0);
  wait_for(memory.full, 1);
}

__global__ void half_of_the_cluster_meets(int*) {
  if (simt::cluster_rank() == 0) simt::cluster_barrier(Where::current());
}

using Kernel = void (*)(int*);

int run_clusters() {
  alignas(16) static int in[64];
  for (int i = 0; i < 64; ++i) in[i] = 3 * i + 1;
  for (const unsigned cluster : {1u, 2u, 8u}) {
    std::vector<int> out(16 * 64, 0);
    int* const data = out.data();
    if (!simt::launch(reinterpret_cast<const void*>(cluster_rounds), 16, 64, cluster,
                      sizeof(ClusterMemory),
                      [=] { cluster_rounds(in, static_cast<int>(cluster), data); })) {
      return 17;
    }
    for (const int right : out) {
      if (right != 2 + 2 * static_cast<int>(cluster)) return 18;
    }
  }
  for (const unsigned cluster : {1u, 2u, 8u}) {
    std::vector<int> out(16 * 64, 0);
    int* const data = out.data();
    if (!simt::launch(reinterpret_cast<const void*>(async_rounds), 16, 64, cluster, sizeof(Packets),
                      [=] { async_rounds(static_cast<int>(cluster), data); })) {
      return 22;
    }
    for (const int right : out) {
      if (right != 5 * 4 * static_cast<int>(cluster)) return 23;
    }
  }
  // Configurations that CUDA refuses: a grid that is no multiple of the cluster; a cluster above 8.
  const auto nothing = [] {};
  const auto* const kernel = reinterpret_cast<const void*>(cluster_rounds);
  if (simt::launch(kernel, 3, 64, 2, 0, nothing)) return 19;
  if (simt::launch(kernel, 16, 64, 16, 0, nothing)) return 20;
  simt::set_device(2);
  const bool refused = !simt::launch(kernel, 2, 64, 2, 0, nothing);
  simt::set_device(0);
  return refused ? 0 : 21;
}

int run_reverse() {
  std::vector<int> in(3 * 96), out(in.size(), -1);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * i);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(3);
  config.blockDim = dim3(96);
  config.dynamicSmemBytes = 96 * sizeof(int);
  if (cudaLaunchKernelEx(&config, reverse, static_cast<const int*>(in.data()), out.data()) !=
      cudaSuccess) {
    return 2;
  }
  for (std::size_t b = 0; b < 3; ++b) {
    for (std::size_t t = 0; t < 96; ++t) {
      if (out[b * 96 + t] != in[b * 96 + 95 - t] + 496 + 16 + 3) return 3;
    }
  }
  // Configurations that CUDA refuses: no block, too many threads, more shared memory than allowed.
  config.gridDim = dim3(0);
  if (cudaLaunchKernelEx(&config, reverse, static_cast<const int*>(in.data()), out.data()) ==
      cudaSuccess) {
    return 4;
  }
  config.gridDim = dim3(1);
  config.blockDim = dim3(1025);
  if (cudaLaunchKernelEx(&config, reverse, static_cast<const int*>(in.data()), out.data()) ==
      cudaSuccess) {
    return 5;
  }
  config.blockDim = dim3(96);
  config.dynamicSmemBytes = 64 * 1024;
  if (cudaLaunchKernelEx(&config, reverse, static_cast<const int*>(in.data()), out.data()) ==
      cudaSuccess) {
    return 6;
  }
  return 0;
}

int run_collectives() {
  std::vector<int> out(64, 0);
  int* const data = out.data();
  simt::launch(reinterpret_cast<const void*>(collectives), 1, 64, 1, 0, [=] { collectives(data); });
  for (const int right : out) {
    if (right != 11) return 8;
  }
  return 0;
}

// float16 against the compiler's, bfloat16 against the nearer of its two neighbours.
int run_conversions() {
  for (unsigned bits = 0; bits < 0x10000; ++bits) {
    const __half half{static_cast<std::uint16_t>(bits)};
    const float value = __half2float(half);
    const float other = static_cast<float>(simt::from_bits<_Float16>(bits));
    if (std::isnan(other) ? !std::isnan(value) : simt::to_bits(value) != simt::to_bits(other)) {
      return 9;
    }
    if (!std::isnan(value) && __float2half_rn(value).bits != bits) return 10;
    const __nv_bfloat16 brain{static_cast<std::uint16_t>(bits)};
    if (!std::isnan(__bfloat162float(brain)) &&
        __float2bfloat16_rn(__bfloat162float(brain)).bits != bits) {
      return 11;
    }
  }
  std::mt19937 random(1);
  for (int i = 0; i < 300000; ++i) {
    std::uint32_t bits = static_cast<std::uint32_t>(random());
    // Every second one is near float16's range, every fourth halfway between two of its numbers.
    if (i % 2 == 0) bits = (bits & 0x807fffffu) | (100u + bits % 45u) << 23;
    if (i % 4 == 0) bits = (bits & ~0x1fffu) | 0x1000u;
    if (i % 8 == 1) bits = (bits & ~0xffffu) | 0x8000u;
    const float value = simt::from_bits<float>(bits);
    if (std::isnan(value)) {
      if (!std::isnan(__half2float(__float2half_rn(value)))) return 12;
      if (!std::isnan(__bfloat162float(__float2bfloat16_rn(value)))) return 13;
      continue;
    }
    const auto expected = simt::to_bits(static_cast<_Float16>(value));
    if (__float2half_rn(value).bits != expected) return 14;
    // The neighbours towards and away from zero.
    const std::uint32_t down = bits >> 16, up = down + 1;
    const double low = simt::from_bits<float>(down << 16);
    // Beyond the largest number, the neighbour is what its exponent would mean.
    const double high = (up & 0x7fff) == 0x7f80 ? std::copysign(0x1p128, low)
                                                : double{simt::from_bits<float>(up << 16)};
    const double to_low = std::fabs(double{value} - low), to_high = std::fabs(high - double{value});
    const std::uint32_t nearest = std::isinf(value) || to_low < to_high ? down
                                  : to_high < to_low                    ? up
                                  : down % 2 == 0                       ? down
                                                                        : up;
    if (__float2bfloat16_rn(value).bits != nearest) return 15;
  }
  return 0;
}

// Whether the result of a kernel depends on the order of its threads.
bool is_a_race(Kernel kernel) {
  std::vector<std::vector<int>> results;
  for (const auto order : {simt::Order::kForward, simt::Order::kBackward, simt::Order::kShuffled}) {
    simt::set_order(order, 1);
    std::vector<int> out(64, 0);
    int* const data = out.data();
    simt::launch(reinterpret_cast<const void*>(kernel), 1, 64, 1, 64 * sizeof(int),
                 [=] { kernel(data); });
    results.push_back(out);
  }
  return results[0] != results[1] || results[0] != results[2];
}

}  // namespace

int main(int argc, char** argv) {
  const std::string fault = argc == 2 ? argv[1] : "none";
  if (fault == "none") {
    for (const auto order :
         {simt::Order::kForward, simt::Order::kBackward, simt::Order::kShuffled}) {
      simt::set_order(order, 1);
      for (const auto run : {run_reverse, run_collectives, run_clusters}) {
        if (const int error = run(); error != 0) return error;
      }
    }
    return run_conversions();
  }
  const struct {
    const char* name;
    Kernel kernel;
  } kFaults[] = {{"exit", half_of_the_block_exits},
                 {"two_barriers", two_barriers},
                 {"branch", barrier_in_a_branch},
                 {"two_shuffles", two_shuffles},
                 {"lane_left", lane_left_the_shuffle},
                 {"shared_overflow", shared_overflow},
                 {"static_overflow", static_overflow},
                 {"misaligned", misaligned},
                 {"mask", lane_outside_its_mask},
                 {"missing_barrier", missing_barrier},
                 {"overtaken", overtaken},
                 {"async_early", async_copy_read_early},
                 {"async_too_few", async_waits_for_too_few},
                 {"async_open", async_not_committed},
                 {"cluster_early", arrives_before_it_is_initialised},
                 {"cluster_late", sends_to_a_block_that_left},
                 {"cluster_half", half_of_the_cluster_meets},
                 {"cluster_async_early", async_store_read_early},
                 {"cluster_async_short", async_store_announces_too_little},
                 {"cluster_async_left", async_store_nobody_waits_for},
                 {"cluster_async_ahead", async_store_of_a_later_phase},
                 {"async_bulk_early", bulk_copy_read_early},
                 {"async_bulk_short", bulk_copy_announces_too_little},
                 {"async_bulk_left", bulk_copy_nobody_waits_for},
                 {"async_bulk_misaligned", bulk_copy_misaligned},
                 {"phase", waits_for_the_wrong_phase}};
  for (const auto& [name, kernel] : kFaults) {
    if (fault != name) continue;
    if (fault == "missing_barrier" || fault == "overtaken") {
      if (!is_a_race(kernel)) return 0;
      std::fprintf(stderr, "the result depends on who goes first\n");
      return 16;
    }
    // The second order delays asynchronous copies until the thread waits for them.
    const bool delays = fault.find("async") != std::string::npos;
    if (delays) simt::set_order(simt::Order::kBackward);
    // This fault shows with the first order, in which the store happens immediately.
    if (fault == "cluster_async_ahead") simt::set_order(simt::Order::kForward);
    const unsigned cluster = fault.starts_with("cluster") ? 2 : 1;
    const bool has_barriers = cluster == 2 || fault.starts_with("async_bulk") || fault == "phase";
    const std::size_t bytes =
        has_barriers ? std::max(sizeof(ClusterMemory), sizeof(Packets)) : 64 * sizeof(int);
    std::vector<int> out(64, 0);
    int* const data = out.data();
    simt::launch(reinterpret_cast<const void*>(kernel), cluster, 64, cluster, bytes,
                 [=, k = kernel] { k(data); });
    if (delays && out[0] == -1) {
      std::fprintf(stderr, "read %d before the copy was waited for\n", out[0]);
      return 7;
    }
    return 0;
  }
  std::fprintf(stderr, "no fault named %s\n", fault.c_str());
  return 1;
}
