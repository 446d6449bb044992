// The operator kd_moments: inner products of a row's logit gradients (core/kd_loss.h: Moment).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <cstdint>
#include <tuple>

#include "core/kd_loss.h"
#include "torch/problem.h"

#if defined(LRDS_WITH_CUDA)
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/kd_moments.h"
#endif

namespace lrds {
namespace {

#if defined(LRDS_WITH_CUDA)
void run_moments_cuda(const Call& call) {
  const c10::cuda::CUDAGuard guard(call.student.device());
  KdLossArgs args = call.args;
  std::size_t bytes = 0;
  C10_CUDA_CHECK(cuda::kd_moments_scratch_bytes(args, &bytes));
  const Tensor scratch =
      at::empty({static_cast<std::int64_t>(bytes)}, call.student.options().dtype(at::kByte));
  args.moments_scratch = scratch.mutable_data_ptr();
  C10_CUDA_CHECK(cuda::kd_moments(args, c10::cuda::getCurrentCUDAStream().stream()));
}
#endif

using Moments = std::tuple<Tensor, Tensor>;

// The moments of every row, (kMoments, rows) in the accumulation type, and the teacher's top
// classes, (rows,) int64. direction: (rows, classes) or none.
template <Run run>
struct MomentsOn {
  template <class... P>
  struct Of {
    static Moments call(P... parameters, const OptionalTensor& direction) {
      const Problem problem = make_problem(parameters...);
      Call call = make_call(problem);
      KdLossArgs& args = call.args;
      TORCH_CHECK_VALUE(
          !problem.has_soft_target() && !problem.selected.has_value() &&
              !problem.class_weight.has_value() && args.kept_classes == 0 &&
              args.teacher_rows == args.rows && args.revise != Revise::kSwap &&
              args.label_smoothing == 0.0,
          "kd_moments needs class-index targets, teacher logits of every row and class, "
          "and no selected, class_weight, label_smoothing or revise='swap'");
      const at::TensorOptions accumulate = problem.student.options().dtype(call.accumulate);
      Tensor direction_rows;
      if (direction.has_value()) {
        check_device(*direction, "direction", problem.student);
        TORCH_CHECK_VALUE(direction->dim() == 2 && direction->size(0) == args.rows &&
                              direction->size(1) == args.classes,
                          "direction must have shape (", args.rows, ", ", args.classes, "); got ",
                          direction->sizes());
        direction_rows = rows_of(direction->to(call.accumulate), args.classes);
        args.direction = direction_rows.const_data_ptr();
        args.direction_stride = direction_rows.stride(0);
      }
      const Tensor moments = at::empty({kMoments, args.rows}, accumulate);
      const Tensor top = at::empty({args.rows}, accumulate.dtype(at::kLong));
      args.moments = moments.mutable_data_ptr();
      args.teacher_top = top.mutable_data_ptr<std::int64_t>();
      run(call);
      return {moments, top};
    }
  };
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(lrds_fast, m) {
  m.def(
      ("kd_moments(" + schema_parameters() + ", Tensor? direction) -> (Tensor moments, Tensor top)")
          .c_str());
}

TORCH_LIBRARY_IMPL(lrds_fast, Autograd, m) {
  m.impl("kd_moments", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(lrds_fast, CPU, m) {
  m.impl("kd_moments", &WithParameters<MomentsOn<run_cpu>::Of>::call);
}
#if defined(LRDS_WITH_CUDA)
TORCH_LIBRARY_IMPL(lrds_fast, CUDA, m) {
  m.impl("kd_moments", &WithParameters<MomentsOn<run_moments_cuda>::Of>::call);
}
#endif

}  // namespace lrds
