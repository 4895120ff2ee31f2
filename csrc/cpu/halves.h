// 16-bit numbers as the float32 of the same value. Internal linkage and no standard library: files compiled for other
// instruction sets include it, and the linker must not let one use another's copy.
#pragma once

#include <cstdint>

namespace {

inline float float_of_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline float from_bfloat16(uint16_t half) { return float_of_bits(static_cast<uint32_t>(half) << 16); }

inline float from_float16(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = (half & 0x7fffu) << 13;
  const float scaled = float_of_bits(magnitude) * 5.192296858534828e33f;  // by 2^112: exact, for subnormal numbers too
  uint32_t bits;
  __builtin_memcpy(&bits, &scaled, 4);
  return float_of_bits((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : bits) | sign);  // infinity and NaN stay so
}

}  // namespace
