// What the Python module diffprune._cpu offers: plain functions of addresses and sizes, no torch.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kmeans_assign.h"

namespace diffprune::cpu {

// Instruction sets that this processor has and whose integer products were verified, the fastest first.
std::vector<std::string> variants();

// Nearest centroids of points [N, D] (float32, float16 or bfloat16 by `type`, rows `stride` elements apart) among
// centroids [K, D] float32: assignment [N] int32, sqdistance [N] float32. centre [D] is near the centroids.
// Returns how many pairs were compared in float32 and in float64.
std::pair<int64_t, int64_t> kmeans_assign(const std::string& variant, uintptr_t points, int type, int64_t stride,
                                          uintptr_t centroids, uintptr_t centre, int64_t n, int64_t k,
                                          int64_t dimensions, uintptr_t assignment, uintptr_t sqdistance, int threads);

}  // namespace diffprune::cpu
