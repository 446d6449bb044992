// Runs a CUDA grid on one CPU thread. Every CUDA thread is a fiber. Clusters of blocks (of one
// block, if the launch has no cluster size) run one after another. A barrier or warp collective
// that some thread can never reach ends the program with a message, instead of a hang or an
// accidental pass. The headers in include/ replace CUDA's when g++ -x c++ -DLRDS_SIMT compiles a
// .cu file.
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

// --- The running CUDA thread ---
extern Index threadIdx, blockIdx, blockDim, gridDim;
unsigned char* dynamic_shared();

void block_barrier(std::source_location where);

// Every lane of `mask` passes 8 bytes and gets those of all lanes: gathered[lane]. The lanes must
// meet at one source line.
void warp_exchange(unsigned mask, std::uint64_t value, std::uint64_t* gathered,
                   std::source_location where);

// cp.async. The copy happens immediately with Order::kForward, and else when the thread waits for
// it. CUDA allows both.
void async_copy(void* to, const void* from, std::size_t bytes);
void async_commit();  // closes the group of the copies since the last commit
// waits for all closed groups except the last `unfinished`
void async_wait(std::size_t unfinished);

// Barriers in shared memory (mbarrier), of 8 bytes. A phase ends when all arrivals have come and
// all announced bytes have been copied. A thread waits for the end of the phase of a parity.
void mbarrier_init(void* barrier, unsigned arrivals);
void mbarrier_arrive(void* barrier, unsigned announced_bytes);
void mbarrier_wait(void* barrier, unsigned parity, std::source_location where);

// cp.async.bulk. The copy happens immediately with Order::kForward, at any time with
// Order::kShuffled, and when no thread can continue with Order::kBackward.
void bulk_copy(void* to, const void* from, std::size_t bytes, void* barrier);

// st.async. Stores 16 bytes in block `rank` of the cluster, at the address that corresponds to
// `here` in this block, and counts them on that block's `barrier`. The store happens when a
// bulk_copy would.
void async_store(void* here, unsigned rank, const void* value, std::size_t bytes, void* barrier);

// Clusters. map_shared: the address in block `rank` that corresponds to `here` in this block.
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

// --- The simulated GPU ---
struct Device {
  int compute_capability;  // 10 * major + minor
  int multiprocessors;
  int shared_per_block;
  int shared_per_multiprocessor;
  int l2_bytes;
  int group;  // multiprocessors that a cluster may use (GPC); the last group may be smaller
};
// Device 0 is an H200, on which every row of these tests gets its own block. Device 1 has one
// multiprocessor and 4 KiB of shared memory: one block computes all rows and streams them. Device 2
// has two multiprocessors with room for one block each. Devices 3 and 4 have clusters: device 3 has
// 8 multiprocessors with little shared memory, so that several blocks share a row; device 4 is one
// multiprocessor of an H200. Device 5 is a small H200 whose groups of 5 multiprocessors clusters of
// 4 cannot fill: it holds 2 clusters of 4 and none of 8.
const Device& device(int index);
constexpr int kDevices = 6;
void set_device(int index);
int current_device();

// The order in which blocks and threads run. Results must not depend on it.
//   kForward   blocks and threads in order; a warp runs ahead of the others until a barrier
//   kBackward  the same in reverse order
//   kShuffled  blocks in a random order; at each step a random warp runs to its next collective
enum class Order { kForward, kBackward, kShuffled };
void set_order(Order order, std::uint32_t seed = 0);

// Kernel launches, memsets and occupancy queries since the last call.
struct Launches {
  int kernels;
  int memsets;
  int queries;
  unsigned largest_grid;
};
Launches take_launches();
void count_memset();
// Blocks of a kernel per multiprocessor, and clusters per device. Shared memory and threads limit
// them, registers do not.
int resident_blocks(unsigned block, std::size_t shared_bytes);
int resident_clusters(unsigned block, unsigned cluster, std::size_t shared_bytes);

// Returns false for a configuration that CUDA would refuse. cluster: blocks that run at once.
bool launch(const void* kernel, unsigned grid, unsigned block, unsigned cluster,
            std::size_t shared_bytes, const std::function<void()>& body);
bool allow_shared(const void* kernel, int bytes);

}  // namespace simt
