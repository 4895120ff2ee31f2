// linear_grad_sqnorm: the launches, the kernels for sm_80, the sums of their parts, and the form for one token.
#include "linear_grad_sqnorm.cuh"

#include "gemm_sm80.cuh"

namespace diffprune {

namespace {

// As gram_sqnorm_sm90; one block per tile.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
gram_sqnorm_sm80(const T* a,       // [samples, tokens, wide]
                 const T* g,       // [samples, tokens, high]
                 float bias,       // 1 or 0
                 GramPart* parts,  // [samples, tiles, 8]
                 SqnormShape shape, int tiles) {
  const int64_t first = int64_t(blockIdx.x / tiles) * shape.tokens;
  const Pair tile = triangle(blockIdx.x % tiles);
  const int row = tile.row * kGramTile, column = tile.column * kGramTile;
  const Matrix<T> inputs{a + first * shape.wide, shape.tokens, shape.wide};
  const Matrix<T> gradients{g + first * shape.high, shape.tokens, shape.high};
  BlockResults left, right;
  multiply_block<T, false, false>(left, shared_memory(), inputs, row, inputs, column);
  multiply_block<T, false, false>(right, shared_memory(), gradients, row, gradients, column);
  float sum = 0, magnitude = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float term = (left[i][j][e] + bias) * right[i][j][e];
        sum += term;
        magnitude += fabsf(term);
      }
  sum = warp_sum(sum);
  magnitude = warp_sum(magnitude);
  if (threadIdx.x % 32 == 0) parts[int64_t(blockIdx.x) * kPartsPerTile + threadIdx.x / 32] = {sum, magnitude};
}

// As direct_sqnorm_sm90; one block per tile.
template <class T>
__global__ void __launch_bounds__(kBlockThreads, 1)
direct_sqnorm_sm80(const T* a,    // [samples, tokens, wide]
                   const T* g,    // [samples, tokens, high]
                   Samples samples,
                   float* parts,  // [samples, tiles, 8]
                   SqnormShape shape, int tiles) {
  const int entry = blockIdx.x / tiles, tile = blockIdx.x % tiles, across = ceil_div(shape.wide, kBlockTile);
  if (entry >= samples.count()) return;
  const int64_t sample = samples[entry], first = sample * shape.tokens;
  BlockResults gradient;
  multiply_block<T, true, true>(gradient, shared_memory(), Matrix<T>{g + first * shape.high, shape.tokens, shape.high},
                                tile / across * kBlockTile, Matrix<T>{a + first * shape.wide, shape.tokens, shape.wide},
                                tile % across * kBlockTile);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum += gradient[i][j][e] * gradient[i][j][e];
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) parts[(sample * tiles + tile) * kPartsPerTile + threadIdx.x / 32] = sum;
}

constexpr int kSumThreads = 256;
constexpr int kSumBytes = kAlignmentBytes + kSumThreads / 32 * 8;

// Sum over the block, in a fixed order, for thread 0.
__device__ __forceinline__ double block_sum(double value) {
  double* warps = reinterpret_cast<double*>(shared_memory());
  value = warp_sum(value);
  __syncthreads();  // whoever still reads the last sum
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kSumThreads / 32; ++warp) value += warps[warp];
  return value;
}

// One block per sample.
__global__ void __launch_bounds__(kSumThreads)
gram_sqnorm_sum(const GramPart* parts,  // [samples, tiles, 8]
                float* sqnorm,          // [samples]
                int* again,             // [1 + samples]: the list of those whose terms cancel
                int tiles, float cancellation) {
  double sum = 0, magnitude = 0;
  for (int i = threadIdx.x; i < tiles * kPartsPerTile; i += kSumThreads) {
    const Pair tile = triangle(i / kPartsPerTile);
    const double times = tile.row == tile.column ? 1 : 2;
    const GramPart part = parts[int64_t(blockIdx.x) * tiles * kPartsPerTile + i];
    sum += times * part.sum;
    magnitude += times * part.magnitude;
  }
  sum = block_sum(sum);
  magnitude = block_sum(magnitude);
  if (threadIdx.x == 0) {
    sqnorm[blockIdx.x] = static_cast<float>(sum);
    if (magnitude > cancellation * sum) again[1 + atomicAdd(again, 1)] = blockIdx.x;
  }
}

// One block per sample, if it is one of those; with bias also ‖Σ_t G‖².
template <class T>
__global__ void __launch_bounds__(kSumThreads)
direct_sqnorm_sum(const float* parts,  // [samples, tiles, 8]
                  const T* g,          // [samples, tokens, high]
                  float* sqnorm,       // [samples]
                  Samples samples, bool bias, SqnormShape shape, int64_t tiles) {
  if (int(blockIdx.x) >= samples.count()) return;
  const int64_t sample = samples[blockIdx.x];
  double sum = 0;
  for (int64_t i = threadIdx.x; i < tiles * kPartsPerTile; i += kSumThreads) sum += parts[sample * tiles * kPartsPerTile + i];
  if (bias) {
    const T* gradients = g + sample * shape.tokens * shape.high;
    for (int output = threadIdx.x; output < shape.high; output += kSumThreads) {
      float total = 0;
      for (int token = 0; token < shape.tokens; ++token) total += to_float(gradients[int64_t(token) * shape.high + output]);
      sum += double(total) * total;
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sqnorm[sample] = static_cast<float>(sum);
}

// One block per sample of one token: (‖a‖² + bias)·‖g‖².
template <class T>
__global__ void __launch_bounds__(kSumThreads)
token_sqnorm(const T* a,     // [samples, wide]
             const T* g,     // [samples, high]
             float* sqnorm,  // [samples]
             bool bias, int wide, int high) {
  double inputs = 0, gradients = 0;
  for (int i = threadIdx.x; i < wide; i += kSumThreads) {
    const double value = to_float(a[int64_t(blockIdx.x) * wide + i]);
    inputs += value * value;
  }
  for (int i = threadIdx.x; i < high; i += kSumThreads) {
    const double value = to_float(g[int64_t(blockIdx.x) * high + i]);
    gradients += value * value;
  }
  inputs = block_sum(inputs);
  gradients = block_sum(gradients);
  if (threadIdx.x == 0) sqnorm[blockIdx.x] = static_cast<float>((inputs + (bias ? 1 : 0)) * gradients);
}

SqnormShape narrow_shape(int64_t samples, int64_t tokens, int64_t wide, int64_t high) {
  return {narrow(samples, "samples"), narrow(tokens, "tokens"), narrow(wide, "inputs"), narrow(high, "outputs")};
}

}  // namespace

void gram_sm80(const Queue& queue, int dtype, uint64_t a, uint64_t g, bool bias, GramPart* parts, SqnormShape shape) {
  const int tiles = narrow(gram_tiles(shape), "tiles"), blocks = narrow(gram_tiles(shape) * shape.samples, "tiles");
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch("gram_sqnorm_sm80", gram_sqnorm_sm80<T>, dim3(blocks), kBlockThreads, kBlockSharedBytes, 1, queue.stream,
           pointer<T>(a), pointer<T>(g), bias ? 1.0f : 0.0f, parts, shape, tiles);
  });
}

void direct_sm80(const Queue& queue, int dtype, uint64_t a, uint64_t g, Samples samples, float* parts, SqnormShape shape) {
  const int64_t tiles = direct_tiles(queue, shape);
  const int blocks = narrow(tiles * shape.samples, "tiles");
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch("direct_sqnorm_sm80", direct_sqnorm_sm80<T>, dim3(blocks), kBlockThreads, kBlockSharedBytes, 1, queue.stream,
           pointer<T>(a), pointer<T>(g), samples, parts, shape, int(tiles));
  });
}

void linear_grad_sqnorm(const Where& where, int dtype, uint64_t a, uint64_t g, uint64_t partials, uint64_t again,
                        uint64_t sqnorm, int64_t samples, int64_t tokens, int64_t wide, int64_t high, bool bias, bool gram,
                        float cancellation) {
  const Queue queue(where);
  const SqnormShape shape = narrow_shape(samples, tokens, wide, high);
  Samples direct = {nullptr, shape.samples};
  if (gram) {
    const auto parts = pointer<GramPart>(partials);
#ifdef DIFFPRUNE_SM90
    if (queue.path == 90) gram_sm90(queue, dtype, a, g, bias, parts, shape);
#endif
    if (queue.path == 80) gram_sm80(queue, dtype, a, g, bias, parts, shape);
    direct.list = pointer<int>(again);
    launch("gram_sqnorm_sum", gram_sqnorm_sum, dim3(shape.samples), kSumThreads, kSumBytes, 1, queue.stream, parts,
           pointer<float>(sqnorm), pointer<int>(again), narrow(gram_tiles(shape) * kPartsPerTile, "tiles") / kPartsPerTile,
           cancellation);
  }
  const auto parts = pointer<float>(partials);
#ifdef DIFFPRUNE_SM90
  if (queue.path == 90) direct_sm90(queue, dtype, a, g, direct, parts, shape);
#endif
  if (queue.path == 80) direct_sm80(queue, dtype, a, g, direct, parts, shape);
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch("direct_sqnorm_sum", direct_sqnorm_sum<T>, dim3(shape.samples), kSumThreads, kSumBytes, 1, queue.stream, parts,
           pointer<T>(g), pointer<float>(sqnorm), direct, bias, shape, direct_tiles(queue, shape));
  });
}

int64_t linear_grad_sqnorm_partials(const Where& where, int64_t samples, int64_t tokens, int64_t wide, int64_t high,
                                    bool gram) {
  const Queue queue(where);
  const SqnormShape shape = narrow_shape(samples, tokens, wide, high);
  const int64_t direct = direct_tiles(queue, shape), pairs = gram ? 2 * gram_tiles(shape) : 0;
  return samples * kPartsPerTile * (direct > pairs ? direct : pairs);
}

void linear_grad_sqnorm_token(const Where& where, int dtype, uint64_t a, uint64_t g, uint64_t sqnorm, int64_t samples,
                              int64_t wide, int64_t high, bool bias) {
  const Queue queue(where);
  const SqnormShape shape = narrow_shape(samples, 1, wide, high);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    launch("token_sqnorm", token_sqnorm<T>, dim3(shape.samples), kSumThreads, kSumBytes, 1, queue.stream, pointer<T>(a),
           pointer<T>(g), pointer<float>(sqnorm), bias, shape.wide, shape.high);
  });
}

}  // namespace diffprune
