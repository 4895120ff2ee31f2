// What the two kernels of linear_grad_dot share with the code that launches them.
#pragma once

#include "host.cuh"

namespace diffprune {

struct DotShape {
  int rows;  // samples · tokens
  int columns, depth;
  bool transposed;  // w is [depth, columns], not [columns, depth]
};

// Each block writes, for its rows and its strip of columns, the sum over the strip: partials [strips, rows].
int dot_strip(const Queue& queue, int columns);
void dot_sm80(const Queue& queue, int dtype, uint64_t x, uint64_t w, uint64_t y, const float* bias, float* partials, DotShape shape);
void dot_sm90(const Queue& queue, int dtype, uint64_t x, uint64_t w, uint64_t y, const float* bias, float* partials, DotShape shape, int strip);

}  // namespace diffprune
