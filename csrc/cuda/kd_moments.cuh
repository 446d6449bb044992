// A block per row. It runs the row template of core/kd_row.h twice, once for each term, with both
// gradients in scratch memory, and then takes their inner products with each other and the
// direction.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/kd_family.cuh"
#include "cuda/kd_moments.h"

namespace lrds::cuda {

// About eight classes per thread, as in kd_family.cuh.
template <class A>
int moments_threads(const KdLossArgs& args) {
  int threads = kWarpSize;
  while (threads < kFamilyThreads<A> && std::int64_t{threads} * 8 < args.classes) threads *= 2;
  return threads;
}

template <class A>
std::int64_t moments_blocks(const KdLossArgs& args, const DeviceFacts& facts) {
  const std::int64_t together = std::min<std::int64_t>(32, 1024 / moments_threads<A>(args));
  return std::max<std::int64_t>(1, std::min(args.rows, facts.multiprocessors * together));
}

// BlockRow that writes the gradient to scratch memory, in the accumulation type. A thread reads
// only what it has written itself.
template <class A>
class MomentsRow : public BlockRow<A> {
 public:
  A* scratch;
  __device__ void store(int k, A x) const { scratch[k] = x; }
};

template <class D, class A>
__global__ void __launch_bounds__(kFamilyThreads<A>, 1)
    kd_moments_rows(const __grid_constant__ KdLossArgs args,
                    const __grid_constant__ DistillParams<A> params) {
  __shared__ FamilyShared<A> shared;
  const int classes = static_cast<int>(args.classes);
  A* const g = static_cast<A*>(args.moments_scratch) +
               2 * static_cast<std::int64_t>(blockIdx.x) * args.classes;
  A* const h = g + classes;
  A* const out = static_cast<A*>(args.moments);
  for (std::int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const FamilyRow<A> open = open_family_row<A>(args, row);
    if (!open.valid || open.bad) {
      const A value = open.bad ? std::numeric_limits<A>::quiet_NaN() : A(0);
      if (threadIdx.x < kMoments) {
        out[static_cast<std::int64_t>(threadIdx.x) * args.rows + row] = value;
      }
      if (threadIdx.x == 0) args.teacher_top[row] = open.y;
      continue;
    }
    const int y = static_cast<int>(open.y);
    MomentsRow<A> exec{};
    exec.student = static_cast<const char*>(args.student) +
                   row * args.student_stride * element_size(args.student_type);
    exec.student_type = args.student_type;
    exec.teacher = static_cast<const char*>(args.teacher) +
                   row * args.teacher_stride * element_size(args.teacher_type);
    exec.teacher_type = args.teacher_type;
    exec.classes = classes;
    exec.target = y;
    exec.swapped = -1;
    exec.shared = &shared;

    RowTask<A> task{};
    task.t_y = task.t_margin = task.t_sum = task.w_y = A(1);
    task.z_y = load_element<A>(exec.student, exec.student_type, y);
    task.v_y = exec.teacher_logit(y);
    const int other = exec.argmax([&](int k) { return exec.v(k); });
    const A top = exec.max([&](int k) { return exec.v(k); });
    // Both terms use the same copy of the row's code, which halves code and compile time.
    RowTerms<A> terms[2];
#pragma unroll 1
    for (int term = 0; term < 2; ++term) {
      const RowTask<A> one = only_term(task, term == 1);
      exec.scratch = term == 1 ? h : g;
      terms[term] = RowProgram<D, MomentsRow<A>>(exec, params, one).run();
      if (exec.owns(y)) exec.scratch[y] = terms[term].at_target;
    }
    const RowTerms<A>& ce = terms[0];
    const RowTerms<A>& kd = terms[1];

    const A* const direction = args.direction != nullptr ? static_cast<const A*>(args.direction) +
                                                               row * args.direction_stride
                                                         : nullptr;
    A products[3], along[3] = {A(0), A(0), A(0)};
    exec.template sum<3>(
        [&](int k, A* into) {
          const A a = g[k], b = h[k];
          into[0] += a * a;
          into[1] += b * b;
          into[2] += a * b;
        },
        products);
    if (direction != nullptr) {
      exec.template sum<3>(
          [&](int k, A* into) {
            const A r = direction[k];
            into[0] += g[k] * r;
            into[1] += h[k] * r;
            into[2] += r;
          },
          along);
    }
    if (threadIdx.x == 0) {
      const A row_moments[kMoments] = {
          ce.ce,
          kd.kd,
          products[0],
          products[1],
          products[2],
          along[0],
          along[1],
          direction != nullptr ? direction[y] - along[2] / static_cast<A>(classes) : A(0)};
#pragma unroll
      for (int i = 0; i < kMoments; ++i) out[i * args.rows + row] = row_moments[i];
      args.teacher_top[row] = task.v_y < top ? other : y;
    }
    // The next row reuses the shared memory.
    __syncthreads();
  }
}

template <class A>
cudaError_t launch_moments(const KdLossArgs& args, int device, cudaStream_t stream) {
  DeviceFacts facts;
  const cudaError_t known = device_facts(device, &facts);
  if (known != cudaSuccess) return known;
  cudaError_t error = cudaErrorInvalidValue;
  visit_divergence(args.divergence, [&](auto divergence) {
    error = launch(kd_moments_rows<decltype(divergence), A>,
                   static_cast<unsigned>(moments_blocks<A>(args, facts)),
                   static_cast<unsigned>(moments_threads<A>(args)), 0, stream, args,
                   distill_params<A>(args));
  });
  return error;
}

}  // namespace lrds::cuda
