// Replaces CUDA's header of this name: the language extensions that the kernels use, and launches.
#pragma once

#include <cmath>
#include <tuple>
#include <type_traits>

#include "cuda_runtime_api.h"

// NOLINTBEGIN(bugprone-reserved-identifier): CUDA's names

#define __launch_bounds__(...)
#define __grid_constant__
// Blocks run one at a time, so static shared memory may be static. Kernels in clusters use only
// dynamic_shared().
#define __shared__ static

using simt::blockDim;
using simt::blockIdx;
using simt::gridDim;
using simt::threadIdx;

using Where = std::source_location;

inline void __syncthreads(Where where = Where::current()) { simt::block_barrier(where); }

inline void __syncwarp(unsigned mask = 0xffffffffu, Where where = Where::current()) {
  std::uint64_t all[simt::kWarpSize];
  simt::warp_exchange(mask, 0, all, where);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = simt::kWarpSize,
              Where where = Where::current()) {
  std::uint64_t all[simt::kWarpSize];
  simt::warp_exchange(mask, simt::to_bits(value), all, where);
  const int lane = static_cast<int>(threadIdx.x) % simt::kWarpSize;
  return simt::from_bits<T>(all[lane / width * width + source % width]);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = simt::kWarpSize,
                  Where where = Where::current()) {
  std::uint64_t all[simt::kWarpSize];
  simt::warp_exchange(mask, simt::to_bits(value), all, where);
  const int lane = static_cast<int>(threadIdx.x) % simt::kWarpSize;
  const int source = lane ^ lane_mask;
  return source / width > lane / width ? value : simt::from_bits<T>(all[source]);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = simt::kWarpSize,
                   Where where = Where::current()) {
  std::uint64_t all[simt::kWarpSize];
  simt::warp_exchange(mask, simt::to_bits(value), all, where);
  const unsigned lane = threadIdx.x % simt::kWarpSize;
  const unsigned segment = static_cast<unsigned>(width);
  return lane % segment + delta >= segment ? value : simt::from_bits<T>(all[lane + delta]);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, Where where = Where::current()) {
  std::uint64_t all[simt::kWarpSize];
  simt::warp_exchange(mask, predicate != 0, all, where);
  unsigned votes = 0;
  for (int lane = 0; lane < simt::kWarpSize; ++lane) {
    if ((mask >> lane & 1) != 0 && all[lane] != 0) votes |= 1u << lane;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, Where where = Where::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, Where where = Where::current()) {
  std::uint64_t all[simt::kWarpSize];
  simt::warp_exchange(mask, value, all, where);
  unsigned sum = 0;
  for (int lane = 0; lane < simt::kWarpSize; ++lane) {
    if (mask >> lane & 1) sum += static_cast<unsigned>(all[lane]);
  }
  return sum;
}

inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  const unsigned long long old = *address;
  *address += value;
  return old;
}
inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address |= value;
  return old;
}
inline void __nanosleep(unsigned) {}
inline void __threadfence() {}
inline int min(int a, int b) { return b < a ? b : a; }
inline int max(int a, int b) { return a < b ? b : a; }

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeClusterDimension = 4,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const std::tuple<std::remove_const_t<Parameters>...> parameters(arguments...);
  const unsigned cluster = config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1;
  const bool started =
      simt::launch(reinterpret_cast<const void*>(kernel), config->gridDim.x, config->blockDim.x,
                   cluster, config->dynamicSmemBytes, [&] { std::apply(kernel, parameters); });
  return started ? cudaSuccess : cudaErrorInvalidConfiguration;
}

inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*,
                                                                 int block,
                                                                 std::size_t shared_bytes) {
  *blocks = simt::resident_blocks(static_cast<unsigned>(block), shared_bytes);
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                                  const cudaLaunchConfig_t* config) {
  *clusters = simt::resident_clusters(config->blockDim.x, config->attrs[0].val.clusterDim.x,
                                      config->dynamicSmemBytes);
  return cudaSuccess;
}

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return simt::allow_shared(reinterpret_cast<const void*>(kernel), value) ? cudaSuccess
                                                                          : cudaErrorInvalidValue;
}

struct cudaFuncAttributes {
  int ptxVersion;
};

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel*) {
  attributes->ptxVersion = simt::device(simt::current_device()).compute_capability;
  return cudaSuccess;
}

// NOLINTEND(bugprone-reserved-identifier)
