// linear_grad_dot: the launches, the kernel for sm_80, and the sum of the partials.
#include "linear_grad_dot.cuh"

#include "gemm_sm80.cuh"

namespace diffprune {

namespace {

// Two per-row sums of a block tile come from two warps; each writes its own strip of 64 columns.
constexpr int kStrip80 = 64;

template <class T, bool Transposed>
__global__ void __launch_bounds__(kBlockThreads, 1)
linear_grad_dot_sm80(Matrix<T> x,        // [rows, depth]
                     Matrix<T> w,        // [columns, depth], or Transposed
                     const T* y,         // [rows, columns]
                     const float* bias,  // [columns] or null
                     float* partials,    // [strips, rows]
                     DotShape shape) {
  const int tiles = ceil_div(shape.columns, kBlockTile);
  const int row_at = blockIdx.x / tiles * kBlockTile, column_at = blockIdx.x % tiles * kBlockTile;
  BlockResults products;
  multiply_block<T, false, Transposed>(products, shared_memory(), x, row_at, w, column_at);
  const BlockThread thread;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_at + thread.row(i, 2 * half);
      float sum = 0;
      for (int j = 0; j < 8; ++j)
        for (int e = 0; e < 2; ++e) {
          const int column = column_at + thread.column(j, e);
          if (row < shape.rows && column < shape.columns)
            sum += (products[i][j][2 * half + e] + (bias ? bias[column] : 0.0f)) *
                   to_float(y[int64_t(row) * shape.columns + column]);
        }
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int strip = (column_at + thread.warp_column) / kStrip80;
      if (thread.lane % 4 == 0 && row < shape.rows && strip < ceil_div(shape.columns, kStrip80))
        partials[int64_t(strip) * shape.rows + row] = sum;
    }
}

constexpr int kSumThreads = 256;

// One block per sample; each thread adds in a fixed order, and so does the block.
__global__ void __launch_bounds__(kSumThreads)
linear_grad_dot_sum(const float* partials,  // [strips, samples · tokens]
                    float* dot,             // [samples]
                    int strips, int tokens) {
  double* warps = reinterpret_cast<double*>(shared_memory());
  const int64_t rows = int64_t(gridDim.x) * tokens, first = int64_t(blockIdx.x) * tokens;
  double sum = 0;
  for (int strip = 0; strip < strips; ++strip)
    for (int token = threadIdx.x; token < tokens; token += kSumThreads) sum += partials[strip * rows + first + token];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kSumThreads / 32; ++warp) sum += warps[warp];
    dot[blockIdx.x] = static_cast<float>(sum);
  }
}

}  // namespace

int dot_strip(const Queue& queue, int columns) {
  if (queue.path != 90) return kStrip80;
  return ceil_div(columns, 192) * 192 < ceil_div(columns, 256) * 256 ? 192 : 256;  // the one that wastes less
}

void dot_sm80(const Queue& queue, int dtype, uint64_t x, uint64_t w, uint64_t y, const float* bias, float* partials,
              DotShape shape) {
  const int blocks =
      narrow(int64_t(ceil_div(shape.rows, kBlockTile)) * ceil_div(shape.columns, kBlockTile), "tiles of the product");
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Matrix<T> transposed{pointer<T>(w), shape.depth, shape.columns}, plain{pointer<T>(w), shape.columns, shape.depth};
    launch("linear_grad_dot_sm80", shape.transposed ? linear_grad_dot_sm80<T, true> : linear_grad_dot_sm80<T, false>,
           dim3(blocks), kBlockThreads, kBlockSharedBytes, 1, queue.stream,
           Matrix<T>{pointer<T>(x), shape.rows, shape.depth}, shape.transposed ? transposed : plain, pointer<T>(y), bias,
           partials, shape);
  });
}

void linear_grad_dot(const Where& where, int dtype, uint64_t x, uint64_t w, uint64_t y, uint64_t bias, uint64_t partials,
                     uint64_t dot, int64_t samples, int64_t tokens, int64_t depth, int64_t columns, bool transposed) {
  const Queue queue(where);
  const DotShape shape{narrow(samples * tokens, "tokens"), narrow(columns, "columns"), narrow(depth, "depth"), transposed};
  const int strip = dot_strip(queue, shape.columns);
#ifdef DIFFPRUNE_SM90
  if (queue.path == 90) dot_sm90(queue, dtype, x, w, y, pointer<float>(bias), pointer<float>(partials), shape, strip);
#endif
  if (queue.path == 80) dot_sm80(queue, dtype, x, w, y, pointer<float>(bias), pointer<float>(partials), shape);
  launch("linear_grad_dot_sum", linear_grad_dot_sum, dim3(narrow(samples, "samples")), kSumThreads,
         kAlignmentBytes + kSumThreads / 32 * 8, 1, queue.stream, pointer<float>(partials), pointer<float>(dot),
         ceil_div(shape.columns, strip), narrow(tokens, "tokens"));
}

int64_t linear_grad_dot_partials(const Where& where, int64_t samples, int64_t tokens, int64_t columns) {
  const Queue queue(where);
  const int n = narrow(columns, "columns");
  return ceil_div(n, dot_strip(queue, n)) * samples * tokens;
}

}  // namespace diffprune
