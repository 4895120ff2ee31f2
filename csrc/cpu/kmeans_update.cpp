// Sums of the points of each centroid. Rows are sorted by centroid, stably, so that each sum is made by one thread, in
// row order, whatever the number of threads: N D reads, no atomics, no copy of the sums per thread.
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

template <class Number>
void add_rows(const Number* points, int64_t stride, const double* weights, const int64_t* rows, int64_t count,
              int64_t dimensions, double* sum) {
  for (int64_t i = 0; i < count; ++i) {
    const Number* x = points + rows[i] * stride;
    if (i + 2 < count) __builtin_prefetch(points + rows[i + 2] * stride);
    if (weights) {
      const double weight = weights[rows[i]];
      for (int64_t d = 0; d < dimensions; ++d) sum[d] += to_double(x[d]) * weight;
    } else {
      for (int64_t d = 0; d < dimensions; ++d) sum[d] += to_double(x[d]);
    }
  }
}

}  // namespace

void kmeans_update(uintptr_t points, int type, int64_t stride, uintptr_t assignment, uintptr_t weights, int64_t n,
                   int64_t k, int64_t dimensions, uintptr_t sums, uintptr_t counts, int threads) {
  const auto* labels = reinterpret_cast<const int32_t*>(assignment);
  auto* number = reinterpret_cast<int64_t*>(counts);
  std::vector<int64_t> first(k + 1, 0), rows(n);
  for (int64_t i = 0; i < n; ++i) ++first[labels[i] + 1];
  for (int64_t j = 0; j < k; ++j) first[j + 1] += first[j];
  for (int64_t j = 0; j < k; ++j) number[j] = first[j];
  for (int64_t i = 0; i < n; ++i) rows[number[labels[i]]++] = i;
  for (int64_t j = 0; j < k; ++j) number[j] = first[j + 1] - first[j];
  const auto sum_of = [&](int64_t j) {
    double* sum = reinterpret_cast<double*>(sums) + j * dimensions;
    std::memset(sum, 0, dimensions * sizeof(double));
    const auto add = [&](auto number) {
      using Number = decltype(number);
      add_rows(reinterpret_cast<const Number*>(points), stride, reinterpret_cast<const double*>(weights),
               rows.data() + first[j], first[j + 1] - first[j], dimensions, sum);
    };
    switch (static_cast<Type>(type)) {
      case Type::float32: return add(float{});
      case Type::float16: return add(Half{});
      case Type::bfloat16: return add(Bfloat16{});
      case Type::float64: return add(double{});
    }
  };
  in_threads(threads, kTasks, [&](int64_t task) {  // centroid j belongs to the task in which its first row lies
    const auto start = [&](int64_t t) {
      if (n == 0) return t * k / kTasks;
      return static_cast<int64_t>(std::lower_bound(first.begin(), first.end() - 1, t * n / kTasks) - first.begin());
    };
    const int64_t end = task + 1 == kTasks ? k : start(task + 1);
    for (int64_t j = start(task); j < end; ++j) sum_of(j);
  });
}

}  // namespace diffprune::cpu
