// The one place that launches kernels and asks a device what it is.
#pragma once

#include <cuda_runtime.h>

#include <array>
#include <cstddef>
#include <mutex>

namespace lrds::cuda {

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), unsigned grid, unsigned block,
                   std::size_t shared_bytes, cudaStream_t stream, const Parameters&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error != cudaSuccess ? error : cudaGetLastError();
}

constexpr int kMaxDevices = 64;

struct DeviceFacts {
  int multiprocessors;
  int shared_per_block;           // the most that one block may opt in to
  int shared_per_multiprocessor;  // shared among its blocks, each of which costs
                                  // kSharedPerBlockReserved more
};
constexpr int kSharedPerBlockReserved = 1024;

// Runs `ask(device)` once per device and call site, whatever thread comes first; its error is
// remembered.
struct OncePerDevice {
  std::array<std::once_flag, kMaxDevices> flags;
  std::array<cudaError_t, kMaxDevices> errors;

  template <class Ask>
  cudaError_t operator()(int device, Ask ask) {
    if (device < 0 || device >= kMaxDevices) return cudaErrorInvalidDevice;
    std::call_once(flags[device], [&] { errors[device] = ask(device); });
    return errors[device];
  }
};

inline cudaError_t device_facts(int device, DeviceFacts* facts) {
  static OncePerDevice once;
  static std::array<DeviceFacts, kMaxDevices> known;
  const cudaError_t error = once(device, [](int d) {
    cudaError_t status =
        cudaDeviceGetAttribute(&known[d].multiprocessors, cudaDevAttrMultiProcessorCount, d);
    if (status != cudaSuccess) return status;
    status = cudaDeviceGetAttribute(&known[d].shared_per_block,
                                    cudaDevAttrMaxSharedMemoryPerBlockOptin, d);
    if (status != cudaSuccess) return status;
    return cudaDeviceGetAttribute(&known[d].shared_per_multiprocessor,
                                  cudaDevAttrMaxSharedMemoryPerMultiprocessor, d);
  });
  if (error == cudaSuccess) *facts = known[device];
  return error;
}

}  // namespace lrds::cuda
