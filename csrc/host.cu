// See host.cuh.
#include "host.cuh"

#include <limits>

namespace diffprune {

namespace {

// The driver's encoder of tensor maps, found at run time: the extension does not link the driver, so that it loads (and
// says what is missing) where there is none.
using Encoder = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                             const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

Encoder find_encoder() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
        "cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("cuTensorMapEncodeTiled: not in this driver");
  return reinterpret_cast<Encoder>(function);
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + ", " + cudaGetErrorString(status));
}

Queue::Queue(const Where& where) : stream(reinterpret_cast<cudaStream_t>(where.stream)) {
  check(cudaSetDevice(where.device), "cudaSetDevice");
  multiprocessors = attribute(cudaDevAttrMultiProcessorCount, where.device);
#ifdef DIFFPRUNE_SM90
  const bool hopper = attribute(cudaDevAttrComputeCapabilityMajor, where.device) == 9;
#else
  const bool hopper = false;
#endif
  if (where.path == 90 && !hopper) throw std::runtime_error("the kernels of sm_90a cannot run on this device or were not compiled");
  path = where.path ? where.path : hopper ? 90 : 80;
}

CUtensorMap tensor_map(int dtype, uint64_t data, int64_t samples, int64_t rows, int64_t columns, int box_rows) {
  static const Encoder encode = find_encoder();
  const cuuint64_t sizes[3] = {cuuint64_t(columns), cuuint64_t(rows), cuuint64_t(samples)};
  const cuuint64_t strides[2] = {cuuint64_t(columns) * 2, cuuint64_t(rows) * columns * 2};
  const cuuint32_t box[3] = {kPanelColumns, cuuint32_t(box_rows), 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status =
      encode(&map, dtype == kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
             pointer<void>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(status) + " for [" + std::to_string(samples) +
                             ", " + std::to_string(rows) + ", " + std::to_string(columns) + "]");
  return map;
}

int narrow(int64_t value, const char* what) {
  if (value < 0 || value > std::numeric_limits<int>::max() - 1024)
    throw std::invalid_argument(std::string("expected less than 2^31 - 1024 ") + what + ", got " + std::to_string(value));
  return static_cast<int>(value);
}

const char* architectures() { return DIFFPRUNE_ARCHITECTURES; }

}  // namespace diffprune
