// Launches kernels and queries devices; no other file does.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <mutex>

namespace lrds::cuda {

// A launch configuration and the attribute that it points to.
struct LaunchConfig {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  // cluster: blocks that run at once and share memory; 0: no cluster.
  LaunchConfig(unsigned grid, unsigned block, unsigned cluster, std::size_t shared_bytes,
               cudaStream_t stream) {
    config.gridDim = dim3(grid);
    config.blockDim = dim3(block);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    if (cluster > 0) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = cluster;
      attribute.val.clusterDim.y = 1;
      attribute.val.clusterDim.z = 1;
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
};

template <class... Parameters>
cudaError_t launch_clusters(void (*kernel)(Parameters...), unsigned grid, unsigned block,
                            unsigned cluster, std::size_t shared_bytes, cudaStream_t stream,
                            const Parameters&... arguments) {
  const LaunchConfig launch(grid, block, cluster, shared_bytes, stream);
  const cudaError_t error = cudaLaunchKernelEx(&launch.config, kernel, arguments...);
  return error != cudaSuccess ? error : cudaGetLastError();
}

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), unsigned grid, unsigned block,
                   std::size_t shared_bytes, cudaStream_t stream, const Parameters&... arguments) {
  return launch_clusters(kernel, grid, block, 0, shared_bytes, stream, arguments...);
}

constexpr int kMaxDevices = 64;

constexpr int kSharedPerBlockReserved = 1024;

struct DeviceFacts {
  // 10 * major + minor of the features that kernels may use: the device's compute capability, or
  // that of the code that was compiled for it, if it is lower.
  int architecture;
  int multiprocessors;
  int shared_per_block;           // the most that a block can opt in to
  int shared_per_multiprocessor;  // shared by its blocks, each of which uses
                                  // kSharedPerBlockReserved bytes more
  int l2_bytes;
};

// Queried once per device.
cudaError_t device_facts(int device, DeviceFacts* facts);

// How many blocks of this size the current device, which must be `device`, runs at once, given its
// registers and shared memory. With cluster > 0, whole clusters are counted, which must fit its
// groups of multiprocessors. At least one block or cluster. Queried once per combination of the
// arguments, after the kernel's limit of shared memory has been raised.
cudaError_t resident_blocks(int device, const void* kernel, unsigned block, unsigned cluster,
                            std::size_t shared_bytes, std::int64_t* blocks);

template <class... Parameters>
cudaError_t resident_blocks(int device, void (*kernel)(Parameters...), unsigned block,
                            unsigned cluster, std::size_t shared_bytes, std::int64_t* blocks) {
  return resident_blocks(device, reinterpret_cast<const void*>(kernel), block, cluster,
                         shared_bytes, blocks);
}

// Runs `query(device)` once per device and call site, in whichever thread comes first, and keeps
// its error.
struct OncePerDevice {
  std::array<std::once_flag, kMaxDevices> flags;
  std::array<cudaError_t, kMaxDevices> errors;

  template <class Query>
  cudaError_t operator()(int device, Query query) {
    if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
    std::call_once(flags[device], [&] { errors[device] = query(device); });
    return errors[device];
  }
};

}  // namespace lrds::cuda
