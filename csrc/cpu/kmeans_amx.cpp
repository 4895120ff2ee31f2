// The search on AMX: tdpbusd multiplies 16 rows of 64 codes by 16 centroids' at once.
#include "kmeans_assign.h"

#if defined(DIFFPRUNE_X86) && defined(__AMX_INT8__)
#include "avx512.h"

namespace {
struct Isa : Avx512 {
  static constexpr int vectors = 2, rows = 32, depth = 16, row_limit = 127, code_limit = 127;

  // Tiles are set up for a thread, and cost nothing to save while they are not.
  struct Session {
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } shapes;
      _tile_loadconfig(&shapes);
    }
    ~Session() { _tile_release(); }
  };

  // Two tiles of rows by two of columns: each that is loaded is multiplied twice.
  __attribute__((noinline)) static void products(const uint8_t* x, int64_t stride, const int8_t* panel, int64_t groups,
                                                 int32_t* out) {
    constexpr int64_t wide = 4 * lanes * vectors;  // bytes of a group of a panel, and of a row of `out`
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t g = 0; g < groups; g += depth, x += 4 * depth, panel += depth * wide) {
      _tile_loadd(4, x, stride);
      _tile_loadd(6, panel, wide);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(7, panel + 4 * lanes, wide);
      _tile_dpbusd(1, 4, 7);
      _tile_loadd(5, x + 16 * stride, stride);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
    }
    int32_t* below = out + 16 * lanes * vectors;
    _tile_stored(0, out, wide);
    _tile_stored(1, out + lanes, wide);
    _tile_stored(2, below, wide);
    _tile_stored(3, below + lanes, wide);
  }
};
}  // namespace

#include "kmeans_search.inl"

namespace diffprune::cpu {
const Variant amx{"amx", Isa::rows, kColumns, Isa::depth, Isa::row_limit, Isa::code_limit, assign, products};
}
#elif defined(DIFFPRUNE_X86)
namespace diffprune::cpu {
const Variant amx{"amx", 0, 0, 0, 0, 0, nullptr, nullptr};  // the compiler does not know it
}
#endif
