// Runs the kernels of csrc/ on the CPU, so that tests can check their values and their synchronisation without a GPU.
//
// Threads are coroutines. The functions of ptx.cuh and hopper.cuh do here what the PTX ISA says of their instructions, from
// the instructions' own arguments: matrix descriptors, swizzled addresses, fragments, barrier phases and byte counts. What
// is asynchronous there is late here: a cp.async or wgmma happens at the wait that has to see it, a bulk copy at a random
// time, threads run in a random order. A forgotten wait, a stage released too early or a wrong phase gives wrong numbers
// or a reported deadlock. Not modelled: memory ordering (fences have no effect) and time.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>
#include <vector_functions.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emulator::self->thread)
#define blockIdx (emulator::self->block->index)
#define gridDim (emulator::self->block->grid)

namespace emulator {

constexpr int kSharedBytes = 228 * 1024;
constexpr int kAligned = 1024;  // bytes that shared_memory() of a GPU may skip

struct Gathering {  // of threads that wait for each other
  int arrived = 0, generation = 0, members = 0;
};

struct Block {
  uint3 index;
  dim3 grid;
  int rank, shared_bytes;
  unsigned char* shared;  // a multiple of 1024
  std::vector<Block*>* cluster;
  Gathering threads, *cluster_threads;
  std::vector<Gathering> warps;
  std::vector<std::array<unsigned char, 2 * 32 * 32>> exchange;  // per warp, for two calls one after the other
};

struct Thread {
  uint3 thread;
  Block* block = nullptr;
  ucontext_t context;
  bool done = false, straggler = false;  // a straggler falls behind wherever nothing holds the others back
  int exchanges = 0;
  const Gathering* gathering = nullptr;  // waits for the end of its generation
  int generation = 0;
  std::function<bool()> ready;           // or for this
  const char* waits_for = "";
  std::vector<std::function<void()>> open_group;                // of cp.async
  std::deque<std::vector<std::function<void()>>> copy_groups;
  std::vector<std::function<void()>> open_products;             // of wgmma
  std::deque<std::vector<std::function<void()>>> product_groups;
};

extern Thread* self;
extern std::vector<std::function<void()>> bulk_copies;  // under way

void run(dim3 grid, int threads, int shared_bytes, int cluster, const std::function<void()>& kernel);
void wait_until(const char* what, std::function<bool()> ready);
void gather(const char* what, Gathering& gathering);
void fail(const std::string& message);

template <class... Parameters, class... Arguments>
void launch(const char*, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, int cluster, cudaStream_t,
            Arguments... arguments) {
  run(grid, threads, shared_bytes, cluster, [=] { kernel(Parameters(arguments)...); });
}

inline Gathering& warp_gathering() { return self->block->warps[self->thread.x / 32]; }

// Every lane gives a value and sees those of all lanes of its warp.
template <class Value>
const Value* exchange(const Value& value) {
  static_assert(sizeof(Value) <= 32);
  unsigned char* buffer = self->block->exchange[self->thread.x / 32].data() + self->exchanges++ % 2 * 32 * 32;
  auto* values = reinterpret_cast<Value*>(buffer);
  values[self->thread.x % 32] = value;
  gather("a warp", warp_gathering());
  return values;
}

float half_value(uint16_t bits);      // by table
float bfloat16_value(uint16_t bits);
template <class T>
float number(uint16_t bits) {
  return std::is_same_v<T, __half> ? half_value(bits) : bfloat16_value(bits);
}

void wgmma(float* d, uint64_t a, uint64_t b, bool accumulate, int n, bool a_transposed, bool b_transposed,
           float (*number)(uint16_t));
void drain(std::deque<std::vector<std::function<void()>>>& groups, size_t left);
void count_bytes(Block* block, uint32_t barrier, int bytes);  // arrived, at an mbarrier
void bulk_load(Block* target, uint32_t offset, const CUtensorMap* map, uint32_t barrier, int column, int row, int sample);

}  // namespace emulator

// ---- CUDA C++ ----

inline unsigned char* shared_memory() { return emulator::self->block->shared; }
inline void __syncthreads() { emulator::gather("__syncthreads", emulator::self->block->threads); }
inline void __syncwarp() { emulator::gather("__syncwarp", emulator::warp_gathering()); }
template <class Value>
Value __shfl_xor_sync(unsigned, Value value, int mask) {
  return emulator::exchange(value)[emulator::self->thread.x % 32 ^ mask];
}
inline int atomicAdd(int* target, int value) { return (*target += value) - value; }
inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }
inline int __float_as_int(float value) { return int(__float_as_uint(value)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }
template <class Value>
void __stwb(Value* target, Value value) { *target = value; }
inline int min(int a, int b) { return a < b ? a : b; }

// ---- ptx.cuh ----

inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - emulator::self->block->shared;
  if (offset < 0 || offset >= emulator::self->block->shared_bytes) emulator::fail("address outside of shared memory");
  return uint32_t(offset);
}

inline void copy_async(void* target, const void* source, bool valid) {
  if (shared_address(target) % 16 || reinterpret_cast<uintptr_t>(source) % 16) emulator::fail("cp.async: misaligned");
  emulator::self->open_group.push_back([=] {
    if (valid) std::memcpy(target, source, 16);
    else std::memset(target, 0, 16);
  });
}
inline void copy_commit() {
  emulator::self->copy_groups.push_back(std::move(emulator::self->open_group));
  emulator::self->open_group.clear();
}
template <int Pending>
void copy_wait() {
  emulator::drain(emulator::self->copy_groups, Pending);
}

template <bool Transposed>
void load_matrices(uint32_t (&r)[4], const void* row) {
  if (shared_address(row) % 16) emulator::fail("ldmatrix: misaligned");
  const auto rows = emulator::exchange(static_cast<const uint16_t*>(row));
  const int lane = emulator::self->thread.x % 32;
  for (int matrix = 0; matrix < 4; ++matrix)
    for (int e = 0; e < 2; ++e) {
      const int major = lane / 4, minor = 2 * (lane % 4) + e;
      const uint16_t bits = Transposed ? rows[8 * matrix + minor][major] : rows[8 * matrix + major][minor];
      r[matrix] = e == 0 ? bits : r[matrix] | uint32_t(bits) << 16;
    }
}

template <class T>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const auto operands = emulator::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const int lane = emulator::self->thread.x % 32;
  const auto half = [](uint32_t word, int e) { return emulator::number<T>(uint16_t(word >> 16 * e)); };
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const auto& left = operands[row % 8 * 4 + k % 8 / 2].a;
      const auto& right = operands[column * 4 + k % 8 / 2].b;
      sum += half(left[row / 8 + 2 * (k / 8)], k % 2) * half(right[k / 8], k % 2);
    }
    d[i] += sum;
  }
}

// Errs as much as it may, up or down.
inline float approximate_sqrt(float value) {
  if (value < 1.17549435e-38f) return value < 0 ? NAN : 0.0f;
  return float(std::sqrt(double(value)) * (emulator::self->thread.x % 2 ? 1 + 0x1p-24 : 1 - 0x1p-24));
}

// ---- hopper.cuh ----

inline int cluster_rank() { return emulator::self->block->rank; }
inline void cluster_sync() { emulator::gather("the cluster", *emulator::self->block->cluster_threads); }

void barrier_init(uint64_t* barrier, int arrivals);
inline void barrier_init_fence() {}
void barrier_arrive_expect(uint64_t* barrier, int bytes);
void barrier_arrive(uint64_t* barrier);
void barrier_arrive_at(uint64_t* barrier, int rank);
inline void async_proxy_fence() {}
void barrier_wait(uint64_t* barrier, uint32_t parity);
void tensor_load(void* target, const CUtensorMap* map, uint64_t* barrier, int column, int row, int sample);
void tensor_load_multicast(void* target, const CUtensorMap* map, uint64_t* barrier, int column, int row, int sample,
                           uint16_t mask);
template <int Registers>
void registers_shrink() {}
template <int Registers>
void registers_grow() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  emulator::self->product_groups.push_back(std::move(emulator::self->open_products));
  emulator::self->open_products.clear();
}
template <int Pending>
void wgmma_wait() {
  emulator::drain(emulator::self->product_groups, Pending);
}
template <int Count>
void wgmma_results(float (&)[Count]) {}
template <class T, int N, bool TransposedA, bool TransposedB>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
  float* results = d;
  emulator::self->open_products.push_back(
      [=] { emulator::wgmma(results, a, b, accumulate != 0, N, TransposedA, TransposedB, emulator::number<T>); });
}
