// What the searches on AVX-512 share. Included by files compiled for it only; internal linkage, no standard library.
#pragma once

#include <immintrin.h>

#include "kmeans_assign.h"

namespace {

struct Avx512 {
  static constexpr int lanes = 16;
  typedef float Vector __attribute__((vector_size(4 * lanes)));
  typedef int32_t Integers __attribute__((vector_size(4 * lanes)));

  static float sum(Vector value) { return _mm512_reduce_add_ps(value); }

  static unsigned at_least(Vector a, Vector b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }

  static Vector load(const uint16_t* from, diffprune::cpu::Type type) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    if (type == diffprune::cpu::Type::float16) return _mm512_cvtph_ps(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
  }

  static void store(uint8_t* to, Integers values) {  // 0 to 255
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(values)));
  }
};

}  // namespace
