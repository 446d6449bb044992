// Long rows on sm_90 and later. The blocks of a cluster share a row: each keeps its slice of
// student and teacher in shared memory between statistics and gradient, so that every logit is read
// once. One warp does nothing but order bulk copies into a ring of tiles, as far ahead as the ring
// is long, over the ends of rows; the others compute.
#pragma once

#include "cuda/kd_loss_online.cuh"

namespace lrds::cuda {

// How the kernel's shared memory is laid out: the ring, what the warps tell each other, barriers.
template <class S>
struct BulkShared {
  using A = float;
  using Packets = OnlineStats<A>[kMaxCluster * kBulkThreads / kWarpSize];

  Vector<S, 16 / sizeof(S)>* ring;
  // Two sets in turn: a block may be one row ahead of the slowest reader, never two.
  Packets* packets;
  Barrier* full;    // per tile: the copies have arrived
  Barrier* empty;   // per tile: every warp has read it for the last time
  Barrier* merged;  // per set of packets: every warp of the cluster has sent its own
  CountScratch* count_scratch;

  __device__ BulkShared(unsigned char* bytes, int tiles) {
    ring = reinterpret_cast<Vector<S, 16 / sizeof(S)>*>(bytes);
    bytes += tiles * kBulkTileBytes;
    packets = reinterpret_cast<Packets*>(bytes);
    bytes += 2 * sizeof(Packets);
    full = reinterpret_cast<Barrier*>(bytes);
    empty = full + kMaxBulkTiles;
    merged = empty + kMaxBulkTiles;
    count_scratch = reinterpret_cast<CountScratch*>(merged + 2);
    static_assert(2 * sizeof(Packets) + (2 * kMaxBulkTiles + 2) * sizeof(Barrier) +
                      sizeof(CountScratch) <=
                  kBulkFixedBytes);
  }
};

// A place in the ring and the parity of its current round.
struct RingPlace {
  int tile = 0;
  unsigned parity = 0;

  __device__ void advance(int tiles) {
    if (++tile == tiles) {
      tile = 0;
      parity ^= 1;
    }
  }
};

// A row's student, teacher and gradient have one type and vectors_agree. A ring of `tiles` holds a
// slice: tiles * kBulkThreads >= ceil(classes / width / cluster). blockDim.x is kBulkThreads that
// compute and the warp that copies.
template <class S>
__global__ void __launch_bounds__(kBulkThreads + kWarpSize, 1)
    kd_loss_bulk(const Sweep<float> sweep, const int tiles, const int cluster) {
#if defined(LRDS_HAS_CLUSTERS)
  using A = float;
  constexpr int kWidth = 16 / sizeof(S);
  constexpr int kWarps = kBulkThreads / kWarpSize;
  using Vec = Vector<S, kWidth>;
  const A infinity = std::numeric_limits<A>::infinity();
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const int rank = static_cast<int>(cluster_rank());
  const int classes = sweep.classes;
  const BulkShared<S> shared(dynamic_shared(), tiles);

  if (thread == 0) {
    for (int t = 0; t < tiles; ++t) {
      barrier_init(shared.full + t, 1);
      barrier_init(shared.empty + t, kWarps);
    }
    for (int turn = 0; turn < 2; ++turn) {
      barrier_init(shared.merged + turn, static_cast<unsigned>(cluster * kWarps));
    }
    barrier_init_fence();
  }
  ValidRowCount<A> valid_rows;
  valid_rows.start(sweep, *shared.count_scratch);
  cluster_sync();

  const std::int64_t begin = blockIdx.x / cluster, step = gridDim.x / cluster;
  const auto student_row = [&](std::int64_t index) {
    return static_cast<const S*>(sweep.student) + index * sweep.student_stride;
  };
  const auto teacher_row = [&](std::int64_t index) {
    return static_cast<const S*>(sweep.teacher) + index * sweep.teacher_stride;
  };
  // This block's slice: vectors [slice_begin, slice_begin + slice_vectors) of the row.
  const auto slice_of = [&](const Layout<S, kWidth>& layout, int* slice_begin, int* slice_vectors) {
    const int each = (layout.vectors + cluster - 1) / cluster;
    *slice_begin = min(rank * each, layout.vectors);
    *slice_vectors = min(each, layout.vectors - *slice_begin);
  };
  const auto student_tile = [&](int tile) { return shared.ring + 2 * tile * kBulkThreads; };
  const auto teacher_tile = [&](int tile) { return student_tile(tile) + kBulkThreads; };

  if (warp == kWarps) {
    if (lane != 0) return;
    RingPlace place;
    bool first_round = true;
    for (std::int64_t index = begin; index < sweep.rows; index += step) {
      const Row<A> row = open_row(sweep, index);
      if (!row.reads_student(sweep)) continue;
      const bool reads_v = row.reads_teacher(sweep);
      const S* const z_row = student_row(index);
      const S* const v_row = teacher_row(reads_v ? index : 0);
      const Layout<S, kWidth> layout(z_row, classes);
      int slice_begin, slice_vectors;
      slice_of(layout, &slice_begin, &slice_vectors);
      for (int done = 0; done < slice_vectors; done += kBulkThreads) {
        if (!first_round) barrier_wait(shared.empty + place.tile, place.parity ^ 1);
        const int vectors = min(kBulkThreads, slice_vectors - done);
        const unsigned bytes = static_cast<unsigned>(vectors * sizeof(Vec));
        const int k = layout.head + (slice_begin + done) * kWidth;
        Barrier* const full = shared.full + place.tile;
        barrier_arrive_announcing(full, reads_v ? 2 * bytes : bytes);
        bulk_copy(student_tile(place.tile), z_row + k, bytes, full);
        if (reads_v) bulk_copy(teacher_tile(place.tile), v_row + k, bytes, full);
        place.advance(tiles);
        if (place.tile == 0) first_round = false;
      }
    }
    return;
  }

  RingPlace place;
  RingPlace set;  // of packets and their barrier
  GradientScale<A> scale(sweep);
  Row<A> row = open_row(sweep, begin);
  for (std::int64_t index = begin; index < sweep.rows; index += step) {
    const bool reads_z = row.reads_student(sweep);
    const bool reads_v = row.reads_teacher(sweep);
    const S* const z_row = student_row(index);
    const S* const v_row = teacher_row(reads_v ? index : 0);
    const Layout<S, kWidth> layout(z_row, classes);
    int slice_begin, slice_vectors;
    slice_of(layout, &slice_begin, &slice_vectors);
    const Row<A> next = open_row(sweep, index + step);
    // The elements outside the vectors are the first block's.
    const bool has_edge = rank == 0 && thread < layout.edges && reads_z;
    A z_edge = -infinity, v_edge = -infinity, z_y = A(0), v_y = A(0);
    if (has_edge) {
      z_edge = widen<A>(z_row[layout.edge(thread)]);
      if (reads_v) v_edge = widen<A>(v_row[layout.edge(thread)]);
    }
    if (reads_z) {
      z_y = widen<A>(z_row[row.y]);
      if (reads_v) v_y = widen<A>(v_row[row.y]);
    }
    // A teacher that is not read counts as 0, as in the gradient.
    const auto fetch = [&](int tile, Vec& z, Vec& v) {
      z = student_tile(tile)[thread];
      if (reads_v) {
        v = teacher_tile(tile)[thread];
      } else {
#pragma unroll
        for (int j = 0; j < kWidth; ++j) v.element[j] = narrow<S>(A(0));
      }
    };
    const auto release = [&](int tile) {
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.empty + tile);
    };

    OnlineStats<A> stats = empty_online_stats<A>();
    const RingPlace row_place = place;
    if (reads_z) {
      with_squarings(sweep, [&](auto squarings) {
        constexpr int kSquarings = decltype(squarings)::value;
        if (has_edge) begin_with<kSquarings>(sweep, reads_v, z_edge, v_edge, stats);
        for (int done = 0; done < slice_vectors; done += kBulkThreads) {
          barrier_wait(shared.full + place.tile, place.parity);
          if (done + thread < slice_vectors) {
            Vec z[1], v[1];
            fetch(place.tile, z[0], v[0]);
            add_vectors<kSquarings>(sweep, reads_v, z, v, 1, stats);
          }
          if (sweep.gradient == nullptr) release(place.tile);
          place.advance(tiles);
        }
      });
      warp_merge(sweep, stats);
      // Two barriers in turn and __syncwarp: whoever has seen this warp's packet of a row knows
      // that all blocks have those of the row before, so no arrival is taken for an earlier one.
      OnlineStats<A>* const packets = shared.packets[set.tile];
      __syncwarp();
      if (lane < cluster) {
        const auto to = static_cast<unsigned>(lane);
        store_in_block(packets + rank * kWarps + warp, to, stats);
        barrier_arrive_in_block(shared.merged + set.tile, to);
      }
      barrier_wait_for_cluster(shared.merged + set.tile, set.parity);
      set.advance(2);
      stats = lane < cluster * kWarps ? packets[lane] : empty_online_stats<A>();
      for (int p = lane + kWarpSize; p < cluster * kWarps; p += kWarpSize) {
        merge(sweep, packets[p], stats);
      }
      warp_merge(sweep, stats);
    }

    const RowResult<A> result =
        close_row(sweep, row, stats.row, z_y, v_y, scale.get(sweep, valid_rows), index);
    if (rank == 0 && thread == 0) write_row(sweep, row, result, index);
    const int y = row.y;
    row = next;
    if (sweep.gradient == nullptr) continue;

    S* const gradient = static_cast<S*>(sweep.gradient) + index * classes;
    const auto put = [&](int n, const A(&g)[kWidth]) {
      const int k = layout.head + (slice_begin + n) * kWidth;
      store_vector(gradient + k, narrow_vector<S>(g));
    };
    if (!reads_z) {
      // Zeros, or NaN for a bad row.
      A g[kWidth];
#pragma unroll
      for (int j = 0; j < kWidth; ++j) g[j] = A(0) - result.smoothing;
      for (int n = thread; n < slice_vectors; n += kBulkThreads) put(n, g);
      if (rank == 0 && thread < layout.edges) gradient[layout.edge(thread)] = narrow<S>(g[0]);
      continue;
    }
    const A shift_z = anchor(stats.row.max_z), shift_v = anchor(stats.row.max_v);
    with_squarings(sweep, [&](auto squarings) {
      constexpr int kSquarings = decltype(squarings)::value;
      const auto gradient_of = [&](A z_k, A v_k) {
        return online_gradient<kSquarings>(sweep, result, reads_v, z_k, v_k, shift_z, shift_v);
      };
      RingPlace again = row_place;
      for (int done = 0; done < slice_vectors; done += kBulkThreads) {
        const int n = done + thread;
        Vec z, v;
        if (n < slice_vectors) fetch(again.tile, z, v);
        release(again.tile);
        if (n < slice_vectors) {
          A g[kWidth];
#pragma unroll
          for (int j = 0; j < kWidth; ++j) {
            g[j] = gradient_of(widen<A>(z.element[j]), widen<A>(v.element[j]));
          }
          put(n, g);
        }
        again.advance(tiles);
      }
      if (has_edge) gradient[layout.edge(thread)] = narrow<S>(gradient_of(z_edge, v_edge));
    });
    // The thread that stored this element stores it again, so the order is the program's.
    const int vector = y < layout.head ? -1 : (y - layout.head) / kWidth;
    const bool is_edge = vector < 0 || vector >= layout.vectors;
    const int n = vector - slice_begin;
    if (is_edge ? has_edge && layout.edge(thread) == y
                : n >= 0 && n < slice_vectors && n % kBulkThreads == thread) {
      gradient[y] = narrow<S>(gradient_at_target(sweep, result, z_y - shift_z, v_y - shift_v));
    }
  }
#endif
}

}  // namespace lrds::cuda
