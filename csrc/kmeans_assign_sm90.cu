// The search of kmeans_assign on Hopper. A cluster of two blocks takes 256 points and goes through all centroids; each
// block loads one half of every tile of centroids for both.
#include "kmeans_search.cuh"
#include "pipeline.cuh"

namespace diffprune {

namespace {

constexpr int kClusterRows = 2 * kTileRows;
constexpr int kXBytes = kTileRows * kRowBytes;
constexpr int kStageBytes = kXBytes + kSearchColumns * kRowBytes;
using SearchRing = Ring<4, kStageBytes, 2>;

__global__ void __launch_bounds__(kThreads, 1)
kmeans_search_sm90(const __grid_constant__ CUtensorMap x_map,  // [n, depth], boxes of 128 rows
                   const __grid_constant__ CUtensorMap c_map,  // [k, depth], boxes of 128 rows
                   SearchInputs inputs, SearchOutputs outputs, SearchShape shape) {
  SearchRing ring;
  const int rank = cluster_rank(), warpgroup = threadIdx.x / 128;
  const int steps = ceil_div(shape.depth, kDepth), row_tiles = ceil_div(shape.n, kClusterRows);
  if (warpgroup == 0) {
    registers_shrink<kProducerRegisters>();
    if (threadIdx.x == 0) {
      for (int row_tile = blockIdx.x / 2; row_tile < row_tiles; row_tile += gridDim.x / 2)
        for (int column = 0; column < shape.k; column += kSearchColumns)
          for (int step = 0; step < steps; ++step) {
            unsigned char* stage = ring.acquire(kStageBytes);
            uint64_t* full = &ring.full[ring.stage];
            tensor_load(stage, &x_map, full, step * kDepth, row_tile * kClusterRows + rank * kTileRows, 0);
            tensor_load_multicast(stage + kXBytes + rank * (kSearchColumns / 2) * kRowBytes, &c_map, full, step * kDepth,
                                  column + rank * (kSearchColumns / 2), 0, 0b11);
            ring.advance();
          }
    }
  } else {
    registers_grow<kConsumerRegisters>();
    const int lane = threadIdx.x % 32, half = warpgroup - 1;
    const float per_unit = inputs.per_unit[0];
    for (int row_tile = blockIdx.x / 2; row_tile < row_tiles; row_tile += gridDim.x / 2) {
      const int row = row_tile * kClusterRows + rank * kTileRows + half * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
      Best best[2];
      float scale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        scale[i] = per_unit * (inputs.scale != nullptr && row + 8 * i < shape.n ? inputs.scale[row + 8 * i] : 1.0f);
      for (int column = 0; column < shape.k; column += kSearchColumns) {
        float products[kSearchColumns / 2];
        float2 offsets[kSearchColumns / 8];
        multiply<__half, kSearchColumns, false, false>(products, ring, steps, half * kPanelBytes, kXBytes, [&] {
#pragma unroll
          for (int i = 0; i < kSearchColumns / 8; ++i)
            offsets[i] = *reinterpret_cast<const float2*>(inputs.offset + column + accumulator_column(lane, 4 * i));
        });
        Group group[2] = {Group(shape.value_bits), Group(shape.value_bits)};
#pragma unroll
        for (int i = 0; i < kSearchColumns / 2; i += 4) {
          const float2 offset = offsets[i / 4];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            group[j].add(fmaf(products[i + 2 * j], scale[j], -offset.x), i / 2);
            group[j].add(fmaf(products[i + 2 * j + 1], scale[j], -offset.y), i / 2 + 1);
          }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int index = group[j].index();
          best[j].add(group[j].first, column + accumulator_column(lane, index / 2 * 4 + index % 2));
          best[j].add_unknown(group[j].second);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        merge_lanes(best[j]);
        if (lane % 4 == 0 && row + 8 * j < shape.n) outputs.write(row + 8 * j, best[j]);
      }
    }
  }
  __syncwarp();
  ring.sync();
}

}  // namespace

void search_sm90(const Queue& queue, SearchInputs inputs, SearchOutputs outputs, SearchShape shape) {
  const int row_tiles = ceil_div(shape.n, kClusterRows);
  const int clusters = row_tiles < queue.multiprocessors / 2 ? row_tiles : queue.multiprocessors / 2;
  launch("kmeans_search_sm90", kmeans_search_sm90, dim3(2 * clusters), kThreads, SearchRing::kSharedBytes, 2, queue.stream,
         tensor_map(kFloat16, inputs.x, 1, shape.n, shape.depth, kTileRows),
         tensor_map(kFloat16, inputs.c, 1, shape.k, shape.depth, kSearchColumns / 2), inputs, outputs, shape);
}

}  // namespace diffprune
