// Four numbers at a time, in one access where their place is a multiple of their size.
#pragma once

#include "platform.cuh"

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T values[4];
};

__device__ __forceinline__ void store(float* target, float value) { *target = value; }
__device__ __forceinline__ void store(__half* target, float value) { *target = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* target, float value) { *target = __float2bfloat16_rn(value); }

// The first four of `count` numbers, zeros for those that are not there; `aligned`: at once, and there are four or none.
template <class T>
__device__ __forceinline__ void load_four(float (&values)[4], const T* source, int64_t count, bool aligned) {
  if (aligned) {
    Four<T> four{};
    if (count > 0) four = *reinterpret_cast<const Four<T>*>(source);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = to_float(four.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = i < count ? to_float(source[i]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_four(T* target, const float (&values)[4], int64_t count, bool aligned) {
  if (aligned) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) store(&four.values[i], values[i]);
    *reinterpret_cast<Four<T>*>(target) = four;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) store(target + i, values[i]);
  }
}
