// A CUDA grid on one CPU thread: every CUDA thread is a fiber, clusters of blocks (of one block
// where the launch names none) run one after another, and a barrier or a warp collective that some
// thread can never reach ends the program with a message instead of hanging or passing by luck.
// include/ holds the headers that stand in for CUDA's when a .cu file is compiled by g++ -x c++
// -DLRDS_SIMT.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

namespace simt {

constexpr int kWarpSize = 32;

struct Index {
  unsigned x, y, z;
};

// --- Of the running CUDA thread ---
extern Index threadIdx, blockIdx, blockDim, gridDim;
unsigned char* dynamic_shared();

void block_barrier(std::source_location where);

// Every lane of `mask` gives 8 bytes and gets everybody's: gathered[lane]. Lanes must meet at one
// source line.
void warp_exchange(unsigned mask, std::uint64_t value, std::uint64_t* gathered,
                   std::source_location where);

// cp.async: the copy happens at once with Order::kForward, when it is waited for with the others;
// CUDA allows both.
void async_copy(void* to, const void* from, std::size_t bytes);
void async_commit();                      // closes the group of the copies since the last
void async_wait(std::size_t unfinished);  // for all groups but the last so many; not for open ones

// Barriers in shared memory, of 8 bytes (mbarrier). A phase ends when all arrivals have come and
// all announced bytes have been copied; a thread waits for the end of the phase of a parity.
void mbarrier_init(void* barrier, unsigned arrivals);
void mbarrier_arrive(void* barrier, unsigned announced_bytes);
void mbarrier_wait(void* barrier, unsigned parity, std::source_location where);

// cp.async.bulk: one copy at once with Order::kForward, at any time with Order::kShuffled, when
// nobody else can go on with Order::kBackward.
void bulk_copy(void* to, const void* from, std::size_t bytes, void* barrier);

// st.async: stores 16 bytes where block `rank` of the cluster has what `here` is in this one, and
// counts them on that block's `barrier`; each when bulk_copy copies.
void async_store(void* here, unsigned rank, const void* value, std::size_t bytes, void* barrier);

// Clusters. map_shared: where block `rank` of the cluster has what `here` is in this one.
unsigned cluster_rank();
void cluster_barrier(std::source_location where);
void* map_shared(void* here, unsigned rank);

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// --- Of the machine ---
struct Device {
  int compute_capability;  // 10 * major + minor
  int multiprocessors;
  int shared_per_block;
  int shared_per_multiprocessor;
  int l2_bytes;
  int group;  // multiprocessors that a cluster may spread over (GPC); the last group may be smaller
};
// Device 0 is an H200, which gives every row here a block of its own. 1 has one multiprocessor and
// 4 KiB of shared memory: rows stream, all through one block. 2 has two multiprocessors with room
// for one block each. 3 and 4 have clusters: 3 has 8 multiprocessors and little shared memory, so
// that rows are shared by several blocks; 4 is one multiprocessor of an H200. 5 is a small H200
// whose groups of multiprocessors no cluster of 4 fills: 10 multiprocessors hold 2 clusters of 4
// and none of 8.
const Device& device(int index);
constexpr int kDevices = 6;
void set_device(int index);
int current_device();

// The order in which blocks and threads run. Results must not depend on it.
//   kForward   blocks and threads in order; a warp runs ahead of the others as far as barriers let it
//   kBackward  the same in reverse order
//   kShuffled  blocks in a random order; at each step a random warp runs to its next collective
enum class Order { kForward, kBackward, kShuffled };
void set_order(Order order, std::uint32_t seed = 0);

// Kernel launches, memsets and questions about what the device holds, since the last call.
struct Launches {
  int kernels;
  int memsets;
  int questions;
  unsigned largest_grid;
};
Launches take_launches();
void count_memset();
// Blocks of a kernel that a multiprocessor holds, clusters that the device does: by shared memory
// and threads, as if registers were no matter.
int resident_blocks(unsigned block, std::size_t shared_bytes);
int resident_clusters(unsigned block, unsigned cluster, std::size_t shared_bytes);

// Returns false if the configuration is one that CUDA would refuse. cluster: blocks that run at
// once.
bool launch(const void* kernel, unsigned grid, unsigned block, unsigned cluster,
            std::size_t shared_bytes, const std::function<void()>& body);
bool allow_shared(const void* kernel, int bytes);

}  // namespace simt
