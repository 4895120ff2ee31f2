// linear_grad_sqnorm on Hopper: the Gram tiles of a sample, both in registers, and the tiles of the weight gradient.
#include "linear_grad_sqnorm.cuh"
#include "pipeline.cuh"

namespace diffprune {

namespace {

constexpr int kGramBytes = kGramTile * kRowBytes;
constexpr int kDirectColumns = 256;
constexpr int kDirectBytes = kDirectRows * kRowBytes;
using GramRing = Ring<6, 2 * kGramBytes, 1>;
using DirectRing = Ring<4, kDirectBytes + kDirectColumns * kRowBytes, 1>;

// One tile of one sample. Blocks take every gridDim.x-th item, which may be a multiple of `tiles`: the tiles move on by one
// from sample to sample, so that no block has only those off the diagonal, which load twice as much.
struct GramItem {
  int sample, tile;
  __device__ GramItem(int item, int tiles) : sample(item / tiles), tile((item % tiles + sample) % tiles) {}
};

// Per tile of the upper triangle: Σ (A·Aᵀ + bias)∘(G·Gᵀ). Rows past the last token read as zero, so they add nothing.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
gram_sqnorm_sm90(const __grid_constant__ CUtensorMap a_map,  // [samples, tokens, wide], boxes of 128 rows
                 const __grid_constant__ CUtensorMap g_map,  // [samples, tokens, high]
                 float bias,                                 // 1 or 0
                 GramPart* parts,                            // [samples, tiles, 8]
                 SqnormShape shape, int tiles, int items) {
  GramRing ring;
  const int warpgroup = threadIdx.x / 128;
  const int a_steps = ceil_div(shape.wide, kDepth), g_steps = ceil_div(shape.high, kDepth);
  if (warpgroup == 0) {
    registers_shrink<kProducerRegisters>();
    if (threadIdx.x == 0) {
      for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const GramItem at(item, tiles);
        const Pair tile = triangle(at.tile);
        const bool diagonal = tile.row == tile.column;  // both operands are the same rows
        for (int step = 0; step < a_steps + g_steps; ++step) {
          const CUtensorMap* map = step < a_steps ? &a_map : &g_map;
          const int column = (step < a_steps ? step : step - a_steps) * kDepth;
          unsigned char* stage = ring.acquire(diagonal ? kGramBytes : 2 * kGramBytes);
          tensor_load(stage, map, &ring.full[ring.stage], column, tile.row * kGramTile, at.sample);
          if (!diagonal)
            tensor_load(stage + kGramBytes, map, &ring.full[ring.stage], column, tile.column * kGramTile, at.sample);
          ring.advance();
        }
      }
    }
  } else {
    registers_grow<kConsumerRegisters>();
    const int lane = threadIdx.x % 32, consumer = threadIdx.x / 32 - 4;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const GramItem at(item, tiles);
      const Pair tile = triangle(at.tile);
      const int right = tile.row == tile.column ? 0 : kGramBytes;
      float a[kGramTile / 2], g[kGramTile / 2];
      multiply<T, kGramTile, false, false>(a, ring, a_steps, (warpgroup - 1) * kPanelBytes, right);
      multiply<T, kGramTile, false, false>(g, ring, g_steps, (warpgroup - 1) * kPanelBytes, right);
      float sum = 0, magnitude = 0;
#pragma unroll
      for (int i = 0; i < kGramTile / 2; ++i) {
        const float term = (a[i] + bias) * g[i];
        sum += term;
        magnitude += fabsf(term);
      }
      sum = warp_sum(sum);
      magnitude = warp_sum(magnitude);
      if (lane == 0) parts[(int64_t(at.sample) * tiles + at.tile) * kPartsPerTile + consumer] = {sum, magnitude};
    }
  }
  __syncwarp();
  ring.sync();
}

// Per tile of Gᵀ·A: Σ of its squares. Panels have tokens as rows: the operands are the transposes of what is stored.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
direct_sqnorm_sm90(const __grid_constant__ CUtensorMap a_map,  // [samples, tokens, wide], boxes of 64 rows
                   const __grid_constant__ CUtensorMap g_map,  // [samples, tokens, high]
                   Samples samples,
                   float* parts,  // [samples, tiles, 8]
                   SqnormShape shape, int tiles) {
  DirectRing ring;
  const int warpgroup = threadIdx.x / 128;
  const int steps = ceil_div(shape.tokens, kDepth), across = ceil_div(shape.wide, kDirectColumns);
  const int items = samples.count() * tiles;
  if (warpgroup == 0) {
    registers_shrink<kProducerRegisters>();
    if (threadIdx.x == 0) {
      for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int sample = samples[item / tiles], output = item % tiles / across * kDirectRows;
        const int input = item % tiles % across * kDirectColumns;
        for (int step = 0; step < steps; ++step) {
          unsigned char* stage = ring.acquire(kDirectBytes + kDirectColumns * kRowBytes);
          for (int panel = 0; panel < kDirectRows / kPanelColumns; ++panel)
            tensor_load(stage + panel * kPanelBytes, &g_map, &ring.full[ring.stage], output + panel * kPanelColumns,
                        step * kDepth, sample);
          for (int panel = 0; panel < kDirectColumns / kPanelColumns; ++panel)
            tensor_load(stage + kDirectBytes + panel * kPanelBytes, &a_map, &ring.full[ring.stage],
                        input + panel * kPanelColumns, step * kDepth, sample);
          ring.advance();
        }
      }
    }
  } else {
    registers_grow<kConsumerRegisters>();
    const int lane = threadIdx.x % 32, consumer = threadIdx.x / 32 - 4;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      float gradient[kDirectColumns / 2];
      multiply<T, kDirectColumns, true, true>(gradient, ring, steps, (warpgroup - 1) * kPanelBytes, kDirectBytes);
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kDirectColumns / 2; ++i) sum += gradient[i] * gradient[i];
      sum = warp_sum(sum);
      if (lane == 0) parts[(int64_t(samples[item / tiles]) * tiles + item % tiles) * kPartsPerTile + consumer] = sum;
    }
  }
  __syncwarp();
  ring.sync();
}

int blocks(const Queue& queue, int items) { return items < queue.multiprocessors ? items : queue.multiprocessors; }

}  // namespace

void gram_sm90(const Queue& queue, int dtype, uint64_t a, uint64_t g, bool bias, GramPart* parts, SqnormShape shape) {
  const int tiles = narrow(gram_tiles(shape), "tiles"), items = narrow(gram_tiles(shape) * shape.samples, "tiles");
  with_half_type(dtype, [&](auto type) {
    launch("gram_sqnorm_sm90", gram_sqnorm_sm90<decltype(type)>, dim3(blocks(queue, items)), kThreads,
           GramRing::kSharedBytes, 1, queue.stream,
           tensor_map(dtype, a, shape.samples, shape.tokens, shape.wide, kGramTile),
           tensor_map(dtype, g, shape.samples, shape.tokens, shape.high, kGramTile), bias ? 1.0f : 0.0f, parts, shape,
           tiles, items);
  });
}

void direct_sm90(const Queue& queue, int dtype, uint64_t a, uint64_t g, Samples samples, float* parts, SqnormShape shape) {
  const int64_t count = direct_tiles(queue, shape);
  const int tiles = narrow(count, "tiles"), items = narrow(count * shape.samples, "tiles");
  with_half_type(dtype, [&](auto type) {
    launch("direct_sqnorm_sm90", direct_sqnorm_sm90<decltype(type)>, dim3(blocks(queue, items)), kThreads,
           DirectRing::kSharedBytes, 1, queue.stream,
           tensor_map(dtype, a, shape.samples, shape.tokens, shape.wide, kDepth),
           tensor_map(dtype, g, shape.samples, shape.tokens, shape.high, kDepth), samples, parts, shape, tiles);
  });
}

}  // namespace diffprune
