// Slots and flags in the memory of peers: how one kernel hands data to kernels on other GPUs.
//
// Every rank owns a region that all ranks have mapped: a header and two halves of slots. A call pushes 16-byte packets
// straight into the peers' slots, and data is its own flag: an empty slot holds kEmpty in each 32-bit word, which no
// packet ever holds, and a reader polls its own memory until no word is kEmpty. So a message costs one trip over
// NVLink and needs no fence: words are written at once, and no order between words matters (the idea of NCCL's LL
// protocol and of Lamport's buffers, without flags in between the data).
//
// Reuse: call k works in half k % 2, and a reader empties each slot as soon as it has read it. A peer writes into that
// half again in its call k + 2; to get there it has finished call k + 1, which needed packets that this rank sent in
// its own call k + 1, after its call k was complete, emptying included (pdl_wait, or plain stream order). All these
// stores meet in the L2 cache of the GPU that owns the slot, so a peer's later store cannot be overtaken by an earlier
// emptying. It follows that every call must need something from every rank: broadcast therefore sends from all ranks.
#pragma once

#include <type_traits>

#include "minisgl/common.cuh"

namespace minisgl {

constexpr int kMaxRanks = 8;
constexpr int kMaxBlocks = 128;
constexpr int kMaxThreads = 512;
// Two negative zeros in bf16 and fp16, a negligible subnormal in fp32, and not a token id: sent as zero.
constexpr uint32_t kEmpty = 0x80008000u;
constexpr int64_t kHeaderBytes = 16 << 10;

struct Header {
  alignas(128) uint32_t calls;         // finished by this rank, all-reduces and broadcasts
  alignas(128) uint32_t gathers;       // finished by this rank
  alignas(128) uint32_t blocks_done;   // of the kernel that runs now
  alignas(128) uint32_t ready[kMaxBlocks];             // by rank 0: the gather that it is ready for
  alignas(128) uint32_t sent[kMaxBlocks][kMaxRanks];   // on rank 0: the gather whose rows that rank has written
};
static_assert(sizeof(Header) <= kHeaderBytes);

struct Group {
  int rank;
  int size;
  int64_t half_packets;        // 16-byte packets in one half
  uint64_t timeout_ns;         // a peer that is silent for that long is dead
  char* regions[kMaxRanks];    // of every rank, as mapped into this process
  char* gathered;              // rank 0's buffer for `gather`, as mapped into this process
  int64_t gathered_bytes;

  __device__ Header* header(int owner) const { return reinterpret_cast<Header*>(regions[owner]); }
  __device__ uint4* slots(int owner, uint32_t call) const {
    return reinterpret_cast<uint4*>(regions[owner] + kHeaderBytes) + (call & 1) * half_packets;
  }
};

// No "memory" clobbers: what is sent and received passes through registers, and volatile keeps these in order.
__device__ __forceinline__ void put(uint4* slot, uint4 packet) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(slot), "r"(packet.x), "r"(packet.y),
               "r"(packet.z), "r"(packet.w));
}

__device__ __forceinline__ uint4 peek(const uint4* slot) {
  uint4 packet;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(packet.x), "=r"(packet.y), "=r"(packet.z), "=r"(packet.w)
               : "l"(slot));
  return packet;
}

__device__ __forceinline__ bool is_full(uint4 packet) {
  return packet.x != kEmpty && packet.y != kEmpty && packet.z != kEmpty && packet.w != kEmpty;
}

__device__ __forceinline__ uint4 without_empty(uint4 packet) {
  packet.x = packet.x == kEmpty ? 0 : packet.x;
  packet.y = packet.y == kEmpty ? 0 : packet.y;
  packet.z = packet.z == kEmpty ? 0 : packet.z;
  packet.w = packet.w == kEmpty ? 0 : packet.w;
  return packet;
}

// Ends the process's CUDA context after `timeout_ns` of polling: its rank fails, and the supervisor sees it.
struct Watchdog {
  uint32_t polls = 0;
  uint64_t start = 0;

  __device__ __forceinline__ void poll(uint64_t timeout_ns) {
    if ((++polls & 4095) != 0) return;
    uint64_t now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    if (start == 0) start = now;
    if (now - start > timeout_ns) __trap();
  }
};

// packets[r] = what rank r put into slot[r * stride], which is empty afterwards; packets[rank] is left alone.
template <int kRanks>
__device__ __forceinline__ void receive(uint4 (&packets)[kRanks], uint4* slot, uint32_t stride, const Group& group) {
  Watchdog watchdog;
  while (true) {
    bool full = true;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      if (r != group.rank) packets[r] = peek(slot + static_cast<int64_t>(r) * stride);
    }
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      if (r != group.rank) full = full && is_full(packets[r]);
    }
    if (full) break;
    watchdog.poll(group.timeout_ns);
  }
#pragma unroll
  for (int r = 0; r < kRanks; ++r) {
    if (r != group.rank) put(slot + static_cast<int64_t>(r) * stride, make_uint4(kEmpty, kEmpty, kEmpty, kEmpty));
  }
}

// Packet `index` of x: [n], zeros beyond its end. Only integers (ids, in a broadcast) come in numbers that do not fill
// packets, or as null for all zeros: the activations' kernels are spared the code for it.
template <typename T>
__device__ __forceinline__ uint4 load_packet(const T* x, uint32_t index, uint32_t n) {
  constexpr uint32_t kElements = 16 / sizeof(T);
  const uint32_t begin = index * kElements;
  uint4 packet = make_uint4(0, 0, 0, 0);
  if constexpr (std::is_same_v<T, int32_t>) {
    if (x == nullptr) return packet;
    if (begin + 0 < n) packet.x = x[begin + 0];
    if (begin + 1 < n) packet.y = x[begin + 1];
    if (begin + 2 < n) packet.z = x[begin + 2];
    if (begin + 3 < n) packet.w = x[begin + 3];
  } else {
    if (begin < n) packet = *reinterpret_cast<const uint4*>(x + begin);
  }
  return without_empty(packet);
}

template <typename T>
__device__ __forceinline__ void store_packet(T* x, uint32_t index, uint32_t n, uint4 packet) {
  constexpr uint32_t kElements = 16 / sizeof(T);
  const uint32_t begin = index * kElements;
  if constexpr (std::is_same_v<T, int32_t>) {
    if (begin + 0 < n) x[begin + 0] = packet.x;
    if (begin + 1 < n) x[begin + 1] = packet.y;
    if (begin + 2 < n) x[begin + 2] = packet.z;
    if (begin + 3 < n) x[begin + 3] = packet.w;
  } else {
    if (begin < n) *reinterpret_cast<uint4*>(x + begin) = packet;
  }
}

__device__ __forceinline__ void wait_for(const uint32_t* flag, uint32_t call, uint64_t timeout_ns) {
  Watchdog watchdog;
  while (true) {
    uint32_t seen;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(seen) : "l"(flag) : "memory");
    if (static_cast<int32_t>(seen - call) >= 0) return;
    watchdog.poll(timeout_ns);
  }
}

__device__ __forceinline__ void signal(uint32_t* flag, uint32_t call) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(call) : "memory");
}

}  // namespace minisgl
