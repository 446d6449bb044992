// gpu_facts: what planning needs of a GPU and no data sheet gives, as JSON. Clusters of the bulk
// kernel's size that the device holds at once.
//
//   nvcc -std=c++17 -arch=sm_90 -Icsrc -o gpu_facts tools/gpu_facts.cu && ./gpu_facts
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "cuda/kd_loss_plan.h"

namespace {

constexpr int kThreads = lrds::cuda::kBulkThreads + 32;

__global__ void __launch_bounds__(kThreads, 1) probe(int* sink) {
  extern __shared__ int room[];
  if (sink != nullptr) *sink = room[threadIdx.x];
}

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "gpu_facts: %s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

}  // namespace

int main() {
  cudaDeviceProp device{};
  check(cudaGetDeviceProperties(&device, 0), "device properties");
  int driver = 0, runtime = 0;
  check(cudaDriverGetVersion(&driver), "driver version");
  check(cudaRuntimeGetVersion(&runtime), "runtime version");
  const int most = static_cast<int>(device.sharedMemPerBlockOptin);
  const int tiles = std::min(lrds::cuda::kMaxBulkTiles,
                             (most - lrds::cuda::kBulkFixedBytes) / lrds::cuda::kBulkTileBytes);
  const int shared = tiles * lrds::cuda::kBulkTileBytes + lrds::cuda::kBulkFixedBytes;
  std::printf(
      "{\"device\": \"%s\", \"capability\": \"%d.%d\", \"multiprocessors\": %d, \"l2_bytes\": %d, "
      "\"shared_per_block\": %d, \"shared_per_multiprocessor\": %zu, \"driver_cuda\": %d, "
      "\"runtime_cuda\": %d, \"bulk_shared_bytes\": %d, \"active_clusters\": {",
      device.name, device.major, device.minor, device.multiProcessorCount, device.l2CacheSize, most,
      device.sharedMemPerMultiprocessor, driver, runtime, shared);
  bool first = true;
  if (device.major >= 9) {
    check(cudaFuncSetAttribute(probe, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "shared memory");
    check(cudaFuncSetAttribute(probe, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
          "clusters of 16");
    for (const int size : {1, 2, 4, 8, 16}) {
      cudaLaunchAttribute attribute{};
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(size);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      cudaLaunchConfig_t launch{};
      launch.gridDim = dim3(static_cast<unsigned>(device.multiProcessorCount / size * size));
      launch.blockDim = dim3(kThreads);
      launch.dynamicSmemBytes = static_cast<std::size_t>(shared);
      launch.attrs = &attribute;
      launch.numAttrs = 1;
      int clusters = 0;
      const cudaError_t status = cudaOccupancyMaxActiveClusters(&clusters, probe, &launch);
      if (status != cudaSuccess) {
        std::fprintf(stderr, "gpu_facts: clusters of %d: %s\n", size, cudaGetErrorString(status));
        cudaGetLastError();
        clusters = -1;
      }
      std::printf("%s\"%d\": %d", first ? "" : ", ", size, clusters);
      first = false;
    }
  }
  std::printf("}}\n");
  return 0;
}
