// Sums of the points of each centroid, rounded or exact. Rows are sorted by centroid, stably, so that each sum is made by
// one thread, in row order, whatever the number of threads: N D reads, no atomics, no copy of the sums per thread.
#include <cstring>

#include "halves.h"
#include "ops.h"
#include "threads.h"

namespace diffprune::cpu {
namespace {

constexpr int64_t kTasks = 64;  // ranges of centroids with about as many points each

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

inline double to_double(float value) { return value; }
inline double to_double(double value) { return value; }

inline double to_double(Bfloat16 value) { return from_bfloat16(value.bits); }
inline double to_double(Half value) { return from_float16(value.bits); }

struct Rows {
  std::vector<int64_t> order, first;  // rows by centroid, stably; where those of each centroid begin, [K + 1]
};

Rows sorted(const int32_t* labels, int64_t n, int64_t k) {
  Rows rows{std::vector<int64_t>(n), std::vector<int64_t>(k + 1, 0)};
  for (int64_t i = 0; i < n; ++i) ++rows.first[labels[i] + 1];
  for (int64_t j = 0; j < k; ++j) rows.first[j + 1] += rows.first[j];
  std::vector<int64_t> next(rows.first.begin(), rows.first.end() - 1);
  for (int64_t i = 0; i < n; ++i) rows.order[next[labels[i]]++] = i;
  return rows;
}

// work(j) for each centroid j, shared among threads by the number of rows.
template <class Work>
void for_centroids(const Rows& rows, int threads, const Work& work) {
  const int64_t n = rows.order.size(), k = rows.first.size() - 1;
  in_threads(threads, kTasks, [&](int64_t task) {  // centroid j belongs to the task in which its first row lies
    const auto start = [&](int64_t t) {
      if (n == 0) return t * k / kTasks;
      return static_cast<int64_t>(std::lower_bound(rows.first.begin(), rows.first.end() - 1, t * n / kTasks) -
                                  rows.first.begin());
    };
    const int64_t end = task + 1 == kTasks ? k : start(task + 1);
    for (int64_t j = start(task); j < end; ++j) work(j);
  });
}

// add(x, weight) for the rows of centroid j: x(d) is a coordinate as float64.
template <class Number, class Add>
void for_rows(uintptr_t points, int64_t stride, const double* weights, const Rows& rows, int64_t j, const Add& add) {
  for (int64_t i = rows.first[j]; i < rows.first[j + 1]; ++i) {
    const int64_t row = rows.order[i];
    const Number* x = reinterpret_cast<const Number*>(points) + row * stride;
    if (i + 2 < rows.first[j + 1]) {
      __builtin_prefetch(reinterpret_cast<const Number*>(points) + rows.order[i + 2] * stride);
    }
    add([x](int64_t d) { return to_double(x[d]); }, weights ? weights[row] : 1.0);
  }
}

template <class Add>
void for_rows(int type, uintptr_t points, int64_t stride, const double* weights, const Rows& rows, int64_t j,
              const Add& add) {
  switch (static_cast<Type>(type)) {
    case Type::float32: return for_rows<float>(points, stride, weights, rows, j, add);
    case Type::float16: return for_rows<Half>(points, stride, weights, rows, j, add);
    case Type::bfloat16: return for_rows<Bfloat16>(points, stride, weights, rows, j, add);
    case Type::float64: return for_rows<double>(points, stride, weights, rows, j, add);
  }
}

}  // namespace

void kmeans_update(uintptr_t points, int type, int64_t stride, uintptr_t assignment, uintptr_t weights, int64_t n,
                   int64_t k, int64_t dimensions, uintptr_t sums, uintptr_t counts, int threads) {
  const Rows rows = sorted(reinterpret_cast<const int32_t*>(assignment), n, k);
  for_centroids(rows, threads, [&](int64_t j) {
    reinterpret_cast<int64_t*>(counts)[j] = rows.first[j + 1] - rows.first[j];
    double* sum = reinterpret_cast<double*>(sums) + j * dimensions;
    std::memset(sum, 0, dimensions * sizeof(double));
    for_rows(type, points, stride, reinterpret_cast<const double*>(weights), rows, j, [&](auto x, double weight) {
      for (int64_t d = 0; d < dimensions; ++d) sum[d] += x(d) * weight;
    });
  });
}

void add_exactly(uintptr_t points, int type, int64_t stride, uintptr_t assignment, uintptr_t weights, int64_t n,
                 int64_t k, int64_t dimensions, double sign, std::vector<double> grids, uintptr_t bins, int threads) {
  const Rows rows = sorted(reinterpret_cast<const int32_t*>(assignment), n, k);
  // Adding and taking away 1.5 * 2^52 rounds to whole numbers, halves to even, what is smaller than 2^51.
  constexpr double kRound = 6755399441055744.0;
  const double coarse = grids.empty() ? 1 : grids[0], fine = grids.empty() ? 1 : grids[1];
  const double per_coarse = 1 / coarse, per_fine = 1 / fine;
  for_centroids(rows, threads, [&](int64_t j) {
    double* high = reinterpret_cast<double*>(bins) + j * dimensions;
    double* low = high + k * dimensions;
    for_rows(type, points, stride, reinterpret_cast<const double*>(weights), rows, j, [&](auto x, double weight) {
      if (grids.empty()) {
        for (int64_t d = 0; d < dimensions; ++d) high[d] += sign * x(d);
        return;
      }
      for (int64_t d = 0; d < dimensions; ++d) {
        const double value = x(d) * weight;
        const double first = ((value * per_coarse + kRound) - kRound) * coarse;
        const double second = (((value - first) * per_fine + kRound) - kRound) * fine;
        high[d] += sign * first;
        low[d] += sign * second;
      }
    });
  });
}

}  // namespace diffprune::cpu
