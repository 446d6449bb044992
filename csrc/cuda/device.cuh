// Device code that the kernels share: element types, vectors of 16 bytes, the fast exponential,
// dynamic shared memory, and the barriers, bulk copies and clusters of sm_90.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "core/kd_loss.h"

namespace lrds::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffu;

// A barrier in shared memory (mbarrier). A phase ends when all its arrivals have come and all bytes
// that they announced have been copied.
using Barrier = unsigned long long;

// These differ in the interpreter of tests/simt, which has no PTX and no shared memory that a
// linker places.
#if defined(LRDS_SIMT)
__device__ inline float exp2_approximate(float x) { return exp2f(x); }
__device__ inline void prefetch_l2(const void*) {}
__device__ inline unsigned char* dynamic_shared() { return simt::dynamic_shared(); }
__device__ inline void barrier_init(Barrier* barrier, unsigned arrivals) {
  simt::mbarrier_init(barrier, arrivals);
}
__device__ inline void barrier_init_fence() {}
__device__ inline void barrier_arrive(Barrier* barrier) { simt::mbarrier_arrive(barrier, 0); }
__device__ inline void barrier_arrive_announcing(Barrier* barrier, unsigned bytes) {
  simt::mbarrier_arrive(barrier, bytes);
}
__device__ inline void barrier_wait(Barrier* barrier, unsigned parity) {
  simt::mbarrier_wait(barrier, parity, std::source_location::current());
}
__device__ inline void bulk_copy(void* to, const void* from, unsigned bytes, Barrier* barrier) {
  simt::bulk_copy(to, from, bytes, barrier);
}
__device__ inline unsigned cluster_rank() { return simt::cluster_rank(); }
__device__ inline void cluster_sync() { simt::cluster_barrier(std::source_location::current()); }
template <class T>
__device__ inline void send_to_block(T* here, unsigned rank, const T& value, Barrier* barrier) {
  static_assert(sizeof(T) % 16 == 0 && alignof(T) >= 16);
  for (unsigned i = 0; i < sizeof(T); i += 16) {
    simt::async_store(reinterpret_cast<char*>(here) + i, rank,
                      reinterpret_cast<const char*>(&value) + i, 16, barrier);
  }
}
#define LRDS_HAS_CLUSTERS 1
#else
// Accurate to 2 ulp; results below 2^-126 become 0.
__device__ inline float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline void prefetch_l2(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}
__device__ inline unsigned char* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define LRDS_HAS_CLUSTERS 1
__device__ inline unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
__device__ inline void barrier_init(Barrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Call it after the last barrier_init and before another thread, copy or block may arrive.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void barrier_arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and makes the phase wait until `bytes` bytes have been copied as well.
__device__ inline void barrier_arrive_announcing(Barrier* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits until the phase of this parity has ended. The parities are 0, 1, 0, ...
__device__ inline void barrier_wait(Barrier* barrier, unsigned parity) {
  unsigned ended = 0;
  while (ended == 0) {
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(ended)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
// Copies a multiple of 16 bytes between 16-byte boundaries. One thread calls it.
__device__ inline void bulk_copy(void* to, const void* from, unsigned bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
__device__ inline unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Every thread of the cluster's blocks calls it. It orders only the barrier_init_fence before it.
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
  asm volatile("barrier.cluster.wait;" ::: "memory");
}
// The address, in block `rank` of the cluster, that corresponds to `here` in this block.
__device__ inline unsigned address_in_block(const void* here, unsigned rank) {
  unsigned address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(shared_address(here)), "r"(rank));
  return address;
}
// Stores `value` in block `rank` of the cluster, at the address that corresponds to `here` in this
// block. The store completes before the phase of that block's `barrier` ends; a thread of that
// block must announce the bytes. Threads that wait for the phase see the value without a fence.
template <class T>
__device__ inline void send_to_block(T* here, unsigned rank, const T& value, Barrier* barrier) {
  static_assert(sizeof(T) % 16 == 0 && alignof(T) >= 16);
  const unsigned address = address_in_block(here, rank);
  const unsigned counted = address_in_block(barrier, rank);
  uint4 parts[sizeof(T) / 16];
  memcpy(parts, &value, sizeof(T));
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 16; ++i) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(address + 16 * i),
        "r"(parts[i].x), "r"(parts[i].y), "r"(parts[i].z), "r"(parts[i].w), "r"(counted)
        : "memory");
  }
}
#endif
#endif

// exp2 for float and exp for double: the scale of a float argument includes log2(e).
__device__ inline float exp_unit(float x) { return exp2_approximate(x); }
__device__ inline double exp_unit(double x) { return exp(x); }

// For x <= 0. Rounding x * scale changes the result by a relative |x| * 2^-24, which is at most
// 2^-25 of the row's largest term, exactly 1.
template <class A>
__device__ inline A exp_scaled(A x, A scale) {
  return exp_unit(x * scale);
}

template <class A, class T>
__device__ inline A widen(T x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return static_cast<A>(__bfloat162float(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return static_cast<A>(__half2float(x));
  } else {
    return static_cast<A>(x);
  }
}

template <class T, class A>
__device__ inline T narrow(A x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// Prefetches a row to L2 without waiting. Each of `lanes` lanes requests 32 bytes at a time.
__device__ inline void prefetch_row(const void* row, int bytes, int lane, int lanes) {
  for (int at = 32 * lane; at < bytes; at += 32 * lanes) {
    prefetch_l2(static_cast<const char*>(row) + at);
  }
}

// Two elements of a 16-bit type, packed in a word.
template <class T>
__device__ inline void widen_pair(unsigned word, float& first, float& second) {
#if !defined(LRDS_SIMT)
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
    return;
  }
#endif
  T pair[2];
  memcpy(pair, &word, sizeof word);
  first = widen<float>(pair[0]);
  second = widen<float>(pair[1]);
}
template <class T>
__device__ inline unsigned pack_pair(float first, float second) {
  const T pair[2] = {narrow<T>(first), narrow<T>(second)};
  unsigned word;
  memcpy(&word, pair, sizeof word);
  return word;
}
// The larger of each pair of elements; a NaN loses against a number.
template <class T>
__device__ inline unsigned pair_max(unsigned a, unsigned b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  unsigned larger;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  } else {
    asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  }
  return larger;
#else
  T x[2], y[2];
  memcpy(x, &a, sizeof a);
  memcpy(y, &b, sizeof b);
  x[0] = __hmax(x[0], y[0]);
  x[1] = __hmax(x[1], y[1]);
  memcpy(&a, x, sizeof a);
  return a;
#endif
}

// kWidth elements, loaded or stored by one instruction.
template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T element[kWidth];
};

// *(first ? x : y), selected word by word, because nvcc would select element by element.
template <class T, int kWidth>
__device__ inline Vector<T, kWidth> load_either(bool first, const Vector<T, kWidth>* x,
                                                const Vector<T, kWidth>* y) {
  if constexpr (sizeof(*x) == sizeof(uint4)) {
    const uint4 words =
        first ? *reinterpret_cast<const uint4*>(x) : *reinterpret_cast<const uint4*>(y);
    Vector<T, kWidth> out;
    memcpy(&out, &words, sizeof out);
    return out;
  } else {
    return first ? *x : *y;
  }
}

// Converts every element to A. Pairs of 16-bit elements are converted word by word, which nvcc does
// not do by itself.
template <class A, class T, int kWidth>
__device__ inline void widen_vector(const Vector<T, kWidth>& x, A (&out)[kWidth]) {
  constexpr bool kByWords = sizeof(T) == 2 && std::is_same_v<A, float> && kWidth % 2 == 0;
  if constexpr (kByWords) {
    unsigned words[kWidth / 2];
    memcpy(words, &x, sizeof words);
#pragma unroll
    for (int j = 0; j < kWidth / 2; ++j) widen_pair<T>(words[j], out[2 * j], out[2 * j + 1]);
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out[j] = widen<A>(x.element[j]);
  }
}

// Hides the value of x from nvcc, which would otherwise keep results computed from it in registers
// for later use.
__device__ inline int forget(int x) {
#if !defined(LRDS_SIMT)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

template <class T, int kWidth, class A>
__device__ inline Vector<T, kWidth> narrow_vector(const A (&x)[kWidth]) {
  Vector<T, kWidth> out;
  if constexpr (std::is_same_v<T, __nv_bfloat16> && kWidth % 2 == 0) {
#pragma unroll
    for (int j = 0; j < kWidth; j += 2) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x[j], x[j + 1]);
      out.element[j] = pair.x;
      out.element[j + 1] = pair.y;
    }
  } else if constexpr (std::is_same_v<T, __half> && kWidth % 2 == 0) {
#pragma unroll
    for (int j = 0; j < kWidth; j += 2) {
      const __half2 pair = __floats2half2_rn(x[j], x[j + 1]);
      out.element[j] = pair.x;
      out.element[j + 1] = pair.y;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) out.element[j] = narrow<T>(x[j]);
  }
  return out;
}

// Stores a vector with one instruction. nvcc splits a plain assignment of 8 or 16 bytes into one
// store per element where it has computed the elements separately (docs/kernels.md).
template <class T, int kWidth>
__device__ inline void store_vector(T* to, const Vector<T, kWidth>& x) {
#if !defined(LRDS_SIMT)
  if constexpr (sizeof(x) == sizeof(uint4)) {
    uint4 words;
    memcpy(&words, &x, sizeof words);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
                 : "memory");
    return;
  } else if constexpr (sizeof(x) == sizeof(uint2)) {
    uint2 words;
    memcpy(&words, &x, sizeof words);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(words.x), "r"(words.y)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<Vector<T, kWidth>*>(to) = x;
}

// The larger number; a NaN loses against a number.
__device__ inline float larger(float x, float y) { return fmaxf(x, y); }
__device__ inline double larger(double x, double y) { return fmax(x, y); }

// The largest of `least` and the elements; NaNs are ignored. Elements of 16 bits are compared in
// pairs without conversion.
template <class A, class T, int kWidth>
__device__ inline A vector_max(const Vector<T, kWidth>& x, A least) {
  constexpr bool kBFloat = std::is_same_v<T, __nv_bfloat16>;
  if constexpr ((kBFloat || std::is_same_v<T, __half>) && kWidth % 2 == 0) {
    using Pair = std::conditional_t<kBFloat, __nv_bfloat162, __half2>;
    Pair top(x.element[0], x.element[1]);
#pragma unroll
    for (int j = 2; j < kWidth; j += 2) top = __hmax2(top, Pair(x.element[j], x.element[j + 1]));
    return larger(widen<A>(top.y), larger(widen<A>(top.x), least));
  } else {
#pragma unroll
    for (int j = 0; j < kWidth; ++j) least = larger(widen<A>(x.element[j]), least);
    return least;
  }
}

// Calls body with a value of the C++ type of `type`, which is not float64 if A is float.
template <class A, class Body>
__device__ inline void with_element_type(DType type, Body body) {
  if (type == DType::kBFloat16) {
    body(__nv_bfloat16());
  } else if (type == DType::kFloat16) {
    body(__half());
    // NOLINTNEXTLINE(bugprone-branch-clone): the values' types differ
  } else if (std::is_same_v<A, double> && type == DType::kFloat64) {
    body(double());
  } else {
    body(float());
  }
}

// An element of a row whose type is known at run time only.
template <class A>
__device__ inline A load_element(const void* row, DType type, int k) {
  A x = A(0);
  with_element_type<A>(
      type, [&](auto typed) { x = widen<A>(static_cast<const decltype(typed)*>(row)[k]); });
  return x;
}

__host__ __device__ inline int element_size(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// Butterfly reductions: every lane of a group of `lanes` lanes (a power of two) gets the same bits.
template <class T>
__device__ inline T group_sum(T x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    x += __shfl_xor_sync(kWholeWarp, x, offset);
  }
  return x;
}
template <class T>
__device__ inline T group_max(T x, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kWholeWarp, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

}  // namespace lrds::cuda
