// Host side: checked launches, tensor maps, the choice of path.
#pragma once

#include <stdexcept>
#include <string>

#include "layout.cuh"
#include "ops.h"

namespace diffprune {

// Throws if `status` is an error of `what`.
void check(cudaError_t status, const char* what);

// Makes the device current; `stream` as CUDA's type; 80 or 90.
struct Queue {
  explicit Queue(const Where& where);
  cudaStream_t stream;
  int multiprocessors;
  int path;
};

// For TMA: boxes of 64 columns × box_rows rows of a [samples, rows, columns] half-precision tensor, swizzled. What lies
// outside the tensor reads as zero.
CUtensorMap tensor_map(int dtype, uint64_t data, int64_t samples, int64_t rows, int64_t columns, int box_rows);

template <class T>
T* pointer(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

// As int, if it fits in one with room to spare; else throws std::invalid_argument (ValueError) that names `what`.
int narrow(int64_t value, const char* what);

// Calls `body` with a value of the C++ type that `dtype` names.
template <class Body>
void with_half_type(int dtype, Body&& body) {
  if (dtype == kFloat16) body(__half());
  else if (dtype == kBFloat16) body(__nv_bfloat16());
  else throw std::runtime_error("expected dtype float16 or bfloat16, got code " + std::to_string(dtype));
}

template <class Body>
void with_type(int dtype, Body&& body) {
  if (dtype == kFloat32) body(float());
  else with_half_type(dtype, body);
}

#ifdef DIFFPRUNE_EMULATED
using emulator::launch;
#else
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, int cluster,
            cudaStream_t stream, Arguments... arguments) {
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), name);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), name);
}
#endif

}  // namespace diffprune
