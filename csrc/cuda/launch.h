// The one place where a kernel is launched and where dynamic shared memory is named. nvcc and the
// tests' interpreter (LRDS_SIMT) each have their own way of doing both; everything else in
// csrc/cuda is plain CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#if defined(LRDS_SIMT)
#include "simt.h"
#endif

namespace lrds::cuda {

#if defined(LRDS_SIMT)

inline unsigned char* dynamic_shared() { return simt::dynamic_shared(); }

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), unsigned grid, unsigned block,
                   std::size_t shared_bytes, cudaStream_t stream, Args... args) {
  simt::launch(dim3(grid), dim3(block), shared_bytes, stream, [=] { kernel(args...); });
  return cudaGetLastError();
}

#else

__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char lrds_dynamic_shared[];
  return lrds_dynamic_shared;
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), unsigned grid, unsigned block,
                   std::size_t shared_bytes, cudaStream_t stream, Args... args) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid);
  config.blockDim = dim3(block);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

#endif

}  // namespace lrds::cuda
