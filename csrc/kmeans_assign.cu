// kmeans_assign: rounding of the points, the search for sm_80, and the decision.
#include "fours.cuh"
#include "gemm_sm80.cuh"
#include "kmeans_search.cuh"

namespace diffprune {

namespace {

constexpr int kRowThreads = 256;  // a warp per row
constexpr int kRowsPerBlock = kRowThreads / 32;
constexpr int kRowBlocks = 4;  // per multiprocessor, of at least 64 registers a thread: ptxas left to itself saves registers
                               // by waiting for every load before the next
constexpr int kAhead = 3;      // loads of four numbers of a row before the first sum

__device__ __forceinline__ float warp_max(float value) {
  for (int distance = 16; distance > 0; distance /= 2) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// A row that float16 cannot hold gets infinite norms, which no decision survives.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
kmeans_round_rows(const T* points,       // [n, dimensions]
                  const float* centre,   // [dimensions]
                  __half* rounded,       // [n, padded]
                  float* scale,          // [n]
                  float2* norms,         // [n]
                  int n, int dimensions, int padded, bool aligned) {
  const int row = blockIdx.x * kRowsPerBlock + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= n) return;
  const T* x = points + int64_t(row) * dimensions;
  const auto load = [&](float (&values)[4], int d) {
    float own[4];
    load_four(values, x + d, dimensions - d, aligned);
    load_four(own, centre + d, dimensions - d, aligned);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] -= own[i];
  };
  float largest = 0;
  for (int d = 4 * lane; d < dimensions; d += 4 * 32) {
    float values[4];
    load(values, d);
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(values[i]));
  }
  largest = warp_max(largest);
  // 2^e so that the largest number is in [2^13, 2^14); fmaxf passed over NaNs, the norm below does not.
  int exponent = 0;
  const bool usable = largest > 1e-30f && largest < 1e30f;
  if (usable) frexpf(largest, &exponent);
  const float up = ldexpf(1.0f, 14 - exponent), down = ldexpf(1.0f, exponent - 14);
  float norm = 0, error = 0;
  for (int d = 4 * lane; d < padded; d += 4 * 32) {
    float values[4];
    Four<__half> halves;
    load(values, d);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      halves.values[i] = __float2half_rn(values[i] * up);
      const float back = to_float(halves.values[i]) * down;
      norm += back * back;
      error += (values[i] - back) * (values[i] - back);
    }
    halves.write(rounded + int64_t(row) * padded + d);
  }
  norm = sqrtf(warp_sum(norm));
  error = sqrtf(warp_sum(error));
  if (lane == 0) {
    scale[row] = down;
    // Up for the float32 sums (relative 2^-23 per addition) and for the rounding of x - centre (2^-24 of it).
    const float slack = 1.0f + dimensions * 1.2e-7f;
    const bool finite = norm < 1e30f && (usable || largest == 0.0f);
    norms[row] = finite ? make_float2(norm * slack, error * slack + (norm + error) * 1.2e-7f) : make_float2(INFINITY, INFINITY);
  }
}

__global__ void __launch_bounds__(kBlockThreads, 1)
kmeans_search_sm80(SearchInputs inputs, SearchOutputs outputs, SearchShape shape) {
  const Matrix<__half> x{reinterpret_cast<const __half*>(inputs.x), shape.n, shape.depth};
  const Matrix<__half> c{reinterpret_cast<const __half*>(inputs.c), shape.k, shape.depth};
  unsigned char* shared = shared_memory();
  const BlockThread thread;
  const int first_row = blockIdx.x * kBlockTile;
  const float per_unit = inputs.per_unit[0];
  Best best[2][2];
  float scale[2][2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + thread.row(i, 2 * half);
      scale[i][half] = per_unit * (inputs.scale != nullptr && row < shape.n ? inputs.scale[row] : 1.0f);
    }
  for (int column = 0; column < shape.k; column += kBlockTile) {
    BlockResults products;
    multiply_block<__half, false, false>(products, shared, x, first_row, c, column);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Group group(shape.value_bits);
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            group.add(fmaf(products[i][j][2 * half + e], scale[i][half], -inputs.offset[column + thread.column(j, e)]),
                      2 * j + e);
        best[i][half].add(group.first, column + thread.column(group.index() / 2, group.index() % 2));
        best[i][half].add_unknown(group.second);
      }
  }
  // Two warps share each row.
  Best* others = reinterpret_cast<Best*>(shared);
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      merge_lanes(best[i][half]);
      if (thread.warp_column > 0 && thread.lane % 4 == 0) others[thread.row(i, 2 * half)] = best[i][half];
    }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = thread.row(i, 2 * half);
      if (thread.warp_column == 0 && thread.lane % 4 == 0 && first_row + row < shape.n) {
        best[i][half].merge(others[row]);
        outputs.write(first_row + row, best[i][half]);
      }
    }
}

// 2E for the columns that can be nearest, E as in diffprune/kernels/triton/search.py, tolerance: there is why. size: ‖x̂‖ of
// what was multiplied; lost: ‖x − μ − x̂‖; reach: ‖x − μ‖.
__device__ __forceinline__ float tolerance(float size, float lost, float reach, const float* limits, int dimensions) {
  const float smallest = limits[1], largest = limits[2], ratio = limits[3], kept = limits[4];
  const float sums = (dimensions + 16) * 1.7881393e-7f;  // 1.5 * 2^-23
  const float floor = 6.1035156e-5f * sqrtf(float(dimensions));
  const float slope =
      lost + (lost + reach) * ratio + size * (1.01f + ratio) * (sums + 1.2e-7f) + 1.2e-7f * (kept + reach);
  const float length = fminf(2.0f * reach + smallest + 2.0f * slope, largest) + floor;
  return (2.02f + 5e-7f * dimensions) * length * (slope + 1.2e-7f * length) + 1e-30f;
}

struct RowSums {
  float squares, size, reach;  // of x - c, x and x - μ
};

// Each lane's share of a row's.
template <class T>
__device__ __forceinline__ RowSums row_sums(const T* x, const float* c, const float* centre, int dimensions, bool aligned) {
  RowSums sums = {0, 0, 0};
  for (int start = threadIdx.x % 32 * 4; start < dimensions; start += kAhead * 4 * 32) {
    float numbers[kAhead][4], nearest[kAhead][4], own[kAhead][4];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int d = start + i * 4 * 32;
      load_four(numbers[i], x + d, dimensions - d, aligned);
      load_four(nearest[i], c + d, dimensions - d, aligned);
      load_four(own[i], centre + d, dimensions - d, aligned);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float number = numbers[i][j], difference = number - nearest[i][j], centred = number - own[i][j];
        sums.squares += difference * difference;
        sums.size += number * number;
        sums.reach += centred * centred;
      }
  }
  return sums;
}

// A warp per row. The nearest centroid has v >= first - 2E: if only the first does, it is the nearest; if only two do, they
// are compared in float64; otherwise the row is put on the list `again`, and what its v must reach replaces the bound of the
// others.
template <class T>
__global__ void __launch_bounds__(kRowThreads, kRowBlocks)
kmeans_decide_rows(const T* points,         // [n, dimensions]
                   const float* centroids,  // [k, dimensions]
                   const float* centre,     // [dimensions]
                   float4* values,          // [n]
                   const int2* candidates,  // [n]
                   const float2* norms,     // [n], or null: the points are multiplied as they are
                   const float* limits,     // [6]
                   int* again,              // [1 + n]: how many rows, the rows
                   int* assignment,         // [n]
                   float* sqdistance,       // [n]
                   int n, int k, int dimensions, bool aligned) {
  const int row = blockIdx.x * kRowsPerBlock + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= n) return;
  const T* x = points + int64_t(row) * dimensions;
  const float4 value = values[row];
  int2 candidate = candidates[row];
  candidate.x = min(candidate.x, k - 1);  // rows without a comparable value have any column
  candidate.y = min(candidate.y, k - 1);
  const float* c = centroids + int64_t(candidate.x) * dimensions;
  // In one branch each, not one per load.
  const RowSums sums = aligned ? row_sums(x, c, centre, dimensions, true) : row_sums(x, c, centre, dimensions, false);
  float squares = warp_sum(sums.squares);
  const float per_unit = limits[0];
  float twice;
  if (norms == nullptr) {
    twice = tolerance(per_unit * sqrtf(warp_sum(sums.size)), 0, per_unit * sqrtf(warp_sum(sums.reach)), limits, dimensions);
  } else {
    const float rounded = per_unit * norms[row].x, lost = per_unit * norms[row].y;
    twice = tolerance(rounded, lost, rounded + lost, limits, dimensions);
  }
  // 2^-16: the tags in the last bits of both values, twice over.
  const bool one = value.x - value.y > twice + 1.6e-5f * (fabsf(value.x) + fabsf(value.y));
  const bool two = value.x - value.z > twice + 1.6e-5f * (fabsf(value.x) + fabsf(value.z));
  int nearest = candidate.x;
  if (!one) {
    if (two) {
      const double first = exact_sqdistance(x, c, dimensions);
      const double second = exact_sqdistance(x, centroids + int64_t(candidate.y) * dimensions, dimensions);
      if (second < first || (second == first && candidate.y < candidate.x)) nearest = candidate.y;
      squares = static_cast<float>(nearest == candidate.x ? first : second);
    } else if (k > 1) {
      if (lane == 0) {
        again[1 + atomicAdd(again, 1)] = row;
        // Where it is not finite v may be NaN or infinite: none reaches NaN.
        values[row].z = twice < 1e37f ? value.x - twice - 1.6e-5f * fabsf(value.x) : NAN;
      }
      return;
    }
  }
  if (lane == 0) {
    assignment[row] = nearest;
    sqdistance[row] = squares;
  }
}

}  // namespace

void search_sm80(const Queue& queue, SearchInputs inputs, SearchOutputs outputs, SearchShape shape) {
  launch("kmeans_search_sm80", kmeans_search_sm80, dim3(ceil_div(shape.n, kBlockTile)), kBlockThreads, kBlockSharedBytes, 1,
         queue.stream, inputs, outputs, shape);
}

// Whether rows of float32 and of `points` can be read four numbers at a time: from multiples of 16 bytes.
bool aligned_rows(int64_t dimensions, uint64_t points, uint64_t centroids, uint64_t centre) {
  return dimensions % 4 == 0 && (points | centroids | centre) % 16 == 0;
}

void kmeans_round(const Where& where, int dtype, uint64_t points, uint64_t centre, uint64_t rounded, uint64_t scale,
                  uint64_t norms, int64_t n, int64_t dimensions, int64_t padded) {
  const Queue queue(where);
  const int rows = narrow(n, "points");
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch("kmeans_round", kmeans_round_rows<T>, dim3(ceil_div(rows, kRowsPerBlock)), kRowThreads, 0, 1, queue.stream,
           pointer<T>(points), pointer<float>(centre), pointer<__half>(rounded), pointer<float>(scale),
           pointer<float2>(norms), rows, narrow(dimensions, "dimensions"), narrow(padded, "dimensions"),
           aligned_rows(dimensions, points, 0, centre));
  });
}

void kmeans_search(const Where& where, uint64_t x, uint64_t c, uint64_t offset, uint64_t scale, uint64_t per_unit,
                   uint64_t values, uint64_t candidates, int64_t n, int64_t k, int64_t padded, int64_t columns) {
  const Queue queue(where);
  const SearchInputs inputs{x, c, pointer<float>(offset), pointer<float>(scale), pointer<float>(per_unit)};
  const SearchOutputs outputs{pointer<float4>(values), pointer<int2>(candidates)};
  const SearchShape shape{narrow(n, "points"), narrow(k, "centroids"), narrow(padded, "dimensions"),
                          narrow(columns, "centroids")};
#ifdef DIFFPRUNE_SM90
  if (queue.path == 90) search_sm90(queue, inputs, outputs, shape);
#endif
  if (queue.path == 80) search_sm80(queue, inputs, outputs, shape);
}

void kmeans_decide(const Where& where, int dtype, uint64_t points, uint64_t centroids, uint64_t centre, uint64_t values,
                   uint64_t candidates, uint64_t norms, uint64_t limits, uint64_t again, uint64_t assignment,
                   uint64_t sqdistance, int64_t n, int64_t k, int64_t dimensions) {
  const Queue queue(where);
  const int rows = narrow(n, "points"), columns = narrow(k, "centroids"), depth = narrow(dimensions, "dimensions");
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch("kmeans_decide", kmeans_decide_rows<T>, dim3(ceil_div(rows, kRowsPerBlock)), kRowThreads, 0, 1, queue.stream,
           pointer<T>(points), pointer<float>(centroids), pointer<float>(centre), pointer<float4>(values),
           pointer<int2>(candidates), pointer<float2>(norms), pointer<float>(limits), pointer<int>(again),
           pointer<int>(assignment), pointer<float>(sqdistance), rows, columns, depth,
           aligned_rows(dimensions, points, centroids, centre));
  });
}

}  // namespace diffprune
