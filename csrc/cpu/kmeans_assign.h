// Nearest centroids on the CPU: certified 8-bit products, then float32, then float64 where those cannot decide.
//
// argmin |x - c|^2 is argmax v with v = x'.c' - |c'|^2/2, x' = x - centre, c' = c - centre. Rows and centroids are
// rounded to x^ = s q and c^ = t p with q, p small integers, so s t (q.p) is v up to
//     E = |x' - x^| |c^| + |x'| |c' - c^| + rounding,
// all of which are known. A centroid whose v + E is below another's v - E is certainly not the nearest. The few that
// are left are compared by their differences in float32, and in float64 where float32's own error bound says so. Where
// many are left, the distances of some bound v better than codes do, and most of the others go.
#pragma once

#include <cstdint>

namespace diffprune::cpu {

// Centroids as the search reads them; made by pack() in kmeans_assign.cpp. Everything is scaled by 2^-exponent.
struct Packed {
  const int8_t* codes;        // [panels][groups][NR][4]: p, zeros where there is no centroid or no dimension
  const int32_t* correction;  // [panels * NR]: -(zero point of x's codes) * sum of p
  const float* step;          // [panels * NR]: t
  const float* norm;          // [panels * NR]: bound of |c^|
  const float* error;         // [panels * NR]: bound of |c' - c^|
  const float* offset;        // [panels * NR]: -|c'|^2/2 plus its rounding; -inf where there is no centroid
  const float* slack;         // [panels * NR]: twice that rounding
  const float* centroids;     // [K, D], as given
  const float* centre;        // [D]
  float scale;                // 2^-exponent
  int64_t k, dimensions, panels, groups;
};

enum class Type : int { float32 = 0, float16 = 1, bfloat16 = 2, float64 = 3 };

struct Points {
  const void* values;  // [N, D]
  Type type;
  int64_t stride;  // elements between rows
};

struct Counts {
  int64_t candidates = 0;  // pairs compared in float32
  int64_t exact = 0;       // pairs compared in float64
};

// What one instruction set offers.
struct Variant {
  const char* name;
  int rows;        // MR: rows of one call of products
  int columns;     // NR: centroids per panel
  int depth;       // groups come in multiples of it
  int row_limit;   // |q| at most
  int code_limit;  // |p| at most
  // Nearest centroids of rows [first, last). Out of memory, candidates is -1.
  Counts (*assign)(const Packed&, const Points&, int64_t first, int64_t last, int32_t* assignment, float* sqdistance);
  // out[MR][NR] = x[MR][4 * groups] times one panel, exact: what `assign` is built on, for the check against `portable`.
  void (*products)(const uint8_t* x, const int8_t* panel, int64_t groups, int32_t* out);
};

extern const Variant portable;
#ifdef DIFFPRUNE_X86
extern const Variant avx2;
extern const Variant avx512vnni;
extern const Variant amx;  // without functions where the compiler does not know AMX
#endif

}  // namespace diffprune::cpu
