// kmeans_update: the points of each centroid, sorted by centroid beforehand, added one by one in float64.
#include "host.cuh"

namespace diffprune {

namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 8;  // per multiprocessor, of up to 128 registers a thread: ptxas left to itself saves registers by
                            // waiting for loads one after the other
constexpr int kAhead = 8;   // rows whose loads are under way before the first addition

__device__ __forceinline__ double to_double(double value) { return value; }
template <class T>
__device__ __forceinline__ double to_double(T value) { return to_float(value); }

// Neighbours of one row, read in at most two accesses of 16 bytes.
template <class T, int Columns>
struct alignas(Columns * sizeof(T) < 16 ? Columns * sizeof(T) : 16) Neighbours {
  T values[Columns];
};

// Calls `add` with what `load` gives for each place, in order.
template <class Load, class Add>
__device__ __forceinline__ void add_in_order(int64_t place, int64_t end, const Load& load, const Add& add) {
  for (; place + kAhead <= end; place += kAhead) {
    decltype(load(place)) loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) loaded[i] = load(place + i);
#pragma unroll
    for (int i = 0; i < kAhead; ++i) add(loaded[i]);
  }
  for (; place < end; ++place) add(load(place));
}

// A thread per centroid and Columns dimensions; the additions keep the order of the rows, so the bytes are those of a loop.
template <class T, int Columns, bool Weighted>
__global__ void __launch_bounds__(kThreads, kBlocks)
kmeans_update_sums(const T* points,         // [n, dimensions], a multiple of Columns; Neighbours are aligned
                   const int64_t* order,    // [n]: rows, by centroid
                   const int64_t* offsets,  // [k + 1]
                   const double* weights,   // [n], if Weighted
                   double* sums,            // [k, dimensions]
                   double* totals,          // [k], if Weighted
                   int dimensions) {
  const int centroid = blockIdx.x, group = blockIdx.y * kThreads + threadIdx.x, d = group * Columns;
  const int64_t first = offsets[centroid], end = offsets[centroid + 1];
  if (d < dimensions) {
    struct Loaded {
      Neighbours<T, Columns> numbers;
      double weight;
    };
    const auto load = [&](int64_t place) {
      const int64_t row = order[place];
      const auto numbers = reinterpret_cast<const Neighbours<T, Columns>*>(points + row * dimensions + d);
      return Loaded{*numbers, Weighted ? weights[row] : 1.0};
    };
    double sum[Columns] = {};
    add_in_order(first, end, load, [&](const Loaded& loaded) {
#pragma unroll
      for (int i = 0; i < Columns; ++i) {
        const double number = to_double(loaded.numbers.values[i]);
        sum[i] = __dadd_rn(sum[i], Weighted ? __dmul_rn(number, loaded.weight) : number);
      }
    });
#pragma unroll
    for (int i = 0; i < Columns; ++i) sums[int64_t(centroid) * dimensions + d + i] = sum[i];
  } else if (Weighted && group == dimensions / Columns) {  // the sum of the weights: one group more
    double total = 0;
    add_in_order(first, end, [&](int64_t place) { return weights[order[place]]; },
                 [&](double weight) { total = __dadd_rn(total, weight); });
    totals[centroid] = total;
  }
}

template <class T, int Columns, bool Weighted>
void launch_sums(const Queue& queue, uint64_t points, uint64_t order, uint64_t offsets, uint64_t weights, uint64_t sums,
                 uint64_t totals, int k, int dimensions) {
  launch("kmeans_update", kmeans_update_sums<T, Columns, Weighted>,
         dim3(k, ceil_div(dimensions / Columns + (Weighted ? 1 : 0), kThreads)), kThreads, 0, 1, queue.stream,
         pointer<T>(points), pointer<int64_t>(order), pointer<int64_t>(offsets), pointer<double>(weights),
         pointer<double>(sums), pointer<double>(totals), dimensions);
}

}  // namespace

void kmeans_update(const Where& where, int dtype, uint64_t points, uint64_t order, uint64_t offsets, uint64_t weights,
                   uint64_t sums, uint64_t totals, int64_t k, int64_t dimensions) {
  const Queue queue(where);
  const int centroids = narrow(k, "centroids"), columns = narrow(dimensions, "dimensions");
  const bool aligned = dimensions % 4 == 0 && points % 16 == 0;
  const auto body = [&](auto type) {
    using T = decltype(type);
    const auto run = aligned ? (weights ? launch_sums<T, 4, true> : launch_sums<T, 4, false>)
                             : (weights ? launch_sums<T, 1, true> : launch_sums<T, 1, false>);
    run(queue, points, order, offsets, weights, sums, totals, centroids, columns);
  };
  if (dtype == kFloat64) body(double());
  else with_type(dtype, body);
}

}  // namespace diffprune
