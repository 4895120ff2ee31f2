// Sums of the points of each centroid, rounded or exact. Rows are sorted by centroid, stably, so that each sum is made by
// one thread, in row order, whatever the number of threads: N D reads, no atomics, no copy of the sums per thread.
#include <cstring>

#include "halves.h"
#include "ops.h"
#include "threads.h"

namespace diffprune::cpu {
namespace {

constexpr int64_t kTasks = 64;  // ranges of centroids with about as many entries each
constexpr int64_t kFew = 64;    // entries that are not worth a second thread

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

// What is added to the sums: entry i is point rows[i], of centroid to[i]; entry n + i takes it from centroid from[i].
struct Entries {
  const int64_t* rows;     // or null: i
  const int32_t* to;       // [n]
  const int32_t* from;     // [n], or null: nothing is taken away
  const double* weights;   // [n], or null
  int64_t n;

  int64_t size() const { return from ? 2 * n : n; }
  int64_t centroid(int64_t entry) const { return entry < n ? to[entry] : from[entry - n]; }
  int64_t place(int64_t entry) const { return entry < n ? entry : entry - n; }
  int64_t row(int64_t entry) const { return rows ? rows[place(entry)] : place(entry); }
  double weight(int64_t entry) const { return weights ? weights[place(entry)] : 1.0; }
};

struct Sorted {
  std::vector<int64_t> order, first;  // entries by centroid, stably; where those of each centroid begin, [K + 1]
};

Sorted sorted(const Entries& entries, int64_t k) {
  const int64_t size = entries.size();
  Sorted found{std::vector<int64_t>(size), std::vector<int64_t>(k + 1, 0)};
  for (int64_t i = 0; i < size; ++i) ++found.first[entries.centroid(i) + 1];
  for (int64_t j = 0; j < k; ++j) found.first[j + 1] += found.first[j];
  std::vector<int64_t> next(found.first.begin(), found.first.end() - 1);
  for (int64_t i = 0; i < size; ++i) found.order[next[entries.centroid(i)]++] = i;
  return found;
}

// work(j) for each centroid j, shared among threads by the number of entries.
template <class Work>
void for_centroids(const Sorted& sorted, int threads, const Work& work) {
  const int64_t n = sorted.order.size(), k = sorted.first.size() - 1;
  in_threads(n < kFew ? 1 : threads, kTasks, [&](int64_t task) {  // a centroid is its first entry's task's
    const auto start = [&](int64_t t) {
      if (n == 0) return t * k / kTasks;
      return static_cast<int64_t>(std::lower_bound(sorted.first.begin(), sorted.first.end() - 1, t * n / kTasks) -
                                  sorted.first.begin());
    };
    const int64_t end = task + 1 == kTasks ? k : start(task + 1);
    for (int64_t j = start(task); j < end; ++j) work(j);
  });
}

// add(x, entry) for the entries of centroid j: x(d) is a coordinate of its point as float64.
template <class Number, class Add>
void for_entries(uintptr_t points, int64_t stride, const Entries& entries, const Sorted& sorted, int64_t j,
                 const Add& add) {
  const auto at = [&](int64_t i) {
    return reinterpret_cast<const Number*>(points) + entries.row(sorted.order[i]) * stride;
  };
  for (int64_t i = sorted.first[j]; i < sorted.first[j + 1]; ++i) {
    const Number* x = at(i);
    if (i + 2 < sorted.first[j + 1]) __builtin_prefetch(at(i + 2));
    add([x](int64_t d) { return to_double(x[d]); }, sorted.order[i]);
  }
}

template <class Add>
void for_entries(int type, uintptr_t points, int64_t stride, const Entries& entries, const Sorted& sorted, int64_t j,
                 const Add& add) {
  switch (static_cast<Type>(type)) {
    case Type::float32: return for_entries<float>(points, stride, entries, sorted, j, add);
    case Type::float16: return for_entries<Half>(points, stride, entries, sorted, j, add);
    case Type::bfloat16: return for_entries<Bfloat16>(points, stride, entries, sorted, j, add);
    case Type::float64: return for_entries<double>(points, stride, entries, sorted, j, add);
  }
}

}  // namespace

void kmeans_update(uintptr_t points, int type, int64_t stride, uintptr_t assignment, uintptr_t weights, int64_t n,
                   int64_t k, int64_t dimensions, uintptr_t sums, uintptr_t counts, int threads) {
  const Entries entries{nullptr, reinterpret_cast<const int32_t*>(assignment), nullptr,
                        reinterpret_cast<const double*>(weights), n};
  const Sorted by_centroid = sorted(entries, k);
  for_centroids(by_centroid, threads, [&](int64_t j) {
    reinterpret_cast<int64_t*>(counts)[j] = by_centroid.first[j + 1] - by_centroid.first[j];
    double* sum = reinterpret_cast<double*>(sums) + j * dimensions;
    std::memset(sum, 0, dimensions * sizeof(double));
    for_entries(type, points, stride, entries, by_centroid, j, [&](auto x, int64_t entry) {
      const double weight = entries.weight(entry);
      for (int64_t d = 0; d < dimensions; ++d) sum[d] += x(d) * weight;
    });
  });
}

void add_exactly(uintptr_t points, int type, int64_t stride, uintptr_t rows, uintptr_t to, uintptr_t from,
                 uintptr_t weights, int64_t n, int64_t k, int64_t dimensions, std::vector<double> grids, uintptr_t bins,
                 int threads) {
  const Entries entries{reinterpret_cast<const int64_t*>(rows), reinterpret_cast<const int32_t*>(to),
                        reinterpret_cast<const int32_t*>(from), reinterpret_cast<const double*>(weights), n};
  const Sorted by_centroid = sorted(entries, k);
  // Adding and taking away 1.5 * 2^52 rounds to whole numbers, halves to even, what is smaller than 2^51.
  constexpr double kRound = 6755399441055744.0;
  const double coarse = grids.empty() ? 1 : grids[0], fine = grids.empty() ? 1 : grids[1];
  const double per_coarse = 1 / coarse, per_fine = 1 / fine;
  for_centroids(by_centroid, threads, [&](int64_t j) {
    double* high = reinterpret_cast<double*>(bins) + j * dimensions;
    double* low = high + k * dimensions;
    for_entries(type, points, stride, entries, by_centroid, j, [&](auto x, int64_t entry) {
      const double weight = entries.weight(entry), sign = entry < n ? 1 : -1;
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
