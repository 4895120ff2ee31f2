// Tensor maps and their copies, and what host.cu needs of the runtime: a Hopper device with 4 multiprocessors.
#include "emulator.h"

namespace emulator {

namespace {

constexpr int kMultiprocessors = 4;

struct Map {  // what the emulator keeps in a CUtensorMap
  const unsigned char* data;
  uint64_t sizes[3], strides[2];
  uint32_t box[3];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

CUresult encode(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps, CUtensorMapInterleave interleave,
                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  bool valid = rank == 3 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
               swizzle == CU_TENSOR_MAP_SWIZZLE_128B && fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && box[0] * 2 <= 128;
  Map stored{static_cast<const unsigned char*>(data), {}, {}, {}};
  for (int i = 0; i < 3; ++i) {
    stored.sizes[i] = sizes[i];
    stored.box[i] = box[i];
    valid = valid && sizes[i] >= 1 && sizes[i] <= uint64_t(1) << 32 && box[i] >= 1 && box[i] <= 256 && steps[i] == 1;
  }
  for (int i = 0; i < 2; ++i) {
    stored.strides[i] = strides[i];
    valid = valid && strides[i] % 16 == 0 && strides[i] < uint64_t(1) << 40;
  }
  std::memcpy(map, &stored, sizeof(stored));
  return valid ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

}  // namespace

void bulk_load(Block* target, uint32_t offset, const CUtensorMap* map, uint32_t barrier, int column, int row, int sample) {
  Map source;
  std::memcpy(&source, map, sizeof(source));
  for (uint32_t r = 0; r < source.box[1]; ++r)
    for (uint32_t c = 0; c < source.box[0]; ++c) {
      const int64_t at[3] = {int64_t(column) + c, int64_t(row) + r, sample};
      bool inside = true;
      for (int i = 0; i < 3; ++i) inside = inside && at[i] >= 0 && at[i] < int64_t(source.sizes[i]);
      const uint32_t address = offset + r * source.box[0] * 2 + c * 2, swizzled = address ^ ((address >> 7 & 7) << 4);
      uint16_t bits = 0;
      if (inside) std::memcpy(&bits, source.data + at[0] * 2 + at[1] * source.strides[0] + at[2] * source.strides[1], 2);
      std::memcpy(target->shared + swizzled, &bits, 2);
    }
  count_bytes(target, barrier, int(source.box[0] * source.box[1] * 2));
}

}  // namespace emulator

extern "C" {
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "of the emulator"; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? emulator::kMultiprocessors : 9;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(emulator::encode);
  *found = std::string(name) == "cuTensorMapEncodeTiled" ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
}
