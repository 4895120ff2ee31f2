// kmeans_update: the points of each centroid, sorted by centroid beforehand, added one by one in float64.
#include "host.cuh"

namespace diffprune {

namespace {

constexpr int kThreads = 128;
constexpr int kAhead = 8;  // loads under way before the first addition

__device__ __forceinline__ double to_double(double value) { return value; }
template <class T>
__device__ __forceinline__ double to_double(T value) { return to_float(value); }

// A thread per centroid and dimension; the additions keep the order of the rows, so the bytes are those of a loop.
template <class T>
__global__ void __launch_bounds__(kThreads)
kmeans_update_sums(const T* points,         // [n, dimensions]
                   const int64_t* order,    // [n]: rows, by centroid
                   const int64_t* offsets,  // [k + 1]
                   const double* weights,   // [n] or null
                   double* sums,            // [k, dimensions]
                   double* totals,          // [k], with weights
                   int dimensions) {
  const int d = blockIdx.y * kThreads + threadIdx.x, centroid = blockIdx.x;
  const bool total = weights != nullptr && d == dimensions;  // the sum of the weights: one column more
  if (d >= dimensions && !total) return;
  const auto term = [&](int64_t place) {
    const int64_t row = order[place];
    const double value = total ? 1.0 : to_double(points[row * dimensions + d]);
    return weights != nullptr ? __dmul_rn(value, weights[row]) : value;
  };
  const int64_t end = offsets[centroid + 1];
  int64_t place = offsets[centroid];
  double sum = 0;
  for (; place + kAhead <= end; place += kAhead) {
    double terms[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) terms[i] = term(place + i);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) sum = __dadd_rn(sum, terms[i]);
  }
  for (; place < end; ++place) sum = __dadd_rn(sum, term(place));
  if (total) totals[centroid] = sum;
  else sums[int64_t(centroid) * dimensions + d] = sum;
}

}  // namespace

void kmeans_update(const Where& where, int dtype, uint64_t points, uint64_t order, uint64_t offsets, uint64_t weights,
                   uint64_t sums, uint64_t totals, int64_t k, int64_t dimensions) {
  const Queue queue(where);
  const int columns = narrow(dimensions, "dimensions");
  const dim3 grid(narrow(k, "centroids"), ceil_div(columns + (weights ? 1 : 0), kThreads));
  const auto body = [&](auto type) {
    using T = decltype(type);
    launch("kmeans_update", kmeans_update_sums<T>, grid, kThreads, 0, 1, queue.stream, pointer<T>(points),
           pointer<int64_t>(order), pointer<int64_t>(offsets), pointer<double>(weights), pointer<double>(sums),
           pointer<double>(totals), columns);
  };
  if (dtype == kFloat64) body(double());
  else with_type(dtype, body);
}

}  // namespace diffprune
