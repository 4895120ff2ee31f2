// What every kernel file includes: CUDA, or the emulator that runs the same sources on the CPU in the tests.
#pragma once

#ifdef DIFFPRUNE_EMULATED
#include "emulator.h"
#else
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// The block's dynamic shared memory, from its first multiple of 1024 bytes: the swizzle is a function of the address.
// Ask for kAlignmentBytes more than is used.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ unsigned char dynamic_shared_memory[];
  const unsigned misalignment = static_cast<unsigned>(__cvta_generic_to_shared(dynamic_shared_memory)) % 1024;
  return dynamic_shared_memory + (1024 - misalignment) % 1024;
}
#endif

#include <cstdint>
#include <type_traits>

constexpr int kAlignmentBytes = 1024;

template <class T>
constexpr bool is_half = std::is_same_v<T, __half>;

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Sum over the 32 lanes; every lane gets it. The order is fixed.
template <class Number>
__device__ __forceinline__ Number warp_sum(Number value) {
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}
