// flow_matching_loss and flow_matching_loss_grad: one pass over velocity and data, the noise made in registers.
#include "fours.cuh"
#include "host.cuh"
#include "philox.cuh"

namespace diffprune {

namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 16;  // elements, in groups of 4: one Philox block each
constexpr int kTile = kThreads * kPerThread;

// One block per sample and tile: partials[sample, tile] = 1/elements·Σ (v - (x1 - x0))² over the tile.
template <class V, class X>
__global__ void __launch_bounds__(kThreads)
flow_matching_loss_kernel(const V* velocity,      // [samples, elements]
                         const X* x1,             // [samples, elements]
                         const int64_t* hashes,   // [samples]
                         const float* weight,     // [samples] or null
                         V* grad,                 // [samples, elements], with weight
                         float* partials,         // [samples, tiles]
                         int64_t elements, int tiles, uint32_t seed, uint32_t stream, uint32_t draw, bool aligned) {
  const int64_t sample = blockIdx.x / tiles, tile_start = int64_t(blockIdx.x % tiles) * kTile;
  const int64_t row = sample * elements;
  const uint64_t hash = uint64_t(hashes[sample]);
  const float factor = weight != nullptr ? 2.0f / float(elements) * weight[sample] : 0.0f;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kPerThread / 4; ++i) {
    const int64_t start = tile_start + (i * kThreads + int64_t(threadIdx.x)) * 4, count = elements - start;
    if (count <= 0) continue;
    float v[4], x[4];
    load_four(v, velocity + row + start, count, aligned);
    load_four(x, x1 + row + start, count, aligned);
    const float4 noise = normal_noise(uint32_t(start / 4), hash, seed, stream, draw);
    const float x0[4] = {noise.x, noise.y, noise.z, noise.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      v[e] = e < count ? v[e] - (x[e] - x0[e]) : 0.0f;
      sum = fmaf(v[e], v[e], sum);
      v[e] *= factor;
    }
    if (weight != nullptr) store_four(grad + row + start, v, count, aligned);
  }
  float* warps = reinterpret_cast<float*>(shared_memory());
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) sum += warps[warp];
    partials[blockIdx.x] = sum / float(elements);
  }
}

}  // namespace

int64_t flow_matching_loss_tiles(int64_t elements) { return (elements + kTile - 1) / kTile; }

void flow_matching_loss(const Where& where, int velocity_dtype, int x1_dtype, uint64_t velocity, uint64_t x1, uint64_t hashes,
                        uint64_t weight, uint64_t grad, uint64_t partials, int64_t samples, int64_t elements, uint32_t seed,
                        uint32_t stream, uint32_t draw) {
  const Queue queue(where);
  const int tiles = narrow(flow_matching_loss_tiles(elements), "tiles"), blocks = narrow(tiles * samples, "tiles");
  // 4 floats are 16 bytes; torch's tensors begin at multiples of 256, views of them at any element.
  const bool aligned = elements % 4 == 0 && (velocity | x1 | grad) % 16 == 0;
  with_type(velocity_dtype, [&](auto velocity_type) {
    with_type(x1_dtype, [&](auto x1_type) {
      using V = decltype(velocity_type);
      using X = decltype(x1_type);
      launch("flow_matching_loss", flow_matching_loss_kernel<V, X>, dim3(blocks), kThreads,
             kAlignmentBytes + kThreads / 32 * 4, 1, queue.stream, pointer<V>(velocity), pointer<X>(x1),
             pointer<int64_t>(hashes), pointer<float>(weight), pointer<V>(grad), pointer<float>(partials), elements, tiles,
             seed, stream, draw, aligned);
    });
  });
}

}  // namespace diffprune
