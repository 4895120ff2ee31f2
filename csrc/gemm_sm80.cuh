// sm_80: a block's 128×128 product with cp.async and mma.sync, for devices without wgmma (8.x, 10.x, 12.x).
#pragma once

#include "ptx.cuh"

constexpr int kBlockTile = 128;     // rows and columns of a block's tile
constexpr int kBlockThreads = 256;  // 8 warps, 4 × 2, of 32 × 64 results each
constexpr int kBlockDepth = 64;
constexpr int kBlockStages = 3;
constexpr int kOperandBytes = kBlockTile * kBlockDepth * 2;
constexpr int kBlockSharedBytes = kBlockStages * 2 * kOperandBytes + kAlignmentBytes;
static_assert(kBlockSharedBytes <= 99 * 1024, "the least that a block can have on 8.x, 10.x and 12.x");

// A half-precision matrix, contiguous; columns a multiple of 8. Reads as zero from `rows` and `columns` on.
template <class T>
struct Matrix {
  const T* data;
  int rows, columns;
  __device__ int place(int row) const { return row; }
};

// The rows of such a matrix that a list names, in its order.
template <class T>
struct ListedRows {
  const T* data;
  int rows, columns;  // rows: how many the list has
  const int* list;
  __device__ int place(int row) const { return list[row]; }
};

// Result (i, j, e) of a thread: rows of the tile from 16·i, columns from 8·j, element e.
struct BlockThread {
  int lane, warp_row, warp_column;
  __device__ BlockThread() : lane(threadIdx.x % 32), warp_row(threadIdx.x / 64 * 32), warp_column(threadIdx.x / 32 % 2 * 64) {}
  __device__ int row(int i, int e) const { return warp_row + 16 * i + accumulator_row(lane, e); }
  __device__ int column(int j, int e) const { return warp_column + 8 * j + accumulator_column(lane, e); }
};

using BlockResults = float[2][8][4];

// 128 × 64 numbers into panels. Not transposed: rows from `major`, columns from `depth`: one panel. Transposed: rows from
// `depth`, 128 columns from `major`: two panels of 64 rows.
template <bool Transposed, class SomeMatrix>
__device__ __forceinline__ void load_tile(unsigned char* target, const SomeMatrix& matrix, int major, int depth) {
#pragma unroll
  for (int i = 0; i < kOperandBytes / 16 / kBlockThreads; ++i) {
    const int piece = threadIdx.x + i * kBlockThreads, chunk = piece % 8, line = piece / 8;
    const int row = Transposed ? depth + line % 64 : major + line;
    const int column = (Transposed ? major + line / 64 * kPanelColumns : depth) + chunk * 8;
    const bool valid = row < matrix.rows && column < matrix.columns;
    const auto* source = valid ? matrix.data + int64_t(matrix.place(row)) * matrix.columns + column : matrix.data;
    copy_async(target + panel_offset(line, chunk), source, valid);
  }
}

// The chunk of 8 numbers at (major, depth), where the one along memory is a multiple of 8, of a tile from load_tile.
template <bool Transposed>
__device__ __forceinline__ const unsigned char* tile_chunk(const unsigned char* tile, int major, int depth) {
  if constexpr (Transposed) return tile + panel_offset(major / 64 * 64 + depth, major % 64 / 8);
  else return tile + panel_offset(major, depth / 8);
}

// results += left·rightᵀ over one 64-deep stage.
template <class T, bool TransposedLeft, bool TransposedRight>
__device__ __forceinline__ void multiply_stage(BlockResults& results, const unsigned char* left, const unsigned char* right,
                                               const BlockThread& thread) {
  const int matrix = thread.lane / 8, line = thread.lane % 8;  // of the four that load_matrices reads
  const int high = matrix / 2 * 8, low = matrix % 2 * 8;
#pragma unroll
  for (int k = 0; k < kBlockDepth; k += 16) {
    uint32_t a[2][4], b[4][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // matrices: (rows 0-7, k 0-7) (8-15, 0-7) (0-7, 8-15) (8-15, 8-15)
      const int row = thread.warp_row + 16 * i + low, depth = k + high;
      load_matrices<TransposedLeft>(a[i], TransposedLeft ? tile_chunk<true>(left, row, depth + line)
                                                         : tile_chunk<false>(left, row + line, depth));
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {  // matrices: (columns 0-7, k 0-7) (0-7, 8-15) (8-15, 0-7) (8-15, 8-15)
      const int column = thread.warp_column + 16 * j + high, depth = k + low;
      load_matrices<TransposedRight>(b[j], TransposedRight ? tile_chunk<true>(right, column, depth + line)
                                                           : tile_chunk<false>(right, column + line, depth));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) mma<T>(results[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

// results = left[left_at ...]·right[right_at ...]ᵀ. Each is [*, depth], or transposed [depth, *].
// All threads of the block; the shared memory is free again when it returns.
template <class T, bool TransposedLeft, bool TransposedRight, class Left>
__device__ __forceinline__ void multiply_block(BlockResults& results, unsigned char* shared, const Left& left, int left_at,
                                               const Matrix<T>& right, int right_at) {
  const BlockThread thread;
  const int steps = ceil_div(TransposedLeft ? left.rows : left.columns, kBlockDepth);
  auto load = [&](int step) {
    if (step < steps) {
      unsigned char* stage = shared + step % kBlockStages * 2 * kOperandBytes;
      load_tile<TransposedLeft>(stage, left, left_at, step * kBlockDepth);
      load_tile<TransposedRight>(stage + kOperandBytes, right, right_at, step * kBlockDepth);
    }
    copy_commit();  // empty groups too: copy_wait counts groups
  };
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) results[i][j][e] = 0;
  for (int step = 0; step < kBlockStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    copy_wait<kBlockStages - 2>();
    __syncthreads();  // everyone's copies are there, and everyone is done with the stage that is loaded next
    load(step + kBlockStages - 1);
    const unsigned char* stage = shared + step % kBlockStages * 2 * kOperandBytes;
    multiply_stage<T, TransposedLeft, TransposedRight>(results, stage, stage + kOperandBytes, thread);
  }
  copy_wait<0>();
  __syncthreads();
}
