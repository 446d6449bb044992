// The interpreter on trial: a kernel that must run, and kernels with one fault each that it must
// not let pass.
//   simt_interpreter FAULT
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

int* dynamic_ints() { return reinterpret_cast<int*>(simt::dynamic_shared()); }

// out = the block's input reversed, plus what the warp's collectives make of the lane numbers: 496
// + 16 + 3.
__global__ void reverse(const int* in, int* out) {
  int* const kept = dynamic_ints();
  kept[threadIdx.x] = in[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x % 32);
  int sum = lane;
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  const unsigned even = __ballot_sync(kAll, lane % 2 == 0);
  __syncwarp();
  const int third = __shfl_sync(kAll, lane, 3);
  out[blockIdx.x * blockDim.x + threadIdx.x] =
      kept[blockDim.x - 1 - threadIdx.x] + sum + __builtin_popcount(even & 0x55555555u) + third;
}

__global__ void half_of_the_block_exits(int*) {
  if (threadIdx.x < blockDim.x / 2) return;
  __syncthreads();
}

__global__ void two_barriers(int*) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// Free of races: the lanes that skip the barrier touch nothing. Divergent all the same.
__global__ void barrier_in_a_branch(int* out) {
  out[threadIdx.x] = 1;
  if (threadIdx.x < 48) {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}

__global__ void two_shuffles(int* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
  } else {
    out[threadIdx.x] = __shfl_xor_sync(kAll, 2, 1);
  }
}

__global__ void lane_left_the_shuffle(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}

__global__ void shared_overflow(int*) { dynamic_ints()[threadIdx.x + 1] = 1; }

__global__ void async_copy_read_early(int* out) {
  if (threadIdx.x != 0) return;
  alignas(16) static int source[4] = {1, 2, 3, 4};
  simt::async_copy(dynamic_ints(), source, 16);
  out[0] = dynamic_ints()[0];
  simt::async_wait();
}

using Kernel = void (*)(int*);

int run_reverse() {
  std::vector<int> in(3 * 96), out(in.size(), -1);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i * i);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(3);
  config.blockDim = dim3(96);
  config.dynamicSmemBytes = 96 * sizeof(int);
  if (cudaLaunchKernelEx(&config, reverse, static_cast<const int*>(in.data()), out.data()) !=
      cudaSuccess) {
    return 2;
  }
  for (std::size_t b = 0; b < 3; ++b) {
    for (std::size_t t = 0; t < 96; ++t) {
      if (out[b * 96 + t] != in[b * 96 + 95 - t] + 496 + 16 + 3) return 3;
    }
  }
  // What CUDA refuses: no block, too many threads, more shared memory than asked for.
  config.gridDim = dim3(0);
  if (cudaLaunchKernelEx(&config, reverse, static_cast<const int*>(in.data()), out.data()) ==
      cudaSuccess) {
    return 4;
  }
  config.gridDim = dim3(1);
  config.blockDim = dim3(1025);
  if (cudaLaunchKernelEx(&config, reverse, static_cast<const int*>(in.data()), out.data()) ==
      cudaSuccess) {
    return 5;
  }
  config.blockDim = dim3(96);
  config.dynamicSmemBytes = 64 * 1024;
  if (cudaLaunchKernelEx(&config, reverse, static_cast<const int*>(in.data()), out.data()) ==
      cudaSuccess) {
    return 6;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const std::string fault = argc == 2 ? argv[1] : "none";
  if (fault == "none") return run_reverse();
  const struct {
    const char* name;
    Kernel kernel;
  } kFaults[] = {{"exit", half_of_the_block_exits},     {"two_barriers", two_barriers},
                 {"branch", barrier_in_a_branch},       {"two_shuffles", two_shuffles},
                 {"lane_left", lane_left_the_shuffle},  {"shared_overflow", shared_overflow},
                 {"async_early", async_copy_read_early}};
  for (const auto& [name, kernel] : kFaults) {
    if (fault != name) continue;
    // The second order delays asynchronous copies until they are waited for.
    if (fault == "async_early") simt::set_order(simt::Order::kBackward);
    std::vector<int> out(64, 0);
    int* const data = out.data();
    simt::launch(reinterpret_cast<const void*>(kernel), 1, 64, 64 * sizeof(int),
                 [=, k = kernel] { k(data); });
    if (fault == "async_early" && out[0] != 1) {
      std::fprintf(stderr, "read %d before the copy was waited for\n", out[0]);
      return 7;
    }
    return 0;
  }
  std::fprintf(stderr, "no fault named %s\n", fault.c_str());
  return 1;
}
