// Long rows on sm_90 and later. The blocks of a cluster share a row. Each keeps its slice of
// student and teacher in shared memory between the statistics and the gradient, so that every logit
// is read once. One warp issues bulk copies into a ring of tiles, as far ahead as the ring has
// room, and goes on to the next rows; the other warps compute.
#pragma once

#include "cuda/kd_loss_online.cuh"

namespace lrds::cuda {

// The layout of the kernel's shared memory: the ring, the statistics that warps and blocks exchange
// ("packets"), and barriers. The two sets of packets are used alternately.
template <class S>
struct BulkShared {
  using A = float;
  static constexpr int kWarps = kBulkThreads / kWarpSize;
  using WarpPackets = OnlineStats<A>[kWarps];
  using BlockPackets = OnlineStats<A>[kMaxCluster];

  Vector<S, 16 / sizeof(S)>* ring;
  WarpPackets* warp_packets;    // [2]
  BlockPackets* block_packets;  // [2]
  Barrier* full;                // per tile: the copies have arrived
  Barrier* empty;               // per tile: every warp has read it for the last time
  Barrier* warps_sent;          // [2]: every warp has written its packet
  Barrier* blocks_sent;         // [2]: the packets of the cluster's blocks have arrived
  Barrier* counted;             // every warp has counted its targets
  CountScratch* count_scratch;

  __device__ BulkShared(unsigned char* bytes, int tiles) {
    ring = reinterpret_cast<Vector<S, 16 / sizeof(S)>*>(bytes);
    // NOLINTNEXTLINE(bugprone-implicit-widening-of-multiplication-result): in shared memory
    bytes += tiles * kBulkTileBytes;
    warp_packets = reinterpret_cast<WarpPackets*>(bytes);
    block_packets = reinterpret_cast<BlockPackets*>(warp_packets + 2);
    full = reinterpret_cast<Barrier*>(block_packets + 2);
    empty = full + kMaxBulkTiles;
    warps_sent = empty + kMaxBulkTiles;
    blocks_sent = warps_sent + 2;
    counted = blocks_sent + 2;
    count_scratch = reinterpret_cast<CountScratch*>(counted + 1);
    static_assert(2 * (sizeof(WarpPackets) + sizeof(BlockPackets)) +
                      (2 * kMaxBulkTiles + 5) * sizeof(Barrier) + sizeof(CountScratch) <=
                  kBulkFixedBytes);
  }
};

// A position in the ring and the parity of the current round.
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

// The student, teacher and gradient of a row have one type, and vectors_agree holds. The ring holds
// a whole slice: tiles * kBulkThreads >= ceil(classes / width / cluster). blockDim.x is
// kBulkThreads that compute plus one warp that copies.
template <class S>
__global__ void __launch_bounds__(kBulkThreads + kWarpSize, 1)
    kd_loss_bulk(const Sweep<float> sweep, const int tiles, const int cluster) {
#if defined(LRDS_HAS_CLUSTERS)
  using A = float;
  constexpr int kWidth = 16 / sizeof(S);
  constexpr int kWarps = kBulkThreads / kWarpSize;
  using Vec = Vector<S, kWidth>;
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
      barrier_init(shared.warps_sent + turn, kWarps);
      barrier_init(shared.blocks_sent + turn, 1);
    }
    barrier_init(shared.counted, kWarps);
    barrier_init_fence();
  }
  cluster_sync();

  const std::int64_t begin = blockIdx.x / cluster, step = gridDim.x / cluster;
  const auto student_row = [&](std::int64_t index) {
    return static_cast<const S*>(sweep.student) + index * sweep.student_stride;
  };
  const auto teacher_row = [&](std::int64_t index) {
    return static_cast<const S*>(sweep.teacher) + index * sweep.teacher_stride;
  };
  // This block's slice: the vectors [slice_begin, slice_begin + slice_vectors) of the row.
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

  // Counts while the first tiles are copied. The copying warp does not take part.
  ValidRowCount<A> valid_rows;
  valid_rows.start(sweep, *shared.count_scratch, kBulkThreads, [&] {
    __syncwarp();
    if (lane == 0) barrier_arrive(shared.counted);
    barrier_wait(shared.counted, 0);
  });

  // Merges the statistics of a warp into those of the row in the whole cluster. Packets need no
  // fence: the warps of a block exchange them under a barrier of the block; blocks send them by
  // stores whose bytes the receiver's barrier counts, after the first warp of the receiver has
  // announced them.
  //
  // Two sets of packets are enough. A warp that has finished a merge knows that every warp of every
  // block has sent its packet of this merge, and so has read the packets of the merge before. What
  // it sends for the next merge goes to the other set and overwrites nothing that will still be
  // read. Its bytes cannot count for an earlier phase either: the previous phase of the same set
  // belongs to the merge before the last, which all blocks had finished when they sent the packets
  // of the last one. All blocks agree on whether a row is merged a second time. No block exits
  // before it has received the packets of its last merge, and none is sent to it afterwards.
  RingPlace set;
  const auto merge_cluster = [&](OnlineStats<A> stats) {
    OnlineStats<A>* const of_warps = shared.warp_packets[set.tile];
    OnlineStats<A>* const of_blocks = shared.block_packets[set.tile];
    const auto merge_warps = [&] {
      barrier_wait(shared.warps_sent + set.tile, set.parity);
      const int from = lane % 16;
      stats = from < kWarps ? of_warps[from] : empty_online_stats<A>();
      merge_lanes<16>(sweep, stats);
    };
    static_assert(kWarps <= 16 && kMaxCluster == 8);
    __syncwarp();
    if (lane == 0) {
      of_warps[warp] = stats;
      barrier_arrive(shared.warps_sent + set.tile);
    }
    if (cluster == 1) {
      merge_warps();
    } else {
      if (warp == 0) {
        merge_warps();
        if (lane == 0) {
          barrier_arrive_announcing(shared.blocks_sent + set.tile,
                                    static_cast<unsigned>(cluster * sizeof stats));
        }
        if (lane < cluster) {
          send_to_block(of_blocks + rank, static_cast<unsigned>(lane), stats,
                        shared.blocks_sent + set.tile);
        }
      }
      barrier_wait(shared.blocks_sent + set.tile, set.parity);
      const int from = lane % kMaxCluster;
      stats = from < cluster ? of_blocks[from] : empty_online_stats<A>();
      merge_lanes<kMaxCluster>(sweep, stats);
    }
    set.advance(2);
    return stats;
  };

  RingPlace place;
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
    // The first block handles the elements outside the vectors.
    const bool has_edge = rank == 0 && thread < layout.edges && reads_z;
    A z_edge = A(0), v_edge = A(0), z_y = A(0), v_y = A(0), sum_vr = A(0);
    if (has_edge) {
      z_edge = widen<A>(z_row[layout.edge(thread)]);
      if (reads_v) v_edge = widen<A>(v_row[layout.edge(thread)]);
    }
    if (reads_z) {
      z_y = widen<A>(z_row[row.y]);
      if (reads_v) v_y = widen<A>(v_row[row.y]);
    }
    // This thread's vectors of a tile. A teacher that is not read is 0.
    const auto fetch = [&](auto case_of, int tile, Vec& z, Vec& v) {
      z = student_tile(tile)[thread];
      v = Vec{};
      if (decltype(case_of)::value == kHuge ? reads_v : kHasTeacher<decltype(case_of)::value>) {
        v = teacher_tile(tile)[thread];
      }
    };
    const auto release = [&](int tile) {
      __syncwarp();
      if (lane == 0) barrier_arrive(shared.empty + tile);
    };

    OnlineStats<A> stats = empty_online_stats<A>();
    const RingPlace row_place = place;
    // Whether the row is read only once.
    const bool once = sweep.gradient == nullptr && !(reads_v && sweep.exp_r_scale != A(0));
    if (reads_z) {
      with_case<true>(sweep, reads_v, [&](auto case_of) {
        constexpr int kCase = decltype(case_of)::value;
        ThreadStats<A> thread_stats = empty_thread_stats<A>();
        if (has_edge) add_edge<kCase>(sweep, z_edge, v_edge, thread_stats);
        for (int done = 0; done < slice_vectors; done += kBulkThreads) {
          barrier_wait(shared.full + place.tile, place.parity);
          if (done + thread < slice_vectors) {
            const auto fetch_next = [&](int c, Vec& z, Vec& v) {
              fetch(case_of, place.tile + c, z, v);
            };
            add_vectors<kCase, 1, Vec, Vec>(sweep, 1, fetch_next, thread_stats);
          }
          if (once) release(place.tile);
          place.advance(tiles);
        }
        stats = warp_stats<kCase>(sweep, thread_stats);
      });
      add_lanes(sweep, stats);
      stats = merge_cluster(stats);
      if (reads_v && sweep.exp_r_scale != A(0)) {
        const bool wrong = needs_sum_vr(sweep.params, v_y, stats.row.max_v);
        A part = has_edge ? revision_part(sweep, stats.row, Vector<A, 1>{{v_edge}}) : A(0);
        RingPlace again = row_place;
        for (int done = 0; done < slice_vectors; done += kBulkThreads) {
          if (wrong && done + thread < slice_vectors) {
            part += revision_part(sweep, stats.row, teacher_tile(again.tile)[thread]);
          }
          if (sweep.gradient == nullptr) release(again.tile);
          again.advance(tiles);
        }
        if (wrong) sum_vr = merge_cluster(revision_stats(stats.row, part)).row.sum_vt;
      }
    }

    const RowResult<A> result =
        close_row(sweep, row, stats.row, z_y, v_y, sum_vr, scale.get(sweep, valid_rows), index);
    if (rank == 0 && thread == 0) write_row(sweep, row, result, index);
    const int y = row.y;
    row = next;
    if (sweep.gradient == nullptr) continue;

    S* const gradient = static_cast<S*>(sweep.gradient) + index * classes;
    Vec* const out = reinterpret_cast<Vec*>(gradient + layout.head) + slice_begin;
    const auto put = [&](int n, const Vec& g) {
      if (n < slice_vectors) store_vector(reinterpret_cast<S*>(out + n), g);
    };
    if (!reads_z) {
      // Zeros, or NaN for an invalid row.
      Vec g;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) g.element[j] = narrow<S>(A(0) - result.smoothing);
      for (int n = thread; n < slice_vectors; n += kBulkThreads) put(n, g);
      if (rank == 0 && thread < layout.edges) gradient[layout.edge(thread)] = g.element[0];
      continue;
    }
    with_gradient_case<true>(sweep, reads_v, stats.row, [&](auto case_of) {
      constexpr int kCase = decltype(case_of)::value;
      const ElementGradient<A> of = element_gradient<kCase>(sweep, stats.row, result);
      RingPlace again = row_place;
      for (int done = 0; done < slice_vectors; done += kBulkThreads) {
        // A tile holds other data past the slice; put() does not store it.
        Vec z, v;
        fetch(case_of, again.tile, z, v);
        release(again.tile);
        put(done + thread, gradient_of_vector<kCase>(sweep, of, z, v));
        again.advance(tiles);
      }
      if (has_edge) {
        gradient[layout.edge(thread)] = narrow<S>(gradient_at<kCase>(sweep, of, z_edge, v_edge));
      }
    });
    // The thread that stored this element stores it again, so the two stores are in program order.
    const int vector = y < layout.head ? -1 : (y - layout.head) / kWidth;
    const bool is_edge = vector < 0 || vector >= layout.vectors;
    const int n = vector - slice_begin;
    if (is_edge ? has_edge && layout.edge(thread) == y
                : n >= 0 && n < slice_vectors && n % kBulkThreads == thread) {
      gradient[y] = narrow<S>(gradient_at_target(sweep, result, z_y - anchor(stats.row.max_z),
                                                 v_y - anchor(stats.row.max_v)));
    }
  }
#endif
}

}  // namespace lrds::cuda
