// Replaces CUDA's header of this name: the runtime calls of the launchers.
#pragma once

#include <cstddef>
#include <cstring>

#include "simt.h"

// NOLINTBEGIN(bugprone-reserved-identifier): CUDA's names

#define __global__
#define __device__
#define __host__

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
};
struct simtStream;
using cudaStream_t = simtStream*;

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::current_device();
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const simt::Device& facts = simt::device(device);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = facts.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = facts.l2_bytes;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = facts.compute_capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = facts.compute_capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = facts.shared_per_multiprocessor;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = facts.shared_per_block;
      return cudaSuccess;
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t cudaMemsetAsync(void* pointer, int value, std::size_t bytes, cudaStream_t) {
  std::memset(pointer, value, bytes);
  simt::count_memset();
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

// NOLINTEND(bugprone-reserved-identifier)
