// linear_grad_dot on Hopper: a persistent, warp-specialised product x·wᵀ whose tiles are multiplied with y and summed in
// the registers. Two blocks of a cluster take neighbouring rows and share w: each loads one half of it for both. y comes
// through the same ring as the operands, in panels that use the place of x, so that it is on its way while the last steps
// are multiplied.
#include "linear_grad_dot.cuh"
#include "pipeline.cuh"

namespace diffprune {

namespace {

constexpr int kClusterRows = 2 * kTileRows;

template <class T>
struct alignas(4) Two {
  T first, second;
};

template <int Columns>
struct Tiles {
  static constexpr int kXBytes = kTileRows * kRowBytes;
  static constexpr int kStageBytes = kXBytes + Columns * kRowBytes;
  static constexpr int kStages = Columns == 256 ? 4 : 5;
  using Pipeline = Ring<kStages, kStageBytes, 2>;
};

// Transposed: panels of w have its depth as rows, and each block loads one half of the rows of every panel.
template <class T, int Columns, bool Transposed>
__global__ void __launch_bounds__(kThreads, 1)
linear_grad_dot_sm90(const __grid_constant__ CUtensorMap x_map,  // [rows, depth], boxes of kTileRows rows
                     const __grid_constant__ CUtensorMap w_map,  // [columns, depth], boxes of Columns / 2 rows; Transposed:
                                                                 // [depth, columns], boxes of kDepth / 2 rows
                     const __grid_constant__ CUtensorMap y_map,  // [rows, columns], boxes of kTileRows rows
                     const float* bias,                          // [columns] or null
                     float* partials,                            // [strips, rows]
                     DotShape shape) {
  using Tile = Tiles<Columns>;
  typename Tile::Pipeline ring;
  const int rank = cluster_rank(), warpgroup = threadIdx.x / 128;
  const int strips = ceil_div(shape.columns, Columns), steps = ceil_div(shape.depth, kDepth);
  const int tiles = strips * ceil_div(shape.rows, kClusterRows);
  if (warpgroup == 0) {
    registers_shrink<kProducerRegisters>();
    if (threadIdx.x == 0) {
      for (int tile = blockIdx.x / 2; tile < tiles; tile += gridDim.x / 2) {
        const int row = tile / strips * kClusterRows + rank * kTileRows, column = tile % strips * Columns;
        for (int step = 0; step < steps; ++step) {
          unsigned char* stage = ring.acquire(Tile::kStageBytes);
          tensor_load(stage, &x_map, &ring.full[ring.stage], step * kDepth, row, 0);
          if constexpr (Transposed) {
            const int half = rank * (kDepth / 2);
            for (int panel = 0; panel < Columns / kPanelColumns; ++panel)
              tensor_load_multicast(stage + Tile::kXBytes + panel * kPanelBytes + half * kRowBytes, &w_map,
                                    &ring.full[ring.stage], column + panel * kPanelColumns, step * kDepth + half, 0, 0b11);
          } else {
            const int half = rank * (Columns / 2);
            tensor_load_multicast(stage + Tile::kXBytes + half * kRowBytes, &w_map, &ring.full[ring.stage], step * kDepth,
                                  column + half, 0, 0b11);
          }
          ring.advance();
        }
        for (int panel = 0; panel < Columns / kPanelColumns; ++panel) {
          unsigned char* stage = ring.acquire(Tile::kXBytes);
          tensor_load(stage, &y_map, &ring.full[ring.stage], column + panel * kPanelColumns, row, 0);
          ring.advance();
        }
      }
    }
  } else {
    registers_grow<kConsumerRegisters>();
    const int lane = threadIdx.x % 32, half = warpgroup - 1;
    const int tile_row = half * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // and that + 8
    for (int tile = blockIdx.x / 2; tile < tiles; tile += gridDim.x / 2) {
      const int strip = tile % strips, row = tile / strips * kClusterRows + rank * kTileRows + tile_row;
      float products[Columns / 2];
      multiply<T, Columns, false, Transposed>(products, ring, steps, half * kPanelBytes, Tile::kXBytes);
      float sums[2] = {0, 0};
#pragma unroll
      for (int panel = 0; panel < Columns / kPanelColumns; ++panel) {
        const unsigned char* y = ring.wait();
#pragma unroll
        for (int i = 0; i < 32; i += 2) {  // two neighbours at a time
          const int row_half = i / 2 % 2, column = accumulator_column(lane, i);
          const auto pair = *reinterpret_cast<const Two<T>*>(
              y + panel_offset(tile_row + 8 * row_half, column / 8) + column % 8 * sizeof(T));
          const int n = strip * Columns + panel * kPanelColumns + column;
          float first = products[panel * 32 + i], second = products[panel * 32 + i + 1];
          if (bias != nullptr && n < shape.columns) {  // the number of columns is even
            first += bias[n];
            second += bias[n + 1];
          }
          sums[row_half] += first * to_float(pair.first) + second * to_float(pair.second);
        }
        async_proxy_fence();
        ring.release(ring.stage);
        ring.advance();
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 1);
        sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], 2);
        if (lane % 4 == 0 && row + 8 * i < shape.rows) partials[int64_t(strip) * shape.rows + row + 8 * i] = sums[i];
      }
    }
  }
  __syncwarp();
  ring.sync();
}

template <class T, int Columns, bool Transposed>
void launch_strips(const Queue& queue, int dtype, uint64_t x, uint64_t w, uint64_t y, const float* bias, float* partials,
                   DotShape shape) {
  using Pipeline = typename Tiles<Columns>::Pipeline;
  const int tiles = narrow(int64_t(ceil_div(shape.rows, kClusterRows)) * ceil_div(shape.columns, Columns), "tiles");
  const int clusters = tiles < queue.multiprocessors / 2 ? tiles : queue.multiprocessors / 2;
  const CUtensorMap w_map = Transposed ? tensor_map(dtype, w, 1, shape.depth, shape.columns, kDepth / 2)
                                       : tensor_map(dtype, w, 1, shape.columns, shape.depth, Columns / 2);
  launch("linear_grad_dot_sm90", linear_grad_dot_sm90<T, Columns, Transposed>, dim3(2 * clusters), kThreads,
         Pipeline::kSharedBytes, 2, queue.stream, tensor_map(dtype, x, 1, shape.rows, shape.depth, kTileRows), w_map,
         tensor_map(dtype, y, 1, shape.rows, shape.columns, kTileRows), bias, partials, shape);
}

}  // namespace

void dot_sm90(const Queue& queue, int dtype, uint64_t x, uint64_t w, uint64_t y, const float* bias, float* partials,
              DotShape shape, int strip) {
  with_half_type(dtype, [&](auto type) {
    using T = decltype(type);
    const auto run = strip == 256 ? (shape.transposed ? launch_strips<T, 256, true> : launch_strips<T, 256, false>)
                                  : (shape.transposed ? launch_strips<T, 192, true> : launch_strips<T, 192, false>);
    run(queue, dtype, x, w, y, bias, partials, shape);
  });
}

}  // namespace diffprune
