// flow_matching_loss and flow_matching_loss_grad: one pass over velocity and data, the noise made in registers.
#include "fours.cuh"
#include "host.cuh"
#include "philox.cuh"

namespace diffprune {

namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;  // per multiprocessor, of up to 64 registers a thread, which hold all that is loaded
constexpr int kGroups = 4;  // of 4 elements per thread: one Philox block each
constexpr int kTile = kThreads * kGroups * 4;

// One block per sample and tile: partials[sample, tile] = 1/elements·Σ (v - (x1 - x0))² over the tile.
template <class V, class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
flow_matching_loss_kernel(const V* velocity,      // [samples, elements]
                         const X* x1,             // [samples, elements]
                         const int64_t* hashes,   // [samples]
                         const float* weight,     // [samples] or null
                         V* grad,                 // [samples, elements], with weight
                         float* partials,         // [samples, tiles]
                         int64_t elements, float per_element,  // 2 / elements
                         int tiles, const __grid_constant__ PhiloxKeys keys, uint32_t draw, bool aligned) {
  const int64_t sample = blockIdx.x / tiles, tile_start = int64_t(blockIdx.x % tiles) * kTile;
  const int64_t at = sample * elements + tile_start;
  const int left = elements - tile_start < kTile ? int(elements - tile_start) : kTile;  // elements of the tile
  const uint64_t hash = uint64_t(hashes[sample]);
  float v[kGroups][4], x[kGroups][4];
  const auto load = [&](bool at_once) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int start = 4 * (i * kThreads + int(threadIdx.x));
      load_four(v[i], velocity + at + start, left - start, at_once);
      load_four(x[i], x1 + at + start, left - start, at_once);
    }
  };
  if (aligned) load(true);  // one branch, not one per load
  else load(false);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int start = 4 * (i * kThreads + int(threadIdx.x)), count = left - start;
    if (count <= 0) continue;
    const float4 noise = normal_noise(uint32_t(tile_start / 4) + start / 4, hash, draw, keys);
    const float x0[4] = {noise.x, noise.y, noise.z, noise.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      v[i][e] = e < count ? v[i][e] - (x[i][e] - x0[e]) : 0.0f;
      sum = fmaf(v[i][e], v[i][e], sum);
    }
  }
  if (weight != nullptr) {
    const float factor = per_element * weight[sample];
    const auto store = [&](bool at_once) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        const int start = 4 * (i * kThreads + int(threadIdx.x));
#pragma unroll
        for (int e = 0; e < 4; ++e) v[i][e] *= factor;
        store_four(grad + at + start, v[i], left - start, at_once);
      }
    };
    if (aligned) store(true);
    else store(false);
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
             pointer<int64_t>(hashes), pointer<float>(weight), pointer<V>(grad), pointer<float>(partials), elements,
             2.0f / float(elements), tiles, PhiloxKeys(seed, stream), draw, aligned);
    });
  });
}

}  // namespace diffprune
