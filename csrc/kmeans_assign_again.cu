// kmeans_assign: the rows that two candidates do not decide.
#include "gemm_sm80.cuh"
#include "kmeans_search.cuh"

namespace diffprune {

namespace {

constexpr int kWarps = kBlockThreads / 32;
constexpr int kFewColumns = 32;  // that a row is compared with in float64, at most, if not with all
constexpr int kTogether = 4;     // rows that share one pass over all centroids
constexpr int kFoundBytes = kBlockTile * 4;
static_assert(kBlockSharedBytes + kFoundBytes <= 99 * 1024, "the least that a block can have on 8.x, 10.x and 12.x");

// 128 rows of the list at a time. Which columns are found does not depend on their order, nor does their minimum.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
kmeans_search_few(const T* points,         // [n, dimensions]
                  const float* centroids,  // [k, dimensions]
                  SearchInputs inputs, SearchShape shape,
                  const float4* values,  // [n], the third is what v must reach
                  const int* again,      // [1 + n]: how many rows, the rows
                  int* few,              // [blocks, kBlockTile, kFewColumns]: columns
                  int* rest,             // [1 + n]: rows for which these were too many, or none
                  int* assignment,       // [n]
                  float* sqdistance,     // [n]
                  int dimensions) {
  const int count = again[0], warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const ListedRows<__half> x{reinterpret_cast<const __half*>(inputs.x), count, shape.depth, again + 1};
  const Matrix<__half> c{reinterpret_cast<const __half*>(inputs.c), shape.k, shape.depth};
  unsigned char* shared = shared_memory();
  int* found = reinterpret_cast<int*>(shared + kBlockSharedBytes - kAlignmentBytes);  // [kBlockTile]: how many columns
  few += int64_t(blockIdx.x) * kBlockTile * kFewColumns;
  const BlockThread thread;
  for (int start = blockIdx.x * kBlockTile; start < count; start += gridDim.x * kBlockTile) {
    if (threadIdx.x < kBlockTile) found[threadIdx.x] = 0;
    float scale[2][2], least[2][2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int entry = start + thread.row(i, 2 * half), row = entry < count ? again[1 + entry] : 0;
        scale[i][half] = inputs.per_unit[0] * (inputs.scale != nullptr ? inputs.scale[row] : 1.0f);
        least[i][half] = entry < count ? values[row].z : INFINITY;
      }
    for (int column = 0; column < shape.k; column += kBlockTile) {
      BlockResults products;
      multiply_block<__half, false, false>(products, shared, x, start, c, column);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int at = column + thread.column(j, e);
              const float v = fmaf(products[i][j][2 * half + e], scale[i][half], -inputs.offset[at]);
              if (v >= least[i][half]) {
                const int row = thread.row(i, 2 * half), place = atomicAdd(&found[row], 1);
                if (place < kFewColumns) few[row * kFewColumns + place] = at;
              }
            }
    }
    __syncthreads();
    for (int i = warp; i < kBlockTile && start + i < count; i += kWarps) {
      const int row = again[1 + start + i], columns = found[i];
      if (columns == 0 || columns > kFewColumns) {
        if (lane == 0) rest[1 + atomicAdd(rest, 1)] = row;
        continue;
      }
      double smallest = INFINITY;
      int nearest = shape.k;
      for (int entry = 0; entry < columns; ++entry) {
        const int at = few[i * kFewColumns + entry];
        const double distance =
            exact_sqdistance(points + int64_t(row) * dimensions, centroids + int64_t(at) * dimensions, dimensions);
        if (distance < smallest || (distance == smallest && at < nearest)) {
          smallest = distance;
          nearest = at;
        }
      }
      if (lane == 0) {
        assignment[row] = nearest;
        sqdistance[row] = static_cast<float>(smallest);
      }
    }
    __syncthreads();  // before `found` and `few` are written again
  }
}

// Rows of the list, kTogether at a time per block; each warp takes every 8th centroid. Rows do not depend on each other,
// so their order on the list does not matter.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 2)
kmeans_search_all(const T* points,         // [n, dimensions]
                  const float* centroids,  // [k, dimensions]
                  const int* rows,         // [1 + n]
                  int* assignment,         // [n]
                  float* sqdistance,       // [n]
                  int k, int dimensions) {
  double* distances = reinterpret_cast<double*>(shared_memory());         // [kTogether, warps]
  int* columns = reinterpret_cast<int*>(distances + kTogether * kWarps);  // [kTogether, warps]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = rows[0];
  for (int start = blockIdx.x * kTogether; start < count; start += gridDim.x * kTogether) {
    const T* x[kTogether];
    double smallest[kTogether];
    int nearest[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int entry = start + i < count ? start + i : count - 1;
      x[i] = points + int64_t(rows[1 + entry]) * dimensions;
      smallest[i] = INFINITY;
      nearest[i] = k;
    }
    for (int column = warp; column < k; column += kWarps) {
      const float* c = centroids + int64_t(column) * dimensions;
      double sums[kTogether] = {};
      for (int d = lane; d < dimensions; d += 32) {
        const double number = c[d];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          const double difference = double(to_float(x[i][d])) - number;
          sums[i] += difference * difference;
        }
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const double sum = warp_sum(sums[i]);
        if (sum < smallest[i] || nearest[i] == k) {  // NaN: the first column stays
          smallest[i] = sum;
          nearest[i] = column;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i)
      if (lane == 0) {
        distances[i * kWarps + warp] = smallest[i];
        columns[i * kWarps + warp] = nearest[i];
      }
    __syncthreads();
    if (threadIdx.x < kTogether && start + int(threadIdx.x) < count) {
      const int first = threadIdx.x * kWarps;
      int best = first;  // warp 0 has column 0
      for (int i = first + 1; i < first + kWarps; ++i)
        if (columns[i] < k && (distances[i] < distances[best] || (distances[i] == distances[best] && columns[i] < columns[best])))
          best = i;
      const int row = rows[1 + start + threadIdx.x];
      assignment[row] = columns[best];
      sqdistance[row] = static_cast<float>(distances[best]);
    }
    __syncthreads();
  }
}

}  // namespace

int64_t kmeans_search_again_few(const Where& where, int64_t n) {
  const int64_t tiles = (n + kBlockTile - 1) / kBlockTile, blocks = Queue(where).multiprocessors;
  return (tiles < blocks ? tiles : blocks) * kBlockTile * kFewColumns;
}

void kmeans_search_again(const Where& where, int dtype, uint64_t points, uint64_t centroids, uint64_t x, uint64_t c,
                         uint64_t offset, uint64_t scale, uint64_t per_unit, uint64_t values, uint64_t again, uint64_t few,
                         uint64_t rest, uint64_t assignment, uint64_t sqdistance, int64_t n, int64_t k, int64_t dimensions,
                         int64_t padded) {
  const Queue queue(where);
  const SearchInputs inputs{x, c, pointer<float>(offset), pointer<float>(scale), pointer<float>(per_unit)};
  const SearchShape shape{narrow(n, "points"), narrow(k, "centroids"), narrow(padded, "dimensions"), 0};
  const int depth = narrow(dimensions, "dimensions");
  const int blocks = int(kmeans_search_again_few(where, n) / (kBlockTile * kFewColumns));
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch("kmeans_search_few", kmeans_search_few<T>, dim3(blocks), kBlockThreads, kBlockSharedBytes + kFoundBytes, 1,
           queue.stream, pointer<T>(points), pointer<float>(centroids), inputs, shape, pointer<float4>(values),
           pointer<int>(again), pointer<int>(few), pointer<int>(rest), pointer<int>(assignment), pointer<float>(sqdistance),
           depth);
    launch("kmeans_search_all", kmeans_search_all<T>, dim3(4 * queue.multiprocessors), kBlockThreads,
           kAlignmentBytes + kTogether * kWarps * 12, 1, queue.stream, pointer<T>(points), pointer<float>(centroids),
           pointer<int>(rest), pointer<int>(assignment), pointer<float>(sqdistance), shape.k, depth);
  });
}

}  // namespace diffprune
