// What the extension offers: plain C++, pointers to device memory, sizes, a device and its stream. Every function queues
// its work on the stream and returns; it throws std::runtime_error if CUDA refuses. Sizes are at least 1.
#pragma once

#include <cstdint>

namespace diffprune {

enum DType { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

// Where to run. path: 80 or 90 takes the matrix kernels of that generation, 0 the best the device has.
struct Where {
  int device;
  uint64_t stream;
  int path;
};

// dot[b] = Σ over the sample's tokens t and columns n of (Σ_k x[b,t,k]·w[n,k] + bias[n])·y[b,t,n].
// x [samples, tokens, depth], w [columns, depth] (transposed: [depth, columns]), y [samples, tokens, columns]: `dtype` (half
// precision), contiguous, 16-byte aligned, depth and columns multiples of 8. bias [columns] float32 or 0. partials: float32
// [linear_grad_dot_partials]. dot [samples] float32.
void linear_grad_dot(const Where& where, int dtype, uint64_t x, uint64_t w, uint64_t y, uint64_t bias, uint64_t partials,
                     uint64_t dot, int64_t samples, int64_t tokens, int64_t depth, int64_t columns, bool transposed);
int64_t linear_grad_dot_partials(const Where& where, int64_t samples, int64_t tokens, int64_t columns);

// sqnorm[b] = ‖Gᵀ·A‖² (+ ‖Σ_t G‖² with bias). a [samples, tokens, wide], g [samples, tokens, high]: as above, wide and
// high multiples of 8. gram: sum over pairs of tokens, and where its terms cancel (Σ|terms| > cancellation·Σ terms) once
// more by the direct form; else the direct form. partials: float32 [linear_grad_sqnorm_partials].
// again: int32 [1 + samples] for gram, else 0: how many samples were done once more, 0 on entry, and which. sqnorm
// [samples] float32.
void linear_grad_sqnorm(const Where& where, int dtype, uint64_t a, uint64_t g, uint64_t partials, uint64_t again,
                        uint64_t sqnorm, int64_t samples, int64_t tokens, int64_t wide, int64_t high, bool bias, bool gram,
                        float cancellation);
int64_t linear_grad_sqnorm_partials(const Where& where, int64_t samples, int64_t tokens, int64_t wide, int64_t high,
                                    bool gram);
// The same for one token: (‖a‖² + bias)·‖g‖², any dtype but float64.
void linear_grad_sqnorm_token(const Where& where, int dtype, uint64_t a, uint64_t g, uint64_t sqnorm, int64_t samples,
                              int64_t wide, int64_t high, bool bias);

// Rows for the half-precision search: x̂ = (x - centre)·2^e rounded to float16, e per row; dimensions padded with zeros.
// rounded [n, padded] float16, 16-byte aligned, padded a multiple of 8; scale [n] float32 = 2^-e, norms [n, 2] float32:
// ‖x̂·2^-e‖ and the distance of that to x - centre, both rounded up.
void kmeans_round(const Where& where, int dtype, uint64_t points, uint64_t centre, uint64_t rounded, uint64_t scale,
                  uint64_t norms, int64_t n, int64_t dimensions, int64_t padded);

// Candidates for the nearest of k centroids: the largest v = scale[row]·per_unit·(x̂·ĉ) - offset[k] of each row.
// x [n, padded] and c [k, padded] float16, padded a multiple of 8; offset [columns] float32, columns a multiple of 256 that
// holds k, 3e38 from k on; scale [n] float32 or 0 for 1; per_unit [1].
// values [n, 4]: the largest v, the second, a bound of all others; candidates [n, 2] int32: their columns.
void kmeans_search(const Where& where, uint64_t x, uint64_t c, uint64_t offset, uint64_t scale, uint64_t per_unit,
                   uint64_t values, uint64_t candidates, int64_t n, int64_t k, int64_t padded, int64_t columns);

// Decides: assignment [n] int32 and sqdistance [n] float32 from the candidates; rows that they cannot decide go to the list
// `again`, and values[row, 2] to the least v of those that may be nearest. points [n, dimensions] of `dtype`, centroids
// [k, dimensions] and centre [dimensions] float32; norms as above, or 0 where x is the points themselves; limits [6]: see
// diffprune/kernels/rounded_columns.py. again: int32 [1 + n]: how many, 0 on entry, and the rows.
void kmeans_decide(const Where& where, int dtype, uint64_t points, uint64_t centroids, uint64_t centre, uint64_t values,
                   uint64_t candidates, uint64_t norms, uint64_t limits, uint64_t again, uint64_t assignment,
                   uint64_t sqdistance, int64_t n, int64_t k, int64_t dimensions);

// Searches the rows of `again`: their v are computed once more, and the few centroids that may be nearest are compared in
// float64; all of them where they are not few. few: int32 [kmeans_search_again_few]; rest: a list likewise, 0 on entry.
void kmeans_search_again(const Where& where, int dtype, uint64_t points, uint64_t centroids, uint64_t x, uint64_t c,
                         uint64_t offset, uint64_t scale, uint64_t per_unit, uint64_t values, uint64_t again, uint64_t few,
                         uint64_t rest, uint64_t assignment, uint64_t sqdistance, int64_t n, int64_t k, int64_t dimensions,
                         int64_t padded);
int64_t kmeans_search_again_few(const Where& where, int64_t n);

// sums[c, d] = Σ of points[order[r], d] for r from offsets[c] to offsets[c+1]-1, one by one, in float64; with weights
// [n] float64 each times its weight, and totals[c] the sum of the weights. order int64, offsets int64 [k+1].
void kmeans_update(const Where& where, int dtype, uint64_t points, uint64_t order, uint64_t offsets, uint64_t weights,
                   uint64_t sums, uint64_t totals, int64_t k, int64_t dimensions);

// partials[b, tile] = 1/elements·Σ (v - (x1 - x0))² over a tile of the sample's elements, x0 from Philox keyed by (seed,
// stream) at (block, draw, hash); with weight [samples] float32 also grad = weight[b]·2/elements·(v - (x1 - x0)) of v's
// dtype, else 0 for both. velocity, x1 [samples, elements] of their dtypes; hashes [samples] int64.
void flow_matching_loss(const Where& where, int velocity_dtype, int x1_dtype, uint64_t velocity, uint64_t x1, uint64_t hashes,
                        uint64_t weight, uint64_t grad, uint64_t partials, int64_t samples, int64_t elements, uint32_t seed,
                        uint32_t stream, uint32_t draw);
int64_t flow_matching_loss_tiles(int64_t elements);

// "80", "90a" ...: what the kernels were compiled for.
const char* architectures();

}  // namespace diffprune
