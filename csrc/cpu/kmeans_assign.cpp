// What surrounds the search: the instruction set, the centroids' codes and bounds, and the threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "ops.h"
#include "threads.h"

#ifdef DIFFPRUNE_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace diffprune::cpu {

// The tables that `Packed` points to.
struct Tables {
  std::vector<int8_t> codes;
  std::vector<int32_t> correction;
  std::vector<float> step, norm, error, offset, slack;
  Packed packed;
};

namespace {

constexpr int64_t kRowsPerTask = 512;
constexpr double kUp = 1 + 1e-6;  // pays for rounding a bound to float32
constexpr double kRound = 6755399441055744.0;

// Several sums side by side, which the compiler can keep in vectors: in one sum each addition waits for the last.
constexpr int64_t kSums = 8;

// The sum of value(d)^2.
template <class Value>
double sum_of_squares(int64_t dimensions, const Value& value) {
  double sums[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= dimensions; d += kSums)
    for (int64_t i = 0; i < kSums; ++i) {
      const double x = value(d + i);
      sums[i] += x * x;
    }
  for (; d < dimensions; ++d) {
    const double x = value(d);
    sums[0] += x * x;
  }
  for (int64_t i = 1; i < kSums; ++i) sums[0] += sums[i];
  return sums[0];
}

// The largest |centroid - centre|.
double farthest(const float* centroid, const float* centre, int64_t dimensions) {
  const auto distance = [&](int64_t d) { return std::fabs(static_cast<double>(centroid[d]) - centre[d]); };
  double largest[kSums] = {};
  int64_t d = 0;
  for (; d + kSums <= dimensions; d += kSums)
    for (int64_t i = 0; i < kSums; ++i) largest[i] = std::max(largest[i], distance(d + i));
  for (; d < dimensions; ++d) largest[0] = std::max(largest[0], distance(d));
  return *std::max_element(largest, largest + kSums);
}

Tables pack(const Variant& variant, const float* centroids, const float* centre, int64_t k, int64_t dimensions,
            int threads) {
  Tables tables;
  const int64_t columns = variant.columns, panels = (k + columns - 1) / columns;
  const int64_t depth = variant.depth;
  const int64_t groups = (dimensions + 4 * depth - 1) / (4 * depth) * depth;  // of 4 dimensions
  const int64_t padded = panels * columns;
  tables.codes.assign(padded * groups * 4, 0);
  tables.correction.assign(padded, 0);
  for (auto* table : {&tables.step, &tables.norm, &tables.error, &tables.slack}) table->assign(padded, 0);
  tables.offset.assign(padded, -std::numeric_limits<float>::infinity());
  double largest = 0;
  for (int64_t j = 0; j < k; ++j) largest = std::max(largest, farthest(centroids + j * dimensions, centre, dimensions));
  int exponent = 0;
  if (largest > 0) std::frexp(largest, &exponent);
  exponent = std::clamp(exponent, -126, 126);  // a float of that power, and its inverse, is a normal number
  const double scale = std::ldexp(1.0, -exponent);
  const auto pack_one = [&](int64_t j, double* centred, int8_t* codes) {
    const float* centroid = centroids + j * dimensions;
    const double peak = farthest(centroid, centre, dimensions) * scale;
    const double square = sum_of_squares(dimensions, [&](int64_t d) {
      return centred[d] = (static_cast<double>(centroid[d]) - centre[d]) * scale;
    });
    const float step = static_cast<float>(peak / variant.code_limit);
    const double inverse = step > 0 ? 1.0 / step : 0, limit = variant.code_limit;
    const double error = sum_of_squares(dimensions, [&](int64_t d) {
      // Adding and taking away 1.5 * 2^52 rounds to a whole number.
      const double code = std::min(std::max((centred[d] * inverse + kRound) - kRound, -limit), limit);
      codes[d] = static_cast<int8_t>(static_cast<int32_t>(code));
      return centred[d] - step * code;
    });
    int64_t sum = 0, squares = 0;
    for (int64_t d = 0; d < dimensions; ++d) sum += codes[d], squares += int32_t{codes[d]} * codes[d];
    const double norm = step * std::sqrt(static_cast<double>(squares));
    int8_t* panel = tables.codes.data() + j / columns * groups * columns * 4 + j % columns * 4;
    for (int64_t g = 0; g < groups; ++g) std::memcpy(panel + g * columns * 4, codes + 4 * g, 4);
    const double half = square / 2, rounding = 1e-6 * half + 1e-35;
    tables.correction[j] = static_cast<int32_t>(-(variant.row_limit + 1) * sum);
    tables.step[j] = step;
    tables.norm[j] = static_cast<float>(norm * kUp + 1e-30);
    tables.error[j] = static_cast<float>(std::sqrt(error) * kUp + 1e-30);
    tables.offset[j] = static_cast<float>(-half + rounding);
    tables.slack[j] = static_cast<float>(2 * rounding * kUp);
  };
  in_threads(k * dimensions < 100000 ? 1 : threads, panels, [&](int64_t panel) {
    std::vector<double> centred(dimensions);
    std::vector<int8_t> codes(groups * 4, 0);
    for (int64_t j = panel * columns; j < std::min(k, (panel + 1) * columns); ++j)
      pack_one(j, centred.data(), codes.data());
  });
  tables.packed = {tables.codes.data(),  tables.correction.data(), tables.step.data(), tables.norm.data(),
                   tables.error.data(),  tables.offset.data(),     tables.slack.data(), centroids,
                   centre,               static_cast<float>(scale), k,                  dimensions,
                   panels,               groups};
  return tables;
}

// The products of `variant` are those of plain integers, on codes that use its whole range. A mistake here would be
// wrong labels on a machine that no test ran on.
bool verified(const Variant& variant) {
  uint32_t state = 12345;
  const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 8; };
  for (const int64_t steps : {1, 3, 49}) {
    const int64_t groups = steps * variant.depth, dimensions = 4 * groups, columns = variant.columns;
    std::vector<uint8_t> x(variant.rows * dimensions);
    std::vector<int8_t> panel(columns * dimensions);
    std::vector<int32_t> out(variant.rows * columns, -1);
    for (int round = 0; round < 3; ++round) {
      for (auto& code : x) code = round == 0 ? 2 * variant.row_limit + 1 : next() % (2 * variant.row_limit + 1) + 1;
      for (auto& code : panel)
        code = round == 0 ? variant.code_limit : static_cast<int>(next() % (2 * variant.code_limit + 1)) - variant.code_limit;
      if (round == 1)
        for (auto& code : panel) code = -variant.code_limit;
      variant.products(x.data(), panel.data(), groups, out.data());
      for (int64_t r = 0; r < variant.rows; ++r)
        for (int64_t c = 0; c < columns; ++c) {
          int32_t expected = 0;
          for (int64_t d = 0; d < dimensions; ++d)
            expected += x[r * dimensions + d] * panel[(d / 4 * columns + c) * 4 + d % 4];
          if (out[r * columns + c] != expected) return false;
        }
    }
  }
  return true;
}

#ifdef DIFFPRUNE_X86
// Of AMX the tiles and their 8-bit products, and the system's leave to use them: Linux wants to be asked.
bool has_amx() {
#ifdef __linux__
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kTiles = 1u << 24, kBytes = 1u << 25;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTiles) == 0 || (edx & kBytes) == 0) return false;
  constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool supported(const Variant& variant) {
#ifdef DIFFPRUNE_X86
  __builtin_cpu_init();
  if (&variant == &avx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (&variant == &amx && (variant.assign == nullptr || !has_amx())) return false;
  if (&variant == &avx512vnni || &variant == &amx)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
#endif
  return &variant == &portable;
}

const std::vector<const Variant*>& usable() {
  static const std::vector<const Variant*> found = [] {
    std::vector<const Variant*> all, good;
#ifdef DIFFPRUNE_X86
    all = {&amx, &avx512vnni, &avx2};
#endif
    all.push_back(&portable);
    for (const auto* variant : all)
      if (supported(*variant) && verified(*variant)) good.push_back(variant);
    return good;
  }();
  return found;
}

}  // namespace

std::vector<std::string> variants() {
  std::vector<std::string> names;
  for (const auto* variant : usable()) names.emplace_back(variant->name);
  return names;
}

CentroidSearch::CentroidSearch(const std::string& name, uintptr_t centroids, uintptr_t centre, int64_t k,
                               int64_t dimensions, int threads) {
  const auto found = std::find_if(usable().begin(), usable().end(), [&](const auto* v) { return name == v->name; });
  if (found == usable().end()) throw std::invalid_argument("kmeans_assign: this processor does not run " + name);
  variant_ = *found;
  tables_ = std::make_unique<const Tables>(pack(*variant_, reinterpret_cast<const float*>(centroids),
                                                reinterpret_cast<const float*>(centre), k, dimensions, threads));
}

CentroidSearch::~CentroidSearch() = default;

std::pair<int64_t, int64_t> CentroidSearch::assign(uintptr_t points, int type, int64_t stride, int64_t n,
                                                   uintptr_t assignment, uintptr_t sqdistance, int threads) const {
  const Points given{reinterpret_cast<const void*>(points), static_cast<Type>(type), stride};
  std::atomic<int64_t> candidates{0}, exact{0};
  std::atomic<bool> failed{false};
  in_threads(threads, (n + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task) {
    const int64_t first = task * kRowsPerTask;
    const Counts counts = variant_->assign(tables_->packed, given, first, std::min(n, first + kRowsPerTask),
                                           reinterpret_cast<int32_t*>(assignment),
                                           reinterpret_cast<float*>(sqdistance));
    if (counts.candidates < 0) failed = true;
    candidates += counts.candidates;
    exact += counts.exact;
  });
  if (failed) throw std::bad_alloc();
  return {candidates, exact};
}

}  // namespace diffprune::cpu
