// The instructions of sm_90a that C++ has no name for, one function each: clusters, barriers with a byte count, bulk
// tensor copies, the warpgroup's matrix product. PTX ISA 9.0, sections "mbarrier", "cp.async.bulk.tensor",
// "wgmma.mma_async" and "setmaxnreg". The emulator has a function of the same name for each.
#pragma once

#include "ptx.cuh"

#ifndef DIFFPRUNE_EMULATED

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// All threads of all blocks of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes the barriers that this thread initialised known to the cluster and to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and lets the phase wait for `bytes` more from the copy engine.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives at the same barrier of block `rank` of the cluster: that this thread is done reading. As CUTLASS's ClusterBarrier
// at the default scope, for which reads that are complete need no more: .release.cluster is a fence of all memory first.
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, int rank) {
  asm volatile(
      "{\n\t.reg .b32 remote;\n\t"
      "mapa.shared::cluster.u32 remote, %0, %1;\n\t"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// After this thread's own loads from shared memory, before it says that the copy engine may write there; wgmma's reads
// need none.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Until the phase of this parity is complete. The phase before the first counts as complete, with parity 1.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done)
    asm volatile(
        "{\n\t.reg .pred done;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, done;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
}

// The box of `map` at (column, row, sample) into shared memory, counted by `barrier`; zeros outside the tensor.
__device__ __forceinline__ void tensor_load(void* target, const CUtensorMap* map, uint64_t* barrier, int column, int row,
                                            int sample) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(sample)
      : "memory");
}

// The same into the same place of every block of the cluster in `mask`, counted by each one's barrier.
__device__ __forceinline__ void tensor_load_multicast(void* target, const CUtensorMap* map, uint64_t* barrier, int column,
                                                      int row, int sample, uint16_t mask) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(shared_address(target)),
      "l"(map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(sample), "h"(mask)
      : "memory");
}

template <int Registers>
__device__ __forceinline__ void registers_shrink() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void registers_grow() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// Before the first wgmma, and wherever this thread touched its accumulators.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most `Pending` of this warpgroup's groups are under way.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// After the wait: keeps the compiler from reading the accumulators before it, which nothing else tells it.
template <int Count>
__device__ __forceinline__ void wgmma_results(float (&d)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// %0 ... %127, and the accumulators they stand for.
#define WGMMA_R0 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15" \
  ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31" \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47" \
  ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_R64 \
  ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79" \
  ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define WGMMA_R96 \
  ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111" \
  ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define WGMMA_AND ,
#define WGMMA_D8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_D32(i) WGMMA_D8(i), WGMMA_D8(i + 8), WGMMA_D8(i + 16), WGMMA_D8(i + 24)
#define WGMMA_D64(i) WGMMA_D32(i), WGMMA_D32(i + 32)

// d = a·b (+ d), 64x16 by 16xN, from two tiles in shared memory (`descriptor`); each K-major, or transposed.
template <class T, int N, bool TransposedA, bool TransposedB>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
#define DIFFPRUNE_WGMMA(SHAPE, TYPE, REGISTERS, A, B, P, TA, TB, OUTPUTS)                                     \
  asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" P ", 0;\n\t"                                          \
               "wgmma.mma_async.sync.aligned.m64n" SHAPE "k16.f32." TYPE "." TYPE " {" REGISTERS "}, %" A     \
               ", %" B ", p, 1, 1, %" TA ", %" TB ";\n\t}"                                                    \
               : OUTPUTS                                                                                      \
               : "l"(a), "l"(b), "r"(accumulate), "n"(int(TransposedA)), "n"(int(TransposedB)))
  static_assert(N == 128 || N == 192 || N == 256, "the sizes that are written out here");
  if constexpr (N == 128 && is_half<T>)
    DIFFPRUNE_WGMMA("128", "f16", WGMMA_R0, "64", "65", "66", "67", "68", WGMMA_D64(0));
  else if constexpr (N == 128)
    DIFFPRUNE_WGMMA("128", "bf16", WGMMA_R0, "64", "65", "66", "67", "68", WGMMA_D64(0));
  else if constexpr (N == 192 && is_half<T>)
    DIFFPRUNE_WGMMA("192", "f16", WGMMA_R0 WGMMA_R64, "96", "97", "98", "99", "100", WGMMA_D64(0) WGMMA_AND WGMMA_D32(64));
  else if constexpr (N == 192)
    DIFFPRUNE_WGMMA("192", "bf16", WGMMA_R0 WGMMA_R64, "96", "97", "98", "99", "100", WGMMA_D64(0) WGMMA_AND WGMMA_D32(64));
  else if constexpr (is_half<T>)
    DIFFPRUNE_WGMMA("256", "f16", WGMMA_R0 WGMMA_R64 WGMMA_R96, "128", "129", "130", "131", "132", WGMMA_D64(0) WGMMA_AND WGMMA_D64(64));
  else
    DIFFPRUNE_WGMMA("256", "bf16", WGMMA_R0 WGMMA_R64 WGMMA_R96, "128", "129", "130", "131", "132", WGMMA_D64(0) WGMMA_AND WGMMA_D64(64));
#undef DIFFPRUNE_WGMMA
}
#endif
