// What a device is.
#include <algorithm>

#include "cuda/launch.h"

namespace lrds::cuda {
namespace {

// Asked for the architecture that the kernels were compiled for. It is never launched.
__global__ void probe() {}

cudaError_t ask(int device, DeviceFacts* facts) {
  int major = 0, minor = 0;
  const struct {
    int* value;
    cudaDeviceAttr attribute;
  } questions[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&facts->multiprocessors, cudaDevAttrMultiProcessorCount},
      {&facts->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&facts->shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&facts->l2_bytes, cudaDevAttrL2CacheSize},
  };
  for (const auto& question : questions) {
    const cudaError_t error = cudaDeviceGetAttribute(question.value, question.attribute, device);
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
  static std::array<DeviceFacts, kMaxDevices> known;
  const cudaError_t error = once(device, [](int d) { return ask(d, &known[d]); });
  if (error == cudaSuccess) *facts = known[device];
  return error;
}

}  // namespace lrds::cuda
