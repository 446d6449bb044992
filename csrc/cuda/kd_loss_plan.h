// Chooses the kernel and the grid of a call from its shapes, types, addresses and the device's
// properties. Plain arithmetic without CUDA calls.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/kd_loss.h"
#include "cuda/launch.h"

namespace lrds::cuda {

// How a kernel gets the number of valid rows, for the denominator of the gradient.
enum class ValidRows : std::int32_t {
  kNotNeeded = 0,     // no denominator: a sum, or no gradient
  kFromArgument = 1,  // from num_valid
  kPerBlock = 2,      // every block counts all targets
  kShared = 3,        // the blocks count together, through one zeroed word
};

// The most rows for which a block counts all targets faster than a memset is launched.
constexpr std::int64_t kPerBlockCountRows = 4096;

enum class Path : std::int32_t {
  kWarpShort = 0,        // 1..16 lanes per row, 8 elements per lane, element by element
  kWarpShortVector = 1,  // the same with 16-byte vectors
  // the same, element by element, from tiles that are copied to shared memory as they are
  kFlat = 2,
  kWarpVector = 3,    // 16 or 32 lanes per row, 32 elements per lane, 16-byte vectors
  kWarpElement = 4,   // 16 or 32 lanes per row, 16 elements per lane; any types and alignments
  kBlockVector = 5,   // a block per row, shared memory and streaming, 16-byte vectors
  kBlockElement = 6,  // the same, element by element; any types, accumulation in double
  kBulk = 7           // a cluster of blocks per row, bulk copies, shared memory
};

constexpr int kMaxThreads = 1024;
constexpr int kWarpThreads = 256;  // of a block whose warps, or groups of lanes, have a row each
constexpr int kShortElements = 8;
constexpr int kLongElements = 32;
constexpr int kElementElements = 16;
// The most classes: kernels index them in 32 bits, and a grid of vectors may reach past the end.
constexpr std::int64_t kMaxClasses = std::int64_t{1} << 30;
// Blocks of kWarpThreads for which a multiprocessor has registers (docs/kernels.md).
constexpr int kWarpBlocksPerMultiprocessor = 2;
constexpr int kFlatBlocksPerMultiprocessor = 3;
// Elements of a tile in shared memory, with room for its offset from a 16-byte boundary.
template <class S>
constexpr int kFlatStageElements = kWarpThreads * kShortElements + 16 / static_cast<int>(sizeof(S));

// For kernels with a block per row: the most threads per block and per multiprocessor.
constexpr int block_threads(bool wide) { return wide ? 256 : 640; }
constexpr int block_threads_per_multiprocessor(bool wide) { return wide ? 512 : 640; }

// Static shared memory of the block kernel, rounded up.
constexpr int kBlockStaticBytes = 2560;

// For the bulk kernel: threads that compute, each with one vector of student and teacher per tile;
// the most blocks per row (8 are portable); and shared memory in addition to the ring of tiles.
constexpr int kBulkThreads = 480;
constexpr int kMaxCluster = 8;
constexpr int kBulkTileBytes = 2 * 16 * kBulkThreads;
constexpr int kMaxBulkTiles = 16;
constexpr int kBulkFixedBytes = 2048;

struct Plan {
  Path path;
  unsigned grid;
  unsigned threads;
  int lanes;                 // per row, warp paths
  int resident;              // vectors per thread in shared memory, block paths
  int tiles;                 // of the ring, bulk path
  int cluster;               // blocks per row, bulk path
  std::size_t shared_bytes;  // dynamic
};

// --- The dispatch table ---

// What a path requires of the operands.
enum Operands : unsigned {
  kAnything = 0,
  kOneType = 1,     // student, teacher and gradient have one type
  kAlike = 3,       // and their rows have 16-byte boundaries at the same classes
  kWhole = 7,       // and every row consists of whole 16-byte vectors
  kBackToBack = 11  // kAlike, and no gap between rows
};

// The first rule that fits is used: the device is at least `architecture`, the operands fulfil what
// the path requires, and the call has at most the number of classes given for its types.
// NOLINTNEXTLINE(clang-analyzer-optin.performance.Padding): the order of the table's columns
struct Rule {
  Path path;
  int architecture;
  Operands operands;
  std::int64_t float32_classes;  // for float32 students, accumulation in float
  std::int64_t bits16_classes;   // for 16-bit students, accumulation in float
  std::int64_t float64_classes;  // for accumulation in double
  unsigned threads;              // per block
};

constexpr std::int64_t kNone = 0, kAll = kMaxClasses;
// clang-format off
constexpr Rule kRules[] = {
    // path                 sm_  operands     float32 16-bit float64 threads
    {Path::kWarpShortVector, 0, kWhole,        128,   128, kNone, kWarpThreads},
    {Path::kFlat,            0, kBackToBack,   128,   128, kNone, kWarpThreads},
    {Path::kWarpShort,       0, kOneType,      128,   128, kNone, kWarpThreads},
    {Path::kWarpVector,      0, kAlike,       1024,  1024, kNone, kWarpThreads},
    {Path::kWarpElement,     0, kAnything,     512,   512, kNone, kWarpThreads},
    {Path::kBlockVector,     0, kAlike,       4096,  4096, kNone, 128},
    {Path::kBlockVector,     0, kAlike,       8192,  8192, kNone, 192},
    {Path::kBlockVector,     0, kAlike,      kNone, 16384, kNone, 320},
    {Path::kBulk,           90, kAlike,       kAll,  kAll, kNone, kBulkThreads + 32},
    {Path::kBlockVector,     0, kAlike,       kAll,  kAll, kNone, 320},
    {Path::kBlockElement,    0, kAnything,    4096,  4096, kNone, 128},
    {Path::kBlockElement,    0, kAnything,    8192,  8192, kNone, 192},
    {Path::kBlockElement,    0, kAnything,    kAll,  kAll, kNone, 320},
    {Path::kBlockElement,    0, kAnything,   kNone, kNone,  1024, 64},
    {Path::kBlockElement,    0, kAnything,   kNone, kNone,  4096, 128},
    {Path::kBlockElement,    0, kAnything,   kNone, kNone,  kAll, 256},
};
// clang-format on

namespace detail {

inline std::int64_t size_of(DType type) {
  return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2;
}

// Whether row r of student, teacher and gradient has its 16-byte boundaries at the same class, for
// every r.
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
  if (!averaged || args.gradient == nullptr) return ValidRows::kNotNeeded;
  if (args.num_valid != nullptr) return ValidRows::kFromArgument;
  if (args.counts == nullptr || args.rows <= kPerBlockCountRows ||
      args.rows >= (std::int64_t{1} << 31)) {
    return ValidRows::kPerBlock;
  }
  return ValidRows::kShared;
}

namespace detail {

inline unsigned operands_of(const KdLossArgs& args) {
  unsigned operands = kAnything;
  if (args.teacher_type == args.student_type || args.teacher_rows == 0) operands |= kOneType;
  if (!vectors_agree(args)) return operands;
  operands |= kAlike;
  const std::int64_t width = 16 / size_of(args.student_type);
  const auto whole = [&](std::int64_t stride) { return args.rows <= 1 || stride % width == 0; };
  if (reinterpret_cast<std::uintptr_t>(args.student) % 16 == 0 && args.classes % width == 0 &&
      whole(args.student_stride) && (args.teacher_rows == 0 || whole(args.teacher_stride))) {
    operands |= kWhole;
  }
  const auto flat = [&](std::int64_t stride) { return args.rows <= 1 || stride == args.classes; };
  if (flat(args.student_stride) && (args.teacher_rows == 0 || flat(args.teacher_stride))) {
    operands |= kBackToBack;
  }
  return operands;
}

// Rows in the registers of 1 to 32 lanes.
inline void plan_warps(const KdLossArgs& args, const DeviceFacts& device, Plan& plan) {
  const std::int64_t classes = args.classes;
  switch (plan.path) {
    case Path::kWarpVector:
      plan.lanes = classes <= 16 * kLongElements ? 16 : 32;
      break;
    case Path::kWarpElement:
      plan.lanes = classes <= 16 * kElementElements ? 16 : 32;
      break;
    default:
      plan.lanes = power_of_two_at_least(ceil_div(classes, kShortElements));
  }
  // Small batches get small blocks, so that every multiprocessor has work.
  const std::int64_t threads = args.rows * plan.lanes;
  while (plan.threads > 32 && ceil_div(threads, plan.threads) < device.multiprocessors) {
    plan.threads /= 2;
  }
  const bool flat = plan.path == Path::kFlat;
  const int blocks = flat ? kFlatBlocksPerMultiprocessor : kWarpBlocksPerMultiprocessor;
  const std::int64_t most =
      std::int64_t{device.multiprocessors} * blocks * (kWarpThreads / plan.threads);
  plan.grid = static_cast<unsigned>(std::min(ceil_div(threads, plan.threads), most));
  if (flat) {
    const std::int64_t size = size_of(args.student_type);
    plan.shared_bytes = static_cast<std::size_t>(4 * (kWarpThreads * kShortElements * size + 16));
  }
}

// A block per row, with as much of the row in shared memory as fits.
inline void plan_blocks(const KdLossArgs& args, const DeviceFacts& device, Plan& plan) {
  const bool vectors = plan.path == Path::kBlockVector;
  const bool wide = args.accumulate == DType::kFloat64;
  const std::int64_t classes = args.classes;
  const std::int64_t width = vectors ? 16 / size_of(args.student_type) : 1;
  const std::int64_t student_size = size_of(args.student_type);
  const std::int64_t teacher_size = args.teacher_rows == 0 ? 0
                                    : vectors              ? student_size
                                    : wide                 ? 8
                                                           : 4;
  const std::int64_t most_shared =
      std::max<std::int64_t>(0, device.shared_per_block - kBlockStaticBytes);
  std::int64_t reread = 0;  // bytes of a row that do not stay in shared memory
  // The number of blocks of `threads` threads that a multiprocessor holds.
  const auto fit = [&](std::int64_t threads) {
    const std::int64_t slot = threads * width * (student_size + teacher_size);
    const std::int64_t needed = ceil_div(classes / width, threads);
    const std::int64_t resident = std::min(needed, most_shared / slot);
    plan.threads = static_cast<unsigned>(threads);
    plan.resident = static_cast<int>(resident);
    plan.shared_bytes = static_cast<std::size_t>(resident * slot);
    reread = (needed - resident) * slot;
    const std::int64_t block_bytes = resident * slot + kBlockStaticBytes + kSharedPerBlockReserved;
    return std::min(device.shared_per_multiprocessor / block_bytes,
                    block_threads_per_multiprocessor(wide) / threads);
  };
  std::int64_t blocks = fit(plan.threads);
  // At least two blocks per multiprocessor, or one with all its threads.
  if (plan.threads == 320 && blocks < 2) blocks = fit(block_threads(false));
  blocks = device.multiprocessors * std::max<std::int64_t>(1, blocks);
  if (reread > 0) {
    // The rows' second reads should hit L2. At least half of the multiprocessors are used in any
    // case.
    const std::int64_t in_l2 = std::int64_t{device.l2_bytes} / 10 * 7 / reread;
    blocks = std::min(blocks, std::max<std::int64_t>(in_l2, (device.multiprocessors + 1) / 2));
  }
  plan.grid = static_cast<unsigned>(std::min(args.rows, blocks));
}

// A cluster per row, with the row in shared memory; false if the row does not fit.
inline bool plan_bulk(const KdLossArgs& args, const DeviceFacts& device, Plan& plan) {
  plan.tiles =
      std::min(kMaxBulkTiles, (device.shared_per_block - kBulkFixedBytes) / kBulkTileBytes);
  const std::int64_t vectors = args.classes * size_of(args.student_type) / 16;
  const auto needed = [&](int cluster) {
    return ceil_div(ceil_div(vectors, cluster), kBulkThreads);
  };
  // The fewest blocks that leave room for half of the next row. Few rows do not get more: the order
  // of a row's sums must not depend on the other rows.
  plan.cluster = 1;
  while (plan.cluster < kMaxCluster && 3 * needed(plan.cluster) > 2 * std::int64_t{plan.tiles}) {
    plan.cluster *= 2;
  }
  if (needed(plan.cluster) > plan.tiles) return false;
  const std::int64_t clusters = std::max(1, device.multiprocessors / plan.cluster);
  plan.grid = static_cast<unsigned>(plan.cluster * std::min(args.rows, clusters));
  plan.shared_bytes = static_cast<std::size_t>(plan.tiles) * kBulkTileBytes + kBulkFixedBytes;
  return true;
}

}  // namespace detail

inline Plan plan_rows(const KdLossArgs& args, const DeviceFacts& device) {
  const unsigned operands = detail::operands_of(args);
  for (const Rule& rule : kRules) {
    const std::int64_t most = args.accumulate == DType::kFloat64     ? rule.float64_classes
                              : args.student_type == DType::kFloat32 ? rule.float32_classes
                                                                     : rule.bits16_classes;
    if (device.architecture < rule.architecture || args.classes > most ||
        (operands & rule.operands) != rule.operands) {
      continue;
    }
    Plan plan{};
    plan.path = rule.path;
    plan.threads = rule.threads;
    switch (rule.path) {
      case Path::kBulk:
        if (!detail::plan_bulk(args, device, plan)) continue;
        break;
      case Path::kBlockVector:
      case Path::kBlockElement:
        detail::plan_blocks(args, device, plan);
        break;
      default:
        detail::plan_warps(args, device, plan);
    }
    return plan;
  }
  return Plan{};  // the last rule fits every call
}

}  // namespace lrds::cuda
