// What every kernel file shares: argument checks, launches with programmatic dependent launch, vector types.
//
// Programmatic dependent launch (PDL): a kernel launched with `pdl` may start while the kernel before it in the stream
// still runs. Until `pdl_wait` it must touch nothing that an earlier kernel writes (weights are fine); every thread that
// reads or writes such memory calls it first, and every block calls it before it ends. (What the kernel ahead has waited
// for before it triggered is there.) `pdl_trigger` lets the next
// kernel start; it promises nothing about memory. Both are no-ops before sm_90, and so is `pdl`.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>

#include <cstdint>

namespace minisgl {

using tvm::ffi::TensorView;

#define MINISGL_CHECK(condition) TVM_FFI_ICHECK(condition)

#define MINISGL_CUDA_CHECK(call)                                                                          \
  do {                                                                                                    \
    cudaError_t status_ = (call);                                                                         \
    if (status_ != cudaSuccess) {                                                                         \
      TVM_FFI_THROW(RuntimeError) << #call << ": " << cudaGetErrorString(status_);                        \
    }                                                                                                     \
  } while (0)

// The stream that torch computes on: tvm-ffi sets it when it is given torch tensors.
inline cudaStream_t current_stream(const TensorView& tensor) {
  DLDevice device = tensor.device();
  return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
}

inline bool is_dtype(const TensorView& tensor, uint8_t code, int bits) {
  DLDataType dtype = tensor.dtype();
  return dtype.code == code && dtype.bits == bits && dtype.lanes == 1;
}

inline bool is_bf16(const TensorView& t) { return is_dtype(t, kDLBfloat, 16); }
inline bool is_fp16(const TensorView& t) { return is_dtype(t, kDLFloat, 16); }
inline bool is_fp32(const TensorView& t) { return is_dtype(t, kDLFloat, 32); }
inline bool is_int32(const TensorView& t) { return is_dtype(t, kDLInt, 32); }
inline bool is_int64(const TensorView& t) { return is_dtype(t, kDLInt, 64); }

// Calls f with a null pointer of the tensor's element type.
template <typename F>
void by_type(const TensorView& t, F&& f) {
  if (is_bf16(t)) f(static_cast<__nv_bfloat16*>(nullptr));
  else if (is_fp16(t)) f(static_cast<__half*>(nullptr));
  else if (is_fp32(t)) f(static_cast<float*>(nullptr));
  else TVM_FFI_THROW(TypeError) << "expected bfloat16, float16 or float32";
}

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t smem = 0;      // bytes of dynamic shared memory; above 48 KiB the caller raises the kernel's limit first
  bool pdl = true;      // programmatic dependent launch
  unsigned cluster = 1; // blocks along x that form a cluster
};

// Launch `kernel(args...)`. Throws with CUDA's message when the launch is refused.
template <typename... Params, typename... Args>
void launch(const LaunchConfig& config, cudaStream_t stream, void (*kernel)(Params...), Args&&... args) {
  cudaLaunchConfig_t launch_config{};
  launch_config.gridDim = config.grid;
  launch_config.blockDim = config.block;
  launch_config.dynamicSmemBytes = config.smem;
  launch_config.stream = stream;
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
#ifdef MINISGL_PDL
  if (config.pdl) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
#endif
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = config.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  launch_config.attrs = attributes;
  launch_config.numAttrs = count;
  MINISGL_CUDA_CHECK(cudaLaunchKernelEx(&launch_config, kernel, Params(args)...));
}

__device__ __forceinline__ void pdl_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void pdl_trigger() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// N values that move as one access: 16 bytes where N * sizeof(T) is 16.
template <typename T, int N>
struct alignas(N * sizeof(T)) Vec {
  T data[N];
};

template <typename T>
constexpr int kVecLen = 16 / sizeof(T);

template <typename T, int N = kVecLen<T>>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
  return *reinterpret_cast<const Vec<T, N>*>(p);
}

template <int kWidth = 32>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <int kWidth = 32>
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = kWidth / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

}  // namespace minisgl
