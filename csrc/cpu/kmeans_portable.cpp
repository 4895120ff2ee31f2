// The search with the compiler's own vectors: runs anywhere, and is what the other instruction sets are checked against.
#include "kmeans_assign.h"

namespace {
struct Isa {
  static constexpr int lanes = 4, vectors = 4, rows = 4, depth = 2, row_limit = 127, code_limit = 127;
  typedef float Vector __attribute__((vector_size(4 * lanes)));
  typedef int32_t Integers __attribute__((vector_size(4 * lanes)));
  struct Session {};

  static float sum(Vector value) { return (value[0] + value[2]) + (value[1] + value[3]); }

  static unsigned at_least(Vector a, Vector b) {
    unsigned bits = 0;
    for (int i = 0; i < lanes; ++i) bits |= static_cast<unsigned>(a[i] >= b[i]) << i;
    return bits;
  }

  static void store(uint8_t* to, Integers values) {
    for (int i = 0; i < lanes; ++i) to[i] = static_cast<uint8_t>(values[i]);
  }

  static Vector load(const uint16_t* from, diffprune::cpu::Type type);

  __attribute__((noinline)) static void products(const uint8_t* x, int64_t stride, const int8_t* panel, int64_t groups,
                                                 int32_t* out) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < lanes * vectors; ++c) {
        int32_t total = 0;
        for (int64_t g = 0; g < groups; ++g)
          for (int i = 0; i < 4; ++i) total += x[r * stride + 4 * g + i] * panel[(g * lanes * vectors + c) * 4 + i];
        out[r * lanes * vectors + c] = total;
      }
  }
};
}  // namespace

#include "kmeans_search.inl"

namespace {
Isa::Vector Isa::load(const uint16_t* from, diffprune::cpu::Type type) {
  Vector value;
  for (int i = 0; i < lanes; ++i) value[i] = diffprune::cpu::to_float(from[i], type);
  return value;
}
}  // namespace

namespace diffprune::cpu {
const Variant portable{"portable", Isa::rows, kColumns, Isa::depth, Isa::row_limit, Isa::code_limit, assign, products};
}
