// Where things are: shared-memory tiles and the registers of the tensor cores. Pure arithmetic, tested on the CPU.
#pragma once

#include "platform.cuh"

// A panel is rows of 64 half-precision numbers, 128 bytes each. Within every 8 rows the eight 16-byte chunks of row r
// are permuted by XOR with r mod 8: the 128-byte swizzle of TMA and wgmma, for which 8 lanes that read the same chunk
// of 8 rows hit 32 different banks. The panel starts at a multiple of 1024 bytes.
constexpr int kPanelColumns = 64;
constexpr int kRowBytes = 128;

__host__ __device__ constexpr int panel_offset(int row, int chunk) { return row * kRowBytes + ((chunk ^ (row & 7)) << 4); }

// What wgmma is told of a tile at shared-memory `address`, its panels stored one after the other (PTX ISA, "Matrix
// Descriptor Format"): bits 0-13 address, 16-29 leading offset, 32-45 stride offset, each in units of 16 bytes, 62-63 the
// swizzle, 1 for 128 bytes. The stride is that of 8 rows of a panel. The leading offset counts only where the tile is
// transposed, that is where a panel holds 64 of the tile's rows (M or N) as columns and its rows are K: then it leads from
// panel to panel, and `panel_rows` is the depth of the tile.
__host__ __device__ constexpr uint64_t descriptor(uint32_t address, int panel_rows) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(panel_rows * kRowBytes >> 4) << 16 |
         uint64_t(8 * kRowBytes >> 4) << 32 | uint64_t(1) << 62;
}

// Accumulators of wgmma m64nN and of mma m16n8, per warp of 16 rows: element i of a lane.
__host__ __device__ constexpr int accumulator_row(int lane, int i) { return lane / 4 + 8 * (i / 2 % 2); }
__host__ __device__ constexpr int accumulator_column(int lane, int i) { return 8 * (i / 4) + 2 * (lane % 4) + i % 2; }

struct Pair {
  int row, column;
};

// The index-th tile of the upper triangle, diagonal included: (0,0) (0,1) (1,1) (0,2) (1,2) (2,2) ...
__host__ __device__ inline Pair triangle(int index) {
  int column = 0;
  while (index > column) index -= ++column;
  return {index, column};
}

__host__ __device__ constexpr int ceil_div(int count, int size) { return (count + size - 1) / size; }
