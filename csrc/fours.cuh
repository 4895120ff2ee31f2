// Four numbers at a time, in one access where their place is a multiple of their size.
#pragma once

#include <cstring>

#include "platform.cuh"

template <class T>
struct alignas(4 * sizeof(T)) Four {
  using Bits = std::conditional_t<sizeof(T) == 2, uint2, uint4>;
  T values[4];

  static __device__ __forceinline__ Four read(const T* source) {
    const Bits bits = *reinterpret_cast<const Bits*>(source);
    Four four;
    memcpy(&four, &bits, sizeof(four));
    return four;
  }

  __device__ __forceinline__ void write(T* target) const {
    Bits bits;
    memcpy(&bits, this, sizeof(bits));
    __stwb(reinterpret_cast<Bits*>(target), bits);  // a plain store; the compiler takes assignments apart
  }
};

__device__ __forceinline__ void store(float* target, float value) { *target = value; }
__device__ __forceinline__ void store(__half* target, float value) { *target = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* target, float value) { *target = __float2bfloat16_rn(value); }

// The first four of `count` numbers, zeros for those that are not there; `aligned`: at once, and there are four or none.
template <class T>
__device__ __forceinline__ void load_four(float (&values)[4], const T* source, int count, bool aligned) {
  if (aligned) {
    Four<T> four{};
    if (count > 0) four = Four<T>::read(source);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = to_float(four.values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = i < count ? to_float(source[i]) : 0.0f;
  }
}

template <class T>
__device__ __forceinline__ void store_four(T* target, const float (&values)[4], int count, bool aligned) {
  if (aligned) {
    Four<T> four;
#pragma unroll
    for (int i = 0; i < 4; ++i) store(&four.values[i], values[i]);
    if (count > 0) four.write(target);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < count) store(target + i, values[i]);
  }
}
