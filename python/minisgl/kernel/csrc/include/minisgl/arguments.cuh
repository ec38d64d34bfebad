// Checks of what linear layers are called with, and what their launches have alike. Compiled once per dtype
// (MINISGL_FP16).
#pragma once

#include "minisgl/mma.cuh"

#include <tvm/ffi/optional.h>

namespace minisgl {
namespace {

using tvm::ffi::Optional;

inline void check_place(const TensorView& t) {
  MINISGL_CHECK(t.device().device_type == kDLCUDA) << "expected a CUDA tensor";
  MINISGL_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0) << "expected 16-byte alignment";
}

inline const T* data_of(const TensorView& t) {
#if MINISGL_FP16
  MINISGL_CHECK(is_fp16(t)) << "expected fp16";
#else
  MINISGL_CHECK(is_bf16(t)) << "expected bf16";
#endif
  check_place(t);
  return static_cast<const T*>(t.data_ptr());
}

inline const uint8_t* bytes_of(const TensorView& t) {
  MINISGL_CHECK(t.dtype().bits == 8) << "expected bytes";
  check_place(t);
  return static_cast<const uint8_t*>(t.data_ptr());
}

// A vector of `size` elements, or null.
inline const T* vector_of(const Optional<TensorView>& t, int64_t size) {
  if (!t.has_value()) return nullptr;
  MINISGL_CHECK((*t).ndim() == 1 && (*t).size(0) == size && (*t).stride(0) == 1) << "expected a vector of " << size;
  return data_of(*t);
}

inline const float* floats_of(const TensorView& t, int64_t size) {
  MINISGL_CHECK(is_fp32(t) && t.ndim() == 1 && t.size(0) == size && t.stride(0) == 1) << "expected " << size << " fp32";
  return static_cast<const float*>(t.data_ptr());
}

inline void check_matrix(const TensorView& t, int64_t rows, int64_t columns) {
  MINISGL_CHECK(t.ndim() == 2 && t.size(0) == rows && t.size(1) == columns) << "expected " << rows << " x " << columns;
  MINISGL_CHECK(t.stride(1) == 1 && (t.stride(0) == columns || rows == 1)) << "expected a contiguous matrix";
}

inline const T* matrix_of(const TensorView& t, int64_t rows, int64_t columns) {
  check_matrix(t, rows, columns);
  return data_of(t);
}

// A matrix whose rows may be apart.
inline void check_rows(const TensorView& t) {
  MINISGL_CHECK(t.ndim() == 2 && t.stride(1) == 1 && (t.size(0) == 1 || t.stride(0) * t.dtype().bits % 128 == 0))
      << "expected rows at 16-byte boundaries";
}

inline int sm_count(int device) {
  static int counts[64] = {};
  MINISGL_CHECK(device >= 0 && device < 64);
  if (counts[device] == 0) {
    MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device));
  }
  return counts[device];
}

// The largest carveout, whatever a kernel needs: an SM must drain before it changes its carveout, and then two kernels
// could not share it. `prepared`: of this kernel, by device.
template <typename Kernel>
void allow_shared(Kernel kernel, int bytes, int device, bool (&prepared)[64]) {
  MINISGL_CHECK(device >= 0 && device < 64);
  if (prepared[device]) return;
  MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  MINISGL_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  prepared[device] = true;
}

}  // namespace
}  // namespace minisgl
