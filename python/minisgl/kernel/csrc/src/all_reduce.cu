// Collectives over peer memory (NVLink, CUDA IPC) for the messages of decode steps, up to a few MiB.
//
// The number of the call is kept on the device, so that a captured CUDA graph can be replayed any number of times; all
// ranks make the same calls with the same sizes in the same order. Nothing waits for other blocks of its own grid.
#include "minisgl/peer.cuh"

namespace minisgl {
namespace {

// The sum in the order of ranks, in fp32 (int32 for integers), rounded once: the same bits wherever it is computed.
template <typename T, int kRanks>
__device__ __forceinline__ uint4 reduce(const uint4 (&packets)[kRanks]) {
  constexpr int kElements = 16 / sizeof(T);
  uint4 result;
  T* out = reinterpret_cast<T*>(&result);
#pragma unroll
  for (int e = 0; e < kElements; ++e) {
    if constexpr (std::is_same_v<T, int32_t>) {
      int32_t sum = reinterpret_cast<const T*>(&packets[0])[e];
#pragma unroll
      for (int r = 1; r < kRanks; ++r) sum += reinterpret_cast<const T*>(&packets[r])[e];
      out[e] = sum;
    } else {
      float sum = to_float(reinterpret_cast<const T*>(&packets[0])[e]);
#pragma unroll
      for (int r = 1; r < kRanks; ++r) sum += to_float(reinterpret_cast<const T*>(&packets[r])[e]);
      out[e] = from_float<T>(sum);
    }
  }
  return without_empty(result);
}

template <int kRanks>
__device__ __forceinline__ void set_own(uint4 (&packets)[kRanks], int rank, uint4 own) {
#pragma unroll
  for (int r = 0; r < kRanks; ++r) {
    if (r == rank) packets[r] = own;
  }
}

// Count the call once every thread of the grid has read the counter; the next kernel reads it after this one's end.
__device__ __forceinline__ void finish(Header* header, uint32_t* counter, uint32_t call) {
  __syncthreads();
  if (threadIdx.x == 0 && atomicAdd(&header->blocks_done, 1) == gridDim.x - 1) {
    header->blocks_done = 0;
    *counter = call + 1;
  }
}

// Every rank sends all of x to every peer. x and out: [n], possibly the same memory.
// Slots: [kRanks (source), num_packets].
template <typename T, int kRanks>
__global__ void __launch_bounds__(kMaxThreads, 1)
    one_shot_kernel(const __grid_constant__ Group group, const T* x, T* out, const uint32_t n, const uint32_t num_packets) {
  pdl_trigger();
  pdl_wait();
  Header* header = group.header(group.rank);
  const uint32_t call = *const_cast<volatile uint32_t*>(&header->calls);
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t step = gridDim.x * blockDim.x;
  const int64_t source = static_cast<int64_t>(group.rank) * num_packets;
  for (uint32_t i = first; i < num_packets; i += step) {
    const uint4 packet = load_packet(x, i, n);
#pragma unroll
    for (int j = 1; j < kRanks; ++j) put(group.slots((group.rank + j) % kRanks, call) + source + i, packet);
  }
  uint4* mine = group.slots(group.rank, call);
  for (uint32_t i = first; i < num_packets; i += step) {
    uint4 packets[kRanks];
    set_own(packets, group.rank, load_packet(x, i, n));
    receive(packets, mine + i, num_packets, group);
    store_packet(out, i, n, reduce<T>(packets));
  }
  finish(header, &header->calls, call);
}

// Reduce-scatter, then all-gather: rank r sums packets [r * share, (r + 1) * share). x and out: [n], possibly the same
// memory: a thread reads and writes the same packets throughout. Slots: [kRanks (source), share] of addends, then
// [kRanks (owner), share] of sums.
template <typename T, int kRanks>
__global__ void __launch_bounds__(kMaxThreads, 1)
    two_shot_kernel(const __grid_constant__ Group group, const T* x, T* out, const uint32_t n, const uint32_t share) {
  pdl_trigger();
  pdl_wait();
  Header* header = group.header(group.rank);
  const uint32_t call = *const_cast<volatile uint32_t*>(&header->calls);
  const uint32_t first = blockIdx.x * blockDim.x + threadIdx.x;
  const uint32_t step = gridDim.x * blockDim.x;
  const uint32_t own = group.rank * share;
  for (uint32_t i = first; i < share; i += step) {
#pragma unroll
    for (int j = 1; j < kRanks; ++j) {
      const uint32_t peer = (group.rank + j) % kRanks;
      put(group.slots(peer, call) + own + i, load_packet(x, peer * share + i, n));
    }
  }
  uint4* addends = group.slots(group.rank, call);
  for (uint32_t i = first; i < share; i += step) {
    uint4 packets[kRanks];
    set_own(packets, group.rank, load_packet(x, own + i, n));
    receive(packets, addends + i, share, group);
    const uint4 sum = reduce<T>(packets);
#pragma unroll
    for (int j = 1; j < kRanks; ++j) {
      put(group.slots((group.rank + j) % kRanks, call) + kRanks * share + own + i, sum);
    }
    store_packet(out, own + i, n, sum);
  }
  uint4* sums = addends + kRanks * share;
  for (uint32_t i = first; i < share; i += step) {
    uint4 packets[kRanks];
    receive(packets, sums + i, share, group);
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      if (r != group.rank) store_packet(out, r * share + i, n, packets[r]);
    }
  }
  finish(header, &header->calls, call);
}

// x: [rows, row_packets] of every rank → rank 0's buffer [rows, size * row_packets]. Rank 0 first says that it no
// longer reads the previous content, which is so once its own kernel has passed pdl_wait; each block has its own flags.
__global__ void __launch_bounds__(kMaxThreads)
    gather_kernel(const __grid_constant__ Group group, const uint4* x, const uint32_t num_packets,
                  const uint32_t row_packets) {
  pdl_trigger();
  pdl_wait();
  Header* header = group.header(group.rank);
  const uint32_t call = *const_cast<volatile uint32_t*>(&header->gathers) + 1;
  if (group.rank == 0) {
    if (threadIdx.x > 0 && threadIdx.x < group.size) signal(&group.header(threadIdx.x)->ready[blockIdx.x], call);
  } else {
    if (threadIdx.x == 0) wait_for(&header->ready[blockIdx.x], call, group.timeout_ns);
    __syncthreads();
  }
  uint4* out = reinterpret_cast<uint4*>(group.gathered) + static_cast<int64_t>(group.rank) * row_packets;
  const int64_t out_stride = static_cast<int64_t>(group.size) * row_packets;
  const uint32_t step = gridDim.x * blockDim.x;
#pragma unroll 4
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < num_packets; i += step) {
    const uint32_t row = i / row_packets;
    out[row * out_stride + (i - row * row_packets)] = x[i];
  }
  if (group.rank == 0) {
    if (threadIdx.x > 0 && threadIdx.x < group.size) {
      wait_for(&header->sent[blockIdx.x][threadIdx.x], call, group.timeout_ns);
    }
  } else {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence_system();  // with the barrier before it: the whole block's rows come before the flag
      signal(&group.header(0)->sent[blockIdx.x][group.rank], call);
    }
  }
  finish(header, &header->gathers, call - 1);
}

__global__ void fill_kernel(uint32_t* words, int64_t count, uint32_t value) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) words[i] = value;
}

// Launches go to the device of the tensor, whatever device the calling thread has made current.
class DeviceGuard {
 public:
  explicit DeviceGuard(const TensorView& tensor) {
    MINISGL_CHECK(tensor.device().device_type == kDLCUDA);
    MINISGL_CUDA_CHECK(cudaGetDevice(&previous_));
    changed_ = previous_ != tensor.device().device_id;
    if (changed_) MINISGL_CUDA_CHECK(cudaSetDevice(tensor.device().device_id));
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0;
  bool changed_ = false;
};

struct Message {
  const void* x;  // null: zeros
  void* out;
  int64_t n;
  int64_t num_packets;
};

LaunchConfig launch_config(int64_t packets, int64_t max_blocks) {
  const int64_t blocks = max_blocks > 0 && max_blocks < kMaxBlocks ? max_blocks : kMaxBlocks;
  const int64_t threads = packets <= blocks * 256 ? 256 : kMaxThreads;
  const int64_t needed = (packets + threads - 1) / threads;
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>(needed < blocks ? needed : blocks));
  config.block = dim3(static_cast<unsigned>(threads));
  return config;
}

template <typename T, int kRanks>
void run(const Group& group, const Message& m, bool two_shot, int64_t max_blocks, cudaStream_t stream) {
  const int64_t share = (m.num_packets + kRanks - 1) / kRanks;
  MINISGL_CHECK((two_shot ? 2 * share : m.num_packets) * kRanks <= group.half_packets) << "the message is too large";
  const T* x = static_cast<const T*>(m.x);
  T* out = static_cast<T*>(m.out);
  const uint32_t n = static_cast<uint32_t>(m.n);
  if (two_shot) {
    launch(launch_config(share, max_blocks), stream, two_shot_kernel<T, kRanks>, group, x, out, n,
           static_cast<uint32_t>(share));
  } else {
    launch(launch_config(m.num_packets, max_blocks), stream, one_shot_kernel<T, kRanks>, group, x, out, n,
           static_cast<uint32_t>(m.num_packets));
  }
}

template <typename T>
void run_ranks(const Group& group, const Message& m, bool two_shot, int64_t max_blocks, cudaStream_t stream) {
  switch (group.size) {
    case 2: return run<T, 2>(group, m, two_shot, max_blocks, stream);
    case 4: return run<T, 4>(group, m, two_shot, max_blocks, stream);
    case 8: return run<T, 8>(group, m, two_shot, max_blocks, stream);
    default: TVM_FFI_THROW(ValueError) << "2, 4 or 8 ranks, not " << group.size;
  }
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

Message message(const TensorView& x, const TensorView& out) {
  MINISGL_CHECK(x.IsContiguous() && out.IsContiguous() && x.numel() == out.numel() && x.numel() > 0);
  MINISGL_CHECK(x.dtype().code == out.dtype().code && x.dtype().bits == out.dtype().bits);
  MINISGL_CHECK(is_int32(x) || x.numel() * (x.dtype().bits / 8) % 16 == 0) << "a multiple of 16 bytes";
  MINISGL_CHECK(is_aligned(x.data_ptr()) && is_aligned(out.data_ptr())) << "16-byte alignment";
  const int64_t bytes = x.numel() * (x.dtype().bits / 8);
  return {x.data_ptr(), out.data_ptr(), x.numel(), (bytes + 15) / 16};
}

}  // namespace

// Memory of the current device that other processes can map, which torch's caching allocator cannot promise.
int64_t allocate(int64_t bytes) {
  void* pointer = nullptr;
  MINISGL_CUDA_CHECK(cudaMalloc(&pointer, bytes));
  return reinterpret_cast<int64_t>(pointer);
}

void release(int64_t pointer) { MINISGL_CUDA_CHECK(cudaFree(reinterpret_cast<void*>(pointer))); }

// Counters at zero, slots empty; returns when the device has done it.
void prepare_region(int64_t pointer, int64_t half_bytes) {
  char* region = reinterpret_cast<char*>(pointer);
  MINISGL_CUDA_CHECK(cudaMemset(region, 0, kHeaderBytes));
  fill_kernel<<<256, 256>>>(reinterpret_cast<uint32_t*>(region + kHeaderBytes), 2 * half_bytes / 4, kEmpty);
  MINISGL_CUDA_CHECK(cudaGetLastError());
  MINISGL_CUDA_CHECK(cudaDeviceSynchronize());
}

int64_t region_bytes(int64_t half_bytes) { return kHeaderBytes + 2 * half_bytes; }

// handle: [64] uint8 on the CPU.
void export_handle(int64_t pointer, TensorView handle) {
  MINISGL_CHECK(handle.numel() == sizeof(cudaIpcMemHandle_t) && handle.device().device_type == kDLCPU);
  auto* out = static_cast<cudaIpcMemHandle_t*>(handle.data_ptr());
  MINISGL_CUDA_CHECK(cudaIpcGetMemHandle(out, reinterpret_cast<void*>(pointer)));
}

int64_t import_handle(TensorView handle) {
  MINISGL_CHECK(handle.numel() == sizeof(cudaIpcMemHandle_t) && handle.device().device_type == kDLCPU);
  void* pointer = nullptr;
  MINISGL_CUDA_CHECK(cudaIpcOpenMemHandle(&pointer, *static_cast<const cudaIpcMemHandle_t*>(handle.data_ptr()),
                                          cudaIpcMemLazyEnablePeerAccess));
  return reinterpret_cast<int64_t>(pointer);
}

void close_handle(int64_t pointer) { MINISGL_CUDA_CHECK(cudaIpcCloseMemHandle(reinterpret_cast<void*>(pointer))); }

// regions: [size] int64 on the CPU, addresses; the result is passed to the collectives below.
int64_t create_group(int64_t rank, TensorView regions, int64_t half_bytes, int64_t gathered, int64_t gathered_bytes,
                     int64_t timeout_ns) {
  MINISGL_CHECK(is_int64(regions) && regions.device().device_type == kDLCPU);
  const int64_t size = regions.numel();
  MINISGL_CHECK(size <= kMaxRanks && rank >= 0 && rank < size);
  auto* group = new Group{};
  group->rank = static_cast<int>(rank);
  group->size = static_cast<int>(size);
  group->half_packets = half_bytes / 16;
  group->timeout_ns = static_cast<uint64_t>(timeout_ns);
  for (int r = 0; r < size; ++r) {
    group->regions[r] = reinterpret_cast<char*>(static_cast<const int64_t*>(regions.data_ptr())[r]);
  }
  group->gathered = reinterpret_cast<char*>(gathered);
  group->gathered_bytes = gathered_bytes;
  return reinterpret_cast<int64_t>(group);
}

void destroy_group(int64_t group) { delete reinterpret_cast<Group*>(group); }

// x, out: contiguous, 16-byte aligned; bf16, fp16 or fp32 of a multiple of 16 bytes, or int32; may be the same. max_blocks 0: as many as pay.
void all_reduce(int64_t handle, TensorView x, TensorView out, bool two_shot, int64_t max_blocks) {
  const Group& group = *reinterpret_cast<const Group*>(handle);
  const DeviceGuard guard(x);
  const Message m = message(x, out);
  const cudaStream_t stream = current_stream(x);
  if (is_bf16(x)) return run_ranks<__nv_bfloat16>(group, m, two_shot, max_blocks, stream);
  if (is_fp16(x)) return run_ranks<__half>(group, m, two_shot, max_blocks, stream);
  if (is_fp32(x)) return run_ranks<float>(group, m, two_shot, max_blocks, stream);
  MINISGL_CHECK(is_int32(x)) << "bf16, fp16, fp32 or int32";
  run_ranks<int32_t>(group, m, two_shot, max_blocks, stream);
}

// x: int32; rank 0's values on all ranks, in place: a sum to which the other ranks add nothing.
void broadcast(int64_t handle, TensorView x) {
  const Group& group = *reinterpret_cast<const Group*>(handle);
  MINISGL_CHECK(is_int32(x));
  const DeviceGuard guard(x);
  Message m = message(x, x);
  if (group.rank != 0) m.x = nullptr;
  run_ranks<int32_t>(group, m, false, 0, current_stream(x));
}

// x: [rows, row], contiguous, rows of a multiple of 16 bytes; on rank 0 the result [rows, size * row] is in `gathered`.
void gather(int64_t handle, TensorView x) {
  const Group& group = *reinterpret_cast<const Group*>(handle);
  MINISGL_CHECK(x.ndim() == 2 && x.IsContiguous() && x.numel() > 0 && is_aligned(x.data_ptr()));
  const int64_t row_bytes = x.size(1) * (x.dtype().bits / 8);
  MINISGL_CHECK(row_bytes % 16 == 0 && x.size(0) * row_bytes * group.size <= group.gathered_bytes);
  const DeviceGuard guard(x);
  const uint32_t row_packets = static_cast<uint32_t>(row_bytes / 16);
  const uint32_t num_packets = static_cast<uint32_t>(x.size(0)) * row_packets;
  launch(launch_config(num_packets, 0), current_stream(x), gather_kernel, group,
         static_cast<const uint4*>(x.data_ptr()), num_packets, row_packets);
}

}  // namespace minisgl

TVM_FFI_DLL_EXPORT_TYPED_FUNC(allocate, minisgl::allocate);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(release, minisgl::release);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(region_bytes, minisgl::region_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare_region, minisgl::prepare_region);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(export_handle, minisgl::export_handle);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(import_handle, minisgl::import_handle);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(close_handle, minisgl::close_handle);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_group, minisgl::create_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(destroy_group, minisgl::destroy_group);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(all_reduce, minisgl::all_reduce);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(broadcast, minisgl::broadcast);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gather, minisgl::gather);
