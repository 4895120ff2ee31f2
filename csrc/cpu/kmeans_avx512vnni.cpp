// The search on AVX-512 with VNNI: vpdpbusd adds four 8-bit products to each of 16 sums.
#include "kmeans_assign.h"

#ifdef DIFFPRUNE_X86
#include "avx512.h"

namespace {
struct Isa : Avx512 {
  static constexpr int vectors = 4, rows = 4, depth = 2, row_limit = 127, code_limit = 127;
  struct Session {};

  static __m512i four(const uint8_t* x) {
    int32_t bytes;
    __builtin_memcpy(&bytes, x, 4);
    return _mm512_set1_epi32(bytes);
  }

  __attribute__((noinline)) static void products(const uint8_t* x, int64_t stride, const int8_t* panel, int64_t groups,
                                                 int32_t* out) {
    __m512i total[rows][vectors] = {};
    for (int64_t g = 0; g < groups; ++g, panel += 4 * lanes * vectors) {
      __m512i codes[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) codes[v] = _mm512_loadu_si512(panel + v * 4 * lanes);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const __m512i row = four(x + r * stride + 4 * g);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) total[r][v] = _mm512_dpbusd_epi32(total[r][v], row, codes[v]);
      }
    }
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) _mm512_storeu_si512(out + (r * vectors + v) * lanes, total[r][v]);
  }
};
}  // namespace

#include "kmeans_search.inl"

namespace diffprune::cpu {
const Variant avx512vnni{"avx512vnni", Isa::rows, kColumns, Isa::depth, Isa::row_limit, Isa::code_limit, assign, products};
}
#endif
