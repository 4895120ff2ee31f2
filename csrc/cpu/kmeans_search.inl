// The search, written once; each instruction set includes it after defining `Isa`. No function of the standard library
// is used here: the linker would be free to merge an AVX-512 copy of it into code that must run without.
//
// Isa has: lanes (floats per vector), vectors (per panel), rows (per call of products), depth (groups come in multiples of
// it), row_limit, code_limit, sum(Vector), at_least(Vector, Vector) -> bits, load(const uint16_t*, Type) -> Vector,
// store(uint8_t*, Integers), products(x, stride, panel, groups, out), and Session, which lives while products are made.

#include "halves.h"

namespace diffprune::cpu {
namespace {

constexpr int kLanes = Isa::lanes;
constexpr int kColumns = Isa::lanes * Isa::vectors;
constexpr int kRows = Isa::rows;
static_assert(kColumns <= 64, "a bit for each column of a panel");
constexpr int kCandidates = 128;    // kept per row at most
constexpr int kBlockBytes = 24576;  // of codes of one block of rows: they stay in the first cache
constexpr int kMaxBlock = 32 / kRows * kRows;
constexpr int kChunk = 1024 / kColumns;  // panels whose values of v are looked at together
constexpr float kLargest = 1e15f;  // norms above are compared with every centroid: their squares could overflow
constexpr float kVanished = 1e-15f;  // more than the norm of what vanishes when it is squared; centroids are of size 1
constexpr float kUnit = 5.9604645e-8f;  // unit roundoff of float32

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Integers __attribute__((vector_size(4 * kLanes)));

inline Vector load(const float* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vector value) { __builtin_memcpy(to, &value, sizeof value); }

inline Vector all(float value) { return value - Vector{}; }

inline float to_float(uint16_t half, Type type) {
  return type == Type::bfloat16 ? from_bfloat16(half) : from_float16(half);
}

struct Sample {
  const Points& points;
  int64_t row, dimensions;
  float* buffer;

  // In float32: where they are, or in `buffer` those of a half-precision one.
  const float* values() const {
    if (points.type == Type::float32) return static_cast<const float*>(points.values) + row * points.stride;
    const uint16_t* from = static_cast<const uint16_t*>(points.values) + row * points.stride;
    int64_t d = 0;
    for (; d + kLanes <= dimensions; d += kLanes) store(buffer + d, Isa::load(from + d, points.type));
    for (; d < dimensions; ++d) buffer[d] = to_float(from[d], points.type);
    return buffer;
  }
};

void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

float sqdistance32(const float* x, const float* c, int64_t dimensions) {
  Vector first{}, second{}, third{}, fourth{};
  int64_t d = 0;
  for (; d + 4 * kLanes <= dimensions; d += 4 * kLanes) {
    const Vector a = load(x + d) - load(c + d), b = load(x + d + kLanes) - load(c + d + kLanes);
    const Vector e = load(x + d + 2 * kLanes) - load(c + d + 2 * kLanes);
    const Vector f = load(x + d + 3 * kLanes) - load(c + d + 3 * kLanes);
    first += a * a, second += b * b, third += e * e, fourth += f * f;
  }
  for (; d + kLanes <= dimensions; d += kLanes) {
    const Vector a = load(x + d) - load(c + d);
    first += a * a;
  }
  float total = Isa::sum((first + second) + (third + fourth));
  for (; d < dimensions; ++d) total += (x[d] - c[d]) * (x[d] - c[d]);
  return total;
}

double sqdistance64(const float* x, const float* c, int64_t dimensions) {
  double parts[8] = {};
  int64_t d = 0;
  for (; d + 8 <= dimensions; d += 8)
    for (int i = 0; i < 8; ++i) {
      const double difference = static_cast<double>(x[d + i]) - c[d + i];
      parts[i] += difference * difference;
    }
  double total = 0;
  for (int i = 0; i < 8; ++i) total += parts[i];
  for (; d < dimensions; ++d) total += (static_cast<double>(x[d]) - c[d]) * (static_cast<double>(x[d]) - c[d]);
  return total;
}

bool finite(const float* x, int64_t dimensions) {
  for (int64_t d = 0; d < dimensions; ++d)
    if (!(x[d] - x[d] == 0)) return false;
  return true;
}

// One row while it meets the panels.
struct Row {
  float step;   // s
  float norm;   // bound of |x'|
  float square; // |x'|^2, rounded
  float error;  // bound of |x' - x^|, and the roundings that grow with |x'| |c^|
  float threshold;  // the largest lower bound of v so far
  bool every;       // the codes say nothing: compare with every centroid
  int count;
  int32_t candidates[kCandidates];
  float upper[kCandidates];  // bounds of their v; later their distances
};

// Codes of one row, and its bounds; of v, the largest lower one so far in each lane.
void round_row(const float* x, const Packed& packed, float* centred, uint8_t* codes, Row& row, float* lowest) {
  const int64_t dimensions = packed.dimensions, padded = 4 * packed.groups;
  Vector largest{}, squares{};
  int64_t d = 0;
  for (; d + kLanes <= dimensions; d += kLanes) {
    const Vector value = (load(x + d) - load(packed.centre + d)) * packed.scale;
    store(centred + d, value);
    const Vector magnitude = value < 0 ? -value : value;
    largest = magnitude > largest ? magnitude : largest;
    squares += value * value;
  }
  float peak = 0, square = Isa::sum(squares);
  for (int i = 0; i < kLanes; ++i) peak = largest[i] > peak ? largest[i] : peak;
  for (; d < dimensions; ++d) {
    const float value = centred[d] = (x[d] - packed.centre[d]) * packed.scale;
    const float magnitude = value < 0 ? -value : value;
    peak = magnitude > peak ? magnitude : peak;
    square += value * value;
  }
  const float inflation = 1 + (dimensions + 16) * kUnit;
  row.count = 0;
  row.square = square;
  row.norm = __builtin_sqrtf(square) * inflation + kVanished;
  row.every = !(row.norm < kLargest);  // NaN too
  row.threshold = row.every ? __builtin_inff() : -3.4028234e38f;
  store(lowest, all(row.threshold));
  row.step = row.every ? 0 : peak / Isa::row_limit;
  const float inverse = row.step > 1e-30f ? 1 / row.step : 0;
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLimit = Isa::row_limit;
  constexpr int kZero = Isa::row_limit + 1;
  Vector residuals{};
  for (d = 0; d + kLanes <= dimensions; d += kLanes) {
    const Vector value = load(centred + d);
    Vector code = (value * inverse + kRound) - kRound;
    code = code > kLimit ? all(kLimit) : code;
    code = code < -kLimit ? all(-kLimit) : code;
    const Vector residual = value - code * row.step;
    residuals += residual * residual;
    Isa::store(codes + d, __builtin_convertvector(code, Integers) + kZero);
  }
  float residual_square = Isa::sum(residuals);
  for (; d < dimensions; ++d) {
    float code = (centred[d] * inverse + kRound) - kRound;
    code = code > kLimit ? kLimit : code < -kLimit ? -kLimit : code;
    const float residual = centred[d] - code * row.step;
    residual_square += residual * residual;
    codes[d] = static_cast<uint8_t>(static_cast<int>(code) + kZero);
  }
  for (; d < padded; ++d) codes[d] = kZero;  // against zeros
  // 2e-6 |x'|: the roundings of x - centre, of the residual, and of v's few operations, each 2^-24 of |x'| |c^|.
  row.error = __builtin_sqrtf(residual_square) * inflation + 2e-6f * row.norm + kVanished;
}

// Bounds of v of one row and one panel, from the integer products [NR]: the upper ones are stored.
inline void bound(const Packed& packed, int64_t panel, const int32_t* products, const Row& row, float* lower,
                  float* upper) {
  Vector lowest = load(lower);
  for (int v = 0; v < Isa::vectors; ++v) {
    const int64_t column = panel * kColumns + v * kLanes;
    Integers product, correction;
    __builtin_memcpy(&product, products + v * kLanes, sizeof product);
    __builtin_memcpy(&correction, packed.correction + column, sizeof correction);
    const Vector value = __builtin_convertvector(product + correction, Vector) * load(packed.step + column);
    const Vector error = load(packed.norm + column) * row.error + load(packed.error + column) * row.norm;
    const Vector high = value * row.step + (error + load(packed.offset + column));
    const Vector low = high - error * 2.000002f - load(packed.slack + column);
    lowest = low > lowest ? low : lowest;
    store(upper + v * kLanes, high);
  }
  store(lower, lowest);
}

// Those go that the threshold has overtaken.
void drop_overtaken(Row& row) {
  int kept = 0;
  for (int i = 0; i < row.count; ++i)
    if (row.upper[i] >= row.threshold) row.candidates[kept] = row.candidates[i], row.upper[kept++] = row.upper[i];
  row.count = kept;
}

// Compares the candidates in float32 and keeps those that may be the nearest, with their squared distances in `upper`:
// one, but where others are as near. False where float32 cannot tell; then all are kept.
bool compare(const Packed& packed, const float* x, Row& row, Counts& counts) {
  const int64_t dimensions = packed.dimensions;
  const auto centroid = [&](int i) { return packed.centroids + row.candidates[i] * dimensions; };
  counts.candidates += row.count;
  float least = __builtin_inff();
  for (int i = 0; i < row.count; ++i) {
    if (i + 1 < row.count) prefetch(centroid(i + 1), dimensions * 4);
    const float distance = row.upper[i] = sqdistance32(x, centroid(i), dimensions);
    least = distance < least ? distance : least;
  }
  // A sum of squared differences has a small relative error: whoever is beyond the errors of both is farther. Not so
  // where squares overflow or vanish.
  if (!(least > 1e-30f && least < 1e38f)) return false;
  const float reach = least * (1 + 2.1f * (dimensions + 8) * kUnit);
  int within = 0;
  for (int i = 0; i < row.count; ++i)
    if (!(row.upper[i] > reach)) row.candidates[within] = row.candidates[i], row.upper[within++] = row.upper[i];
  row.count = within;
  return true;
}

// Makes room for candidates where there are too many: most go once some are compared, since a distance says more of v
// than codes do. False where there is none to be made.
bool make_room(const Packed& packed, const float* x, Row& row, Counts& counts) {
  drop_overtaken(row);
  if (row.count <= kCandidates / 2) return true;
  if (!compare(packed, x, row, counts) || row.count > kCandidates / 2) return false;
  // v = (|x'|^2 - |x' - c'|^2)/2, less the roundings of both and of v.
  const double rounding = 2.1 * (packed.dimensions + 16) * kUnit, scale = packed.scale;
  const double v = (row.square * (1 - rounding) - scale * scale * row.upper[0] * (1 + rounding)) / 2;
  row.threshold = v > row.threshold ? static_cast<float>(v) : row.threshold;
  for (int i = 0; i < row.count; ++i) row.upper[i] = __builtin_inff();  // these stay
  return true;
}

// Of one row and the panels from `first` to `end`, the centroids that may still be the nearest. Upper bounds of a panel
// are `stride` after those of the panel before.
void keep_candidates(const Packed& packed, const Sample& sample, const float* upper, int64_t stride, int64_t first,
                     int64_t end, const float* lowest, Row& row, Counts& counts) {
  for (int i = 0; i < kLanes; ++i) row.threshold = lowest[i] > row.threshold ? lowest[i] : row.threshold;
  Vector threshold = all(row.threshold);
  for (int64_t panel = first; panel < end; ++panel, upper += stride) {
    uint64_t bits = 0;  // one for each column
    for (int v = 0; v < Isa::vectors; ++v)
      bits |= static_cast<uint64_t>(Isa::at_least(load(upper + v * kLanes), threshold)) << (v * kLanes);
    for (; bits; bits &= bits - 1) {
      if (row.count == kCandidates) {
        row.every = !make_room(packed, sample.values(), row, counts);
        if (row.every) return;
        threshold = all(row.threshold);
      }
      const int column = __builtin_ctzll(bits);
      row.candidates[row.count] = static_cast<int32_t>(panel * kColumns + column);
      row.upper[row.count++] = upper[column];
    }
  }
}

// The nearest of all centroids: float64, for the rows that the codes say nothing of.
void decide_among_all(const Packed& packed, const float* x, int32_t& nearest, float& sqdistance, Counts& counts) {
  const int64_t dimensions = packed.dimensions;
  double least = sqdistance64(x, packed.centroids, dimensions);
  nearest = 0;
  const int64_t compared = finite(x, dimensions) ? packed.k : 1;
  for (int64_t j = 1; j < compared; ++j) {
    const double distance = sqdistance64(x, packed.centroids + j * dimensions, dimensions);
    if (distance < least) least = distance, nearest = static_cast<int32_t>(j);
  }
  sqdistance = static_cast<float>(least);
  counts.exact += compared;
}

// The nearest of the candidates, which are in ascending order, and the squared distance to it.
void decide(const Packed& packed, const float* x, Row& row, int32_t& nearest, float& sqdistance, Counts& counts) {
  drop_overtaken(row);
  const bool told = compare(packed, x, row, counts);
  if (row.count == 0) {  // no centroid is finite
    nearest = 0, sqdistance = __builtin_nanf("");
    return;
  }
  nearest = row.candidates[0];
  sqdistance = row.upper[0];
  if (told && row.count == 1) return;
  double best = __builtin_inf();
  for (int i = 0; i < row.count; ++i) {
    const double distance = sqdistance64(x, packed.centroids + row.candidates[i] * packed.dimensions, packed.dimensions);
    if (i > 0 && !(distance < best)) continue;
    best = distance, nearest = row.candidates[i];
    sqdistance = told ? row.upper[i] : static_cast<float>(distance);
  }
  counts.exact += row.count;
}

Counts assign(const Packed& packed, const Points& points, int64_t first, int64_t last, int32_t* assignment,
              float* sqdistance) {
  const int64_t dimensions = packed.dimensions, padded = 4 * packed.groups;
  int64_t block = kBlockBytes / padded / kRows * kRows;
  block = block < kRows ? kRows : block > kMaxBlock ? kMaxBlock : block;
  auto* codes = static_cast<uint8_t*>(__builtin_malloc(block * padded));
  auto* rows = static_cast<Row*>(__builtin_malloc(block * sizeof(Row)));
  auto* lowest = static_cast<float*>(__builtin_malloc(block * kLanes * sizeof(float)));
  auto* upper = static_cast<float*>(__builtin_malloc(kChunk * block * kColumns * sizeof(float)));  // [kChunk, block, NR]
  auto* buffer = static_cast<float*>(__builtin_malloc(2 * dimensions * sizeof(float)));
  [[maybe_unused]] const Isa::Session session;
  Counts counts;
  if (!codes || !rows || !lowest || !upper || !buffer) counts.candidates = -1, last = first;
  int32_t products[kRows * kColumns];
  const int64_t panel_bytes = packed.groups * kColumns * 4;
  const auto sample = [&](int64_t row) { return Sample{points, row, dimensions, buffer}; };
  const int64_t row_bytes = points.stride * (points.type == Type::float32 ? 4 : 2);
  for (int64_t start = first; start < last; start += block) {
    const int64_t real = last - start < block ? last - start : block;
    for (int64_t r = 0; r < real; ++r) {
      round_row(sample(start + r).values(), packed, buffer + dimensions, codes + r * padded, rows[r], lowest + r * kLanes);
    }
    for (int64_t r = real * padded; r < (real + kRows - 1) / kRows * kRows * padded; ++r) codes[r] = 0;
    for (int64_t chunk = 0; chunk < packed.panels; chunk += kChunk) {
      const int64_t end = packed.panels < chunk + kChunk ? packed.panels : chunk + kChunk;
      for (int64_t panel = chunk; panel < end; ++panel)
        for (int64_t r = 0; r < real; r += kRows) {
          Isa::products(codes + r * padded, padded, packed.codes + panel * panel_bytes, packed.groups, products);
          for (int64_t i = 0; i < kRows && r + i < real; ++i)
            bound(packed, panel, products + i * kColumns, rows[r + i], lowest + (r + i) * kLanes,
                  upper + ((panel - chunk) * block + r + i) * kColumns);
        }
      for (int64_t r = 0; r < real; ++r)
        if (!rows[r].every)
          keep_candidates(packed, sample(start + r), upper + r * kColumns, block * kColumns, chunk, end,
                          lowest + r * kLanes, rows[r], counts);
    }
    for (int64_t r = 0; r < real; ++r) {
      if (start + r + block < last)  // what the next block reads first
        prefetch(static_cast<const char*>(points.values) + (start + r + block) * row_bytes, row_bytes);
      const float* x = sample(start + r).values();
      (rows[r].every ? decide_among_all(packed, x, assignment[start + r], sqdistance[start + r], counts)
                     : decide(packed, x, rows[r], assignment[start + r], sqdistance[start + r], counts));
    }
  }
  __builtin_free(codes);
  __builtin_free(rows);
  __builtin_free(lowest);
  __builtin_free(upper);
  __builtin_free(buffer);
  return counts;
}

void products(const uint8_t* x, const int8_t* panel, int64_t groups, int32_t* out) {
  [[maybe_unused]] const Isa::Session session;
  Isa::products(x, 4 * groups, panel, groups, out);
}

}  // namespace
}  // namespace diffprune::cpu
