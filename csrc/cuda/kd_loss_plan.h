// Which kernel sweeps the rows of a call, and with what grid. Pure arithmetic on shapes, types,
// addresses and device facts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/kd_loss.h"
#include "cuda/launch.h"

namespace lrds::cuda {

// Where the denominator of the gradient comes from.
enum class ValidRows : std::int32_t {
  kUnused = 0,  // a sum, or no gradient
  kGiven = 1,   // num_valid
  kOwn = 2,     // every block counts all targets
  kShared = 3,  // the blocks share the counting through one zeroed word
};

// Up to here a block counts all targets in less time than a memset takes to launch.
constexpr std::int64_t kOwnCountRows = 4096;

enum class Path : std::int32_t {
  kWarpShort = 0,    // 1..16 lanes a row, 8 elements each, element by element
  kWarpVector = 1,   // 16 or 32 lanes a row, 32 elements each, 16-byte vectors
  kWarpElement = 2,  // the same, element by element: other types or alignments
  kBlockVector = 3,  // a block a row, shared memory and streaming, 16-byte vectors
  kBlockElement = 4  // the same, element by element; any types, double accumulation
};

constexpr int kMaxThreads = 1024;
constexpr int kWarpThreads = 256;  // of a block that gives its rows to warps
constexpr int kShortElements = 8;
constexpr int kLongElements = 32;
constexpr std::int64_t kShortClasses = 16 * kShortElements;
constexpr std::int64_t kLongClasses = 32 * kLongElements;
constexpr int kElementElements = 16;
constexpr std::int64_t kElementClasses = 32 * kElementElements;
// Classes that the kernels index in 32 bits, with room for a grid of vectors past the end.
constexpr std::int64_t kMaxClasses = std::int64_t{1} << 30;
// Blocks of kWarpThreads that the registers of a multiprocessor hold (docs/kernels.md).
constexpr int kWarpBlocksPerMultiprocessor = 2;

// Threads of the blocks that sweep a row together: at most so many a block, and so many a
// multiprocessor.
constexpr int block_threads(bool wide) { return wide ? 256 : 768; }
constexpr int block_threads_per_multiprocessor(bool wide) { return wide ? 512 : 768; }

// The block kernel's own shared memory, rounded up.
constexpr int kBlockStaticBytes = 2560;

struct Plan {
  Path path;
  unsigned grid;
  unsigned threads;
  int lanes;                 // of a row, warp paths
  int resident;              // vectors per thread that stay in shared memory, block paths
  std::size_t shared_bytes;  // dynamic
};

namespace detail {

inline std::int64_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// Do the three rows r of student, teacher and gradient reach a 16-byte boundary at the same class,
// for every r?
inline bool vectors_agree(const KdLossArgs& args) {
  if (args.accumulate == DType::kFloat64) return false;
  const std::int64_t size = size_of(args.student_type);
  const auto past = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16; };
  const auto strides_agree = [&](std::int64_t a, std::int64_t b) {
    return args.rows <= 1 || (a - b) % (16 / size) == 0;
  };
  if (past(args.student) % size != 0) return false;
  if (args.teacher_rows > 0) {
    if (args.teacher_type != args.student_type) return false;
    if (past(args.teacher) != past(args.student)) return false;
    if (!strides_agree(args.student_stride, args.teacher_stride)) return false;
  }
  if (args.gradient != nullptr) {
    if (past(args.gradient) != past(args.student)) return false;
    if (!strides_agree(args.student_stride, args.classes)) return false;
  }
  return true;
}

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

inline int power_of_two_at_least(std::int64_t x) {
  int p = 1;
  while (p < x) p *= 2;
  return p;
}

}  // namespace detail

inline ValidRows plan_valid_rows(const KdLossArgs& args) {
  const bool averaged =
      args.reduction == Reduction::kMean || args.reduction == Reduction::kElementMean;
  if (!averaged || args.gradient == nullptr) return ValidRows::kUnused;
  if (args.num_valid != nullptr) return ValidRows::kGiven;
  if (args.counts == nullptr || args.rows <= kOwnCountRows ||
      args.rows >= (std::int64_t{1} << 31)) {
    return ValidRows::kOwn;
  }
  return ValidRows::kShared;
}

// The dispatch table. "Alike" means that student, teacher and gradient have one type and
// vectors_agree.
//
// clang-format off
//   accumulation  classes   operands   path           a row's threads
//   float         1..128    one type   kWarpShort     ceil(C / 8) lanes, up to a power of two
//   float         129..1024 alike      kWarpVector    16 lanes to 512 classes, else 32
//   float         1..512    otherwise  kWarpElement   16 lanes to 256 classes, else 32
//   float         1025..    alike      kBlockVector   128 to 4096 classes, 256 to 8192, else 384 if two blocks
//   float         513..     otherwise  kBlockElement  with their rows fit in a multiprocessor, else 768
//   double        1..       any        kBlockElement  64 to 1024 classes, 128 to 4096, else 256
// clang-format on
inline Plan plan_rows(const KdLossArgs& args, const DeviceFacts& device) {
  const std::int64_t classes = args.classes;
  const bool vectors = detail::vectors_agree(args);
  const bool same_type = args.teacher_type == args.student_type || args.teacher_rows == 0;
  Plan plan{};
  const bool wide = args.accumulate == DType::kFloat64;

  const bool is_short = !wide && same_type && classes <= kShortClasses;
  if (is_short || (!wide && classes <= (vectors ? kLongClasses : kElementClasses))) {
    if (is_short) {
      plan.path = Path::kWarpShort;
      plan.lanes = detail::power_of_two_at_least(detail::ceil_div(classes, kShortElements));
    } else {
      plan.path = vectors ? Path::kWarpVector : Path::kWarpElement;
      plan.lanes = classes <= 16 * (vectors ? kLongElements : kElementElements) ? 16 : 32;
    }
    // Small batches in small blocks, so that they reach every multiprocessor.
    const std::int64_t threads = args.rows * plan.lanes;
    plan.threads = kWarpThreads;
    while (plan.threads > 32 && detail::ceil_div(threads, plan.threads) < device.multiprocessors) {
      plan.threads /= 2;
    }
    const std::int64_t most = std::int64_t{device.multiprocessors} * kWarpBlocksPerMultiprocessor *
                              (kWarpThreads / plan.threads);
    plan.grid = static_cast<unsigned>(std::min(detail::ceil_div(threads, plan.threads), most));
    return plan;
  }

  plan.path = vectors ? Path::kBlockVector : Path::kBlockElement;
  const std::int64_t width = vectors ? 16 / detail::size_of(args.student_type) : 1;
  const std::int64_t student_size = detail::size_of(args.student_type);
  const std::int64_t teacher_size = args.teacher_rows == 0 ? 0
                                    : vectors              ? student_size
                                    : wide                 ? 8
                                                           : 4;
  // Rows in shared memory, of one block with `threads`: vectors per thread, and bytes.
  const std::int64_t most_shared = device.shared_per_block - kBlockStaticBytes;
  const auto keep = [&](int threads) {
    const std::int64_t slot = threads * width * (student_size + teacher_size);
    const std::int64_t needed = detail::ceil_div(classes / width, threads);
    plan.threads = static_cast<unsigned>(threads);
    plan.resident =
        static_cast<int>(std::min(needed, std::max<std::int64_t>(0, most_shared) / slot));
    plan.shared_bytes = static_cast<std::size_t>(plan.resident * slot);
    const std::int64_t block_bytes =
        static_cast<std::int64_t>(plan.shared_bytes) + kBlockStaticBytes + kSharedPerBlockReserved;
    return std::min(device.shared_per_multiprocessor / block_bytes,
                    std::int64_t{block_threads_per_multiprocessor(wide)} / threads);
  };
  std::int64_t blocks;
  if (wide) {
    blocks = keep(classes <= 1024 ? 64 : classes <= 4096 ? 128 : block_threads(true));
  } else if (classes <= 8192) {
    blocks = keep(classes <= 4096 ? 128 : 256);
  } else {
    blocks = keep(block_threads(false) / 2);
    if (blocks < 2) blocks = keep(block_threads(false));
  }
  blocks = device.multiprocessors * std::max<std::int64_t>(1, blocks);
  plan.grid = static_cast<unsigned>(std::min(args.rows, blocks));
  return plan;
}

}  // namespace lrds::cuda
