// What the kernels of linear_grad_sqnorm share with the code that launches them.
#pragma once

#include "host.cuh"

namespace diffprune {

struct SqnormShape {
  int samples, tokens, wide, high;
};

constexpr int kPartsPerTile = 8;  // one per warp: no barrier among them
constexpr int kGramTile = 128;
constexpr int kDirectRows = 128;  // outputs of a direct tile; its columns, inputs, are Queue's choice

// One of the sums of a Gram tile: of its terms, and of their magnitudes. Tiles off the diagonal count twice.
struct GramPart {
  float sum, magnitude;
};

// Which samples: those on the list, in any order, or all if there is none.
struct Samples {
  const int* list;  // [1 + samples]: how many, which; or null
  int all;
  __device__ __forceinline__ int count() const { return list != nullptr ? list[0] : all; }
  __device__ __forceinline__ int operator[](int i) const { return list != nullptr ? list[1 + i] : i; }
};

// parts [samples, tiles of the upper triangle, 8].
void gram_sm80(const Queue& queue, int dtype, uint64_t a, uint64_t g, bool bias, GramPart* parts, SqnormShape shape);
void gram_sm90(const Queue& queue, int dtype, uint64_t a, uint64_t g, bool bias, GramPart* parts, SqnormShape shape);
// parts [samples, tiles of outputs × tiles of inputs, 8].
void direct_sm80(const Queue& queue, int dtype, uint64_t a, uint64_t g, Samples samples, float* parts, SqnormShape shape);
void direct_sm90(const Queue& queue, int dtype, uint64_t a, uint64_t g, Samples samples, float* parts, SqnormShape shape);

inline int direct_columns(const Queue& queue) { return queue.path == 90 ? 256 : 128; }

inline int64_t gram_tiles(const SqnormShape& shape) {
  const int64_t side = ceil_div(shape.tokens, kGramTile);
  return side * (side + 1) / 2;
}

inline int64_t direct_tiles(const Queue& queue, const SqnormShape& shape) {
  return int64_t(ceil_div(shape.high, kDirectRows)) * ceil_div(shape.wide, direct_columns(queue));
}

}  // namespace diffprune
