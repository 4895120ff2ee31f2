// The noise of diffprune/kernels/philox.py in a kernel: the same random words, normals in float32, within 5.5e-7 of the
// float64 value rounded: √ of the logarithm's error 2^-23.1, of the square root 2^-23, of sine and cosine 2^-22.3, of their
// product and of the value rounded 2^-24 each.
#pragma once

#include "ptx.cuh"

struct Words {
  uint32_t a, b, c, d;
};

constexpr int kRounds = 10;

// What the key is in each round. A kernel has it as a parameter: no thread computes it.
struct PhiloxKeys {
  uint32_t words[kRounds][2];

  PhiloxKeys(uint32_t key0, uint32_t key1) {
    for (uint32_t round = 0; round < kRounds; ++round) {
      words[round][0] = key0 + round * 0x9E3779B9u;
      words[round][1] = key1 + round * 0xBB67AE85u;
    }
  }
};

// Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
__device__ __forceinline__ Words philox(Words counter, const PhiloxKeys& keys) {
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t even = uint64_t(counter.a) * 0xD2511F53u, odd = uint64_t(counter.c) * 0xCD9E8D57u;
    counter = {uint32_t(odd >> 32) ^ counter.b ^ keys.words[round][0], uint32_t(odd),
               uint32_t(even >> 32) ^ counter.d ^ keys.words[round][1], uint32_t(even)};
  }
  return counter;
}

// ln((a + 1) / 2^32), accurate also near 0, where 1 - u is what has the digits.
__device__ __forceinline__ float log_of_fraction(uint32_t a) {
  const bool near_one = a >= 0xB504F333u;  // u >= √½
  const float part = float(near_one ? ~a : a + 1) * 2.3283064365386963e-10f;  // 1 - u or u; 2^32 - 1 has no a + 1 to wrap
  const int bits = __float_as_int(part), exponent = near_one ? 0 : (bits - 0x3F3504F3) >> 23;
  const float r = near_one ? -part : __int_as_float(bits - (exponent << 23)) - 1.0f;  // in [√½ - 1, √2 - 1)
  // Cephes, logf (Moshier 1989): ln(1 + r) = r - r²/2 + r³·P(r)
  float p = fmaf(7.0376836292e-2f, r, -1.1514610310e-1f);
  p = fmaf(p, r, 1.1676998740e-1f);
  p = fmaf(p, r, -1.2420140846e-1f);
  p = fmaf(p, r, 1.4249322787e-1f);
  p = fmaf(p, r, -1.6668057665e-1f);
  p = fmaf(p, r, 2.0000714765e-1f);
  p = fmaf(p, r, -2.4999993993e-1f);
  p = fmaf(p, r, 3.3333331174e-1f);
  const float square = r * r;
  return fmaf(float(exponent), 0.69314718056f, fmaf(p * square, r, fmaf(-0.5f, square, r)));
}

// √(-2 ln u)·(cos, sin)(2πw) with u = (a + 1)/2^32, w = b/2^32.
__device__ __forceinline__ float2 box_muller(uint32_t a, uint32_t b) {
  const float radius = approximate_sqrt(-2.0f * log_of_fraction(a));
  const uint32_t turned = b + 0x20000000u, quadrant = turned >> 30;  // by an eighth: what is left is within π/4 of the axis
  const float x = float(int(turned & 0x3FFFFFFFu) - 0x20000000) * 1.4629180792671596e-9f;  // π/2^31
  const float square = x * x;
  // Cephes, sinf and cosf
  const float sine = fmaf(fmaf(fmaf(-1.9515295891e-4f, square, 8.3321608736e-3f), square, -1.6666654611e-1f), square * x, x);
  float cosine = fmaf(fmaf(2.443315711809948e-5f, square, -1.388731625493765e-3f), square, 4.166664568298827e-2f);
  cosine = fmaf(cosine, square * square, fmaf(-0.5f, square, 1.0f));
  const bool swapped = quadrant & 1;
  const float first = (swapped ? sine : cosine) * radius, second = (swapped ? cosine : sine) * radius;
  return make_float2((quadrant + 1) & 2 ? -first : first, quadrant & 2 ? -second : second);
}

// Elements 4·block ... 4·block + 3 of the noise of a sample.
__device__ __forceinline__ float4 normal_noise(uint32_t block, uint64_t hash, uint32_t draw, const PhiloxKeys& keys) {
  const Words words = philox({block, draw, uint32_t(hash), uint32_t(hash >> 32)}, keys);
  const float2 low = box_muller(words.a, words.b), high = box_muller(words.c, words.d);
  return make_float4(low.x, low.y, high.x, high.y);
}
