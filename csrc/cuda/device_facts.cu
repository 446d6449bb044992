// The properties of a device, and how many blocks it runs at once.
#include <algorithm>
#include <map>
#include <tuple>

#include "cuda/launch.h"

namespace lrds::cuda {
namespace {

// Gives the architecture that the kernels were compiled for. It is never launched.
__global__ void probe() {}

cudaError_t query_facts(int device, DeviceFacts* facts) {
  int major = 0, minor = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } attributes[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&facts->multiprocessors, cudaDevAttrMultiProcessorCount},
      {&facts->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&facts->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&facts->l2_bytes, cudaDevAttrL2CacheSize},
  };
  for (const auto& query : attributes) {
    const cudaError_t error = cudaDeviceGetAttribute(query.value, query.attribute, device);
    if (error != cudaSuccess) return error;
  }
  cudaFuncAttributes compiled;
  const cudaError_t error = cudaFuncGetAttributes(&compiled, probe);
  if (error != cudaSuccess) return error;
  facts->architecture = std::min(10 * major + minor, compiled.ptxVersion);
  return cudaSuccess;
}

}  // namespace

cudaError_t device_facts(int device, DeviceFacts* facts) {
  static OncePerDevice once;
  static std::array<DeviceFacts, kMaxDevices> cache;
  const cudaError_t error = once(device, [](int d) { return query_facts(d, &cache[d]); });
  if (error == cudaSuccess) *facts = cache[device];
  return error;
}

cudaError_t resident_blocks(int device, const void* kernel, unsigned block, unsigned cluster,
                            std::size_t shared_bytes, std::int64_t* blocks) {
  static std::mutex mutex;
  static std::map<std::tuple<int, const void*, unsigned, unsigned, std::size_t>, std::int64_t>
      cache;
  const std::lock_guard lock(mutex);
  const std::tuple key(device, kernel, block, cluster, shared_bytes);
  if (const auto entry = cache.find(key); entry != cache.end()) {
    *blocks = entry->second;
    return cudaSuccess;
  }
  int count = 0;
  DeviceFacts facts{};
  cudaError_t error = device_facts(device, &facts);
  if (error != cudaSuccess) return error;
  if (cluster > 0) {
    const LaunchConfig launch(cluster, block, cluster, shared_bytes, nullptr);
    error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
  } else {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, static_cast<int>(block),
                                                          shared_bytes);
  }
  if (error != cudaSuccess) return error;
  const std::int64_t each = cluster > 0 ? cluster : facts.multiprocessors;
  *blocks = cache[key] = std::max(1, count) * each;
  return cudaSuccess;
}

}  // namespace lrds::cuda
