// What the Python module diffprune._cpu offers to kernels: addresses and sizes, no torch.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kmeans_assign.h"

namespace diffprune::cpu {

struct Tables;

// Instruction sets that this processor has and whose integer products were verified, the fastest first.
std::vector<std::string> variants();

// The search for nearest centroids among centroids [K, D] float32, which stay the caller's and have to stay; so does centre
// [D], which is near them. What the search needs of them alone is made once, for any number of points.
class CentroidSearch {
 public:
  CentroidSearch(const std::string& variant, uintptr_t centroids, uintptr_t centre, int64_t k, int64_t dimensions,
                 int threads);
  ~CentroidSearch();

  // Of points [N, D] (`type` is a Type, not float64; rows `stride` elements apart): assignment [N] int32, sqdistance [N]
  // float32. Returns how many pairs were compared in float32 and in float64.
  std::pair<int64_t, int64_t> assign(uintptr_t points, int type, int64_t stride, int64_t n, uintptr_t assignment,
                                     uintptr_t sqdistance, int threads) const;

 private:
  const Variant* variant_;
  std::unique_ptr<const Tables> tables_;
};

// Sum and number of the points [N, D] of each of k centroids, added in row order in float64: sums [K, D] float64, counts
// [K] int64. assignment [N] int32 in range. weights [N] float64 or 0: sums of w x instead.
void kmeans_update(uintptr_t points, int type, int64_t stride, uintptr_t assignment, uintptr_t weights, int64_t n,
                   int64_t k, int64_t dimensions, uintptr_t sums, uintptr_t counts, int threads);

// Add points, or w x, to exact sums: point rows[i], or i where rows is 0, to the sum of centroid to[i] and, unless from is
// 0, take it from that of from[i], for i below n. Each value is split into a multiple of grids[0] and what is left rounded
// to a multiple of grids[1] (powers of two; values below 2^51 grids[0]), added to bins [2, K, D] float64. Without grids it
// goes to bins [K, D] as it is, and then weights must be 0. rows [n] int64, to and from [n] int32, weights [n] float64.
void add_exactly(uintptr_t points, int type, int64_t stride, uintptr_t rows, uintptr_t to, uintptr_t from,
                 uintptr_t weights, int64_t n, int64_t k, int64_t dimensions, std::vector<double> grids, uintptr_t bins,
                 int threads);

}  // namespace diffprune::cpu
