// The search on AVX2. vpmaddubsw adds two products in 16 bits; with 7-bit codes on both sides four fit, so two of them
// are added before they are widened: 64 multiply-adds in 5 instructions, against 16 in 2 of float32.
#include "kmeans_assign.h"

#ifdef DIFFPRUNE_X86
#include <immintrin.h>

namespace {
struct Isa {
  static constexpr int lanes = 8, vectors = 2, rows = 3, depth = 2, row_limit = 63, code_limit = 63;
  static_assert(4 * (2 * row_limit + 1) * code_limit <= 32767, "four products have to fit in 16 bits");
  typedef float Vector __attribute__((vector_size(4 * lanes)));
  typedef int32_t Integers __attribute__((vector_size(4 * lanes)));
  struct Session {};

  static float sum(Vector value) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static unsigned at_least(Vector a, Vector b) {
    return static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ)));
  }

  static Vector load(const uint16_t* from, diffprune::cpu::Type type) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    if (type == diffprune::cpu::Type::float16) return _mm256_cvtph_ps(halves);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
  }

  static void store(uint8_t* to, Integers values) {  // 0 to 255
    const auto all = reinterpret_cast<__m256i>(values);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }

  static __m256i four(const uint8_t* x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, 4);
    return _mm256_set1_epi32(bytes);
  }

  // groups is even. 3 rows, so that 6 sums, 4 vectors of codes and what is at work fit in 16 registers.
  __attribute__((noinline)) static void products(const uint8_t* x, int64_t stride, const int8_t* panel, int64_t groups,
                                                 int32_t* out) {
    __m256i ones = _mm256_set1_epi16(1), total[rows][vectors] = {};
    for (int64_t g = 0; g < groups; g += 2, panel += 2 * 4 * lanes * vectors) {
      __m256i codes[2 * vectors];
#pragma GCC unroll 4
      for (int v = 0; v < 2 * vectors; ++v) {
        codes[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel) + v);
        asm("" : "+x"(codes[v]));  // in a register: read again for each row, the loads would be the bottleneck
      }
#pragma GCC unroll 3
      for (int r = 0; r < rows; ++r) {
        const __m256i first = four(x + r * stride + 4 * g), second = four(x + r * stride + 4 * g + 4);
#pragma GCC unroll 2
        for (int v = 0; v < vectors; ++v) {
          const __m256i sums = _mm256_add_epi16(_mm256_maddubs_epi16(first, codes[v]),
                                                _mm256_maddubs_epi16(second, codes[vectors + v]));
          total[r][v] = _mm256_add_epi32(total[r][v], _mm256_madd_epi16(sums, ones));
        }
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (r * vectors + v) * lanes), total[r][v]);
  }
};
}  // namespace

#include "kmeans_search.inl"

namespace diffprune::cpu {
const Variant avx2{"avx2", Isa::rows, kColumns, Isa::depth, Isa::row_limit, Isa::code_limit, assign, products};
}
#endif
