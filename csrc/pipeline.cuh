// sm_90a: the ring of shared-memory stages between the thread that orders copies and the warps that multiply.
#pragma once

#include "hopper.cuh"

constexpr int kDepth = 64;           // of a step: one panel of columns
constexpr int kTileRows = 128;       // of the left operand: 64 for each of two warpgroups
constexpr int kConsumerWarps = 8;
constexpr int kThreads = 384;        // one warpgroup for copies, two that multiply
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;  // 128 * (40 + 2 * 232) = 64512, of 65536
constexpr int kPanelBytes = 64 * kRowBytes;

// `Cluster` blocks run in step: a stage is free when the consumers of all of them released it, because a copy may go to
// all of them.
template <int Stages, int StageBytes, int Cluster>
struct Ring {
  static constexpr int kSharedBytes = Stages * (StageBytes + 16) + kAlignmentBytes;
  static_assert(kSharedBytes <= 227 * 1024, "more than a block can have");

  unsigned char* data;
  uint64_t* full;
  uint64_t* empty;
  int stage = 0;
  uint32_t phase = 0;

  // By all threads of the cluster.
  __device__ Ring() {
    data = shared_memory();
    full = reinterpret_cast<uint64_t*>(data + Stages * StageBytes);
    empty = full + Stages;
    if (threadIdx.x == 0) {
      for (int i = 0; i < Stages; ++i) {
        barrier_init(&full[i], 1);
        barrier_init(&empty[i], Cluster * kConsumerWarps);
      }
      barrier_init_fence();
    }
    sync();
  }

  // All threads, at both ends of the kernel: nobody may write to a block that has not begun or has ended.
  __device__ void sync() {
    if constexpr (Cluster > 1) cluster_sync();
    else __syncthreads();
  }

  // Producer: the next stage, once it is free; `bytes` will be written to it, in all.
  __device__ unsigned char* acquire(int bytes) {
    barrier_wait(&empty[stage], phase ^ 1);
    barrier_arrive_expect(&full[stage], bytes);
    return data + stage * StageBytes;
  }

  // Consumers: the next stage, once it is written.
  __device__ unsigned char* wait() {
    barrier_wait(&full[stage], phase);
    return data + stage * StageBytes;
  }

  // A consumer warp is done with a stage; async_proxy_fence comes first if it loaded from there.
  __device__ void release(int which) {
    __syncwarp();
    const int lane = threadIdx.x % 32;
    if constexpr (Cluster > 1) {
      if (lane < Cluster) barrier_arrive_at(&empty[which], lane);
    } else {
      if (lane == 0) barrier_arrive(&empty[which]);
    }
  }

  __device__ void advance() {
    if (++stage == Stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Consumer warpgroup: `steps` (at least 1) stages of the ring, each with both operands: accumulators = Σ a·b.
// a: this warpgroup's 64 rows, b: N rows, at byte offsets of the stage. Transposed: panels with K as rows, else one panel
// with K as columns. `meanwhile` is called while the last products are under way.
template <class T, int N, bool TransposedA, bool TransposedB, class SomeRing, class Meanwhile>
__device__ __forceinline__ void multiply(float (&accumulators)[N / 2], SomeRing& ring, int steps, int a_offset, int b_offset,
                                         Meanwhile&& meanwhile) {
  constexpr int kAcross = 16 * kRowBytes >> 4, kAlong = 16 * int(sizeof(T)) >> 4;  // 16 deep, in the descriptor's units
  int previous = -1;
  for (int step = 0; step < steps; ++step) {
    const uint32_t stage = shared_address(ring.wait());
    const uint64_t a = descriptor(stage + a_offset, kDepth), b = descriptor(stage + b_offset, kDepth);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < kDepth / 16; ++k)
      wgmma<T, N, TransposedA, TransposedB>(accumulators, a + k * (TransposedA ? kAcross : kAlong),
                                            b + k * (TransposedB ? kAcross : kAlong), step > 0 || k > 0);
    wgmma_commit();
    wgmma_wait<1>();  // so the step before is over, and its stage read
    if (previous >= 0) ring.release(previous);
    previous = ring.stage;
    ring.advance();
  }
  meanwhile();
  wgmma_wait<0>();
  wgmma_results(accumulators);
  ring.release(previous);
}

template <class T, int N, bool TransposedA, bool TransposedB, class SomeRing>
__device__ __forceinline__ void multiply(float (&accumulators)[N / 2], SomeRing& ring, int steps, int a_offset, int b_offset) {
  multiply<T, N, TransposedA, TransposedB>(accumulators, ring, steps, a_offset, b_offset, [] {});
}
