// What the kernels of kmeans_assign share: the best candidates of a row, and how tiles of products feed them.
#pragma once

#include "host.cuh"

namespace diffprune {

constexpr float kNoValue = -3.0e38f;
constexpr int kSearchColumns = 256;  // the centroids are padded to a multiple of it; so is every tile

// The two largest values of a row with their columns, and a bound for every other value.
struct Best {
  float first = kNoValue, second = kNoValue, bound = kNoValue;
  int column = 0, runner_up = 0;

  __device__ __forceinline__ void add(float value, int at) {
    if (value > first) {
      bound = second;
      second = first;
      runner_up = column;
      first = value;
      column = at;
    } else if (value > second) {
      bound = second;
      second = value;
      runner_up = at;
    } else {
      bound = fmaxf(bound, value);
    }
  }

  // One value more that may stand for several smaller ones, whose columns nobody knows: never among the two that are
  // compared exactly.
  __device__ __forceinline__ void add_unknown(float value) {
    second = fmaxf(second, value);
    bound = fmaxf(bound, value);
  }

  __device__ __forceinline__ void merge(const Best& other) {
    add(other.first, other.column);
    add(other.second, other.runner_up);
    bound = fmaxf(bound, other.bound);
  }
};

// The two largest of up to 64 values of one row. The column is kept in the value's last 6 bits, so that a value costs one
// AND-OR and three comparisons; that changes it by at most 2^-17 of itself.
struct Group {
  unsigned value_bits;  // SearchShape's
  float first = kNoValue, second = kNoValue;

  __device__ __forceinline__ explicit Group(unsigned value_bits) : value_bits(value_bits) {}

  __device__ __forceinline__ void add(float value, int index) {
    const float tagged = __uint_as_float((__float_as_uint(value) & value_bits) | unsigned(index));
    second = fmaxf(second, fminf(first, tagged));
    first = fmaxf(first, tagged);
  }

  __device__ __forceinline__ int index() const { return int(__float_as_uint(first) & 63u); }
};

// Merges the four lanes that share a row.
__device__ __forceinline__ void merge_lanes(Best& best) {
  for (int distance = 1; distance <= 2; distance *= 2) {
    Best other;
    other.first = __shfl_xor_sync(0xffffffffu, best.first, distance);
    other.second = __shfl_xor_sync(0xffffffffu, best.second, distance);
    other.bound = __shfl_xor_sync(0xffffffffu, best.bound, distance);
    other.column = __shfl_xor_sync(0xffffffffu, best.column, distance);
    other.runner_up = __shfl_xor_sync(0xffffffffu, best.runner_up, distance);
    best.merge(other);
  }
}

// Σ (x − c)² in float64, by a warp, for every lane.
template <class T>
__device__ __forceinline__ double exact_sqdistance(const T* x, const float* c, int dimensions) {
  double sum = 0;
  for (int d = threadIdx.x % 32; d < dimensions; d += 32) {
    const double difference = double(to_float(x[d])) - double(c[d]);
    sum += difference * difference;
  }
  return warp_sum(sum);
}

struct SearchShape {
  int n, k, depth, columns;  // points, centroids, padded dimensions, centroids padded to a multiple of kSearchColumns
  unsigned value_bits = ~63u;  // for Group: one instruction takes only one constant, and the index is one
};

struct SearchInputs {
  uint64_t x, c;         // [n, depth], [k, depth] float16
  const float* offset;   // [columns]
  const float* scale;    // [n] or null
  const float* per_unit;  // [1]
};

struct SearchOutputs {
  float4* values;   // [n]: first, second, bound of the others, unused
  int2* candidates;  // [n]: columns of the first and the second

  __device__ __forceinline__ void write(int row, const Best& best) const {
    values[row] = make_float4(best.first, best.second, best.bound, 0.0f);
    candidates[row] = make_int2(best.column, best.runner_up);
  }
};

void search_sm80(const Queue& queue, SearchInputs inputs, SearchOutputs outputs, SearchShape shape);
void search_sm90(const Queue& queue, SearchInputs inputs, SearchOutputs outputs, SearchShape shape);

}  // namespace diffprune
