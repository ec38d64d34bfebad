// What sampling.cu is made of: logits as integers, the threads that share a row, and where they hold it.
#pragma once

#include <minisgl/common.cuh>
#include <minisgl/sampling_params.h>

namespace minisgl {

namespace {

// Logits as they are held: words of one or two of them, without -0 and with one NaN, which is the largest value.
// Keys: their bits, mapped so that integers order as the logits do.
struct Logit16 {
  using Raw = uint16_t;
  static constexpr uint32_t kSign = 0x8000u, kMask = 0xffffu;
  static __device__ __forceinline__ uint32_t to_keys(uint32_t word) {
    return word ^ (((word >> 15) & 0x10001u) * 0x7fffu + 0x80008000u);
  }
};

template <typename T>
struct Logit;

template <>
struct Logit<__nv_bfloat16> : Logit16 {
  static constexpr uint32_t kPosInf = 0xff80u;
  static __device__ __forceinline__ float value(uint32_t raw) { return __uint_as_float(raw << 16); }
  static __device__ __forceinline__ uint32_t normal(uint32_t word) {  // times 1 plus 0: turns -0 into 0
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(word) : "r"(0x3f803f80u), "r"(0u));
    return word;
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
  }
};

template <>
struct Logit<__half> : Logit16 {
  static constexpr uint32_t kPosInf = 0xfc00u;
  static __device__ __forceinline__ float value(uint32_t raw) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(raw)));
  }
  static __device__ __forceinline__ uint32_t normal(uint32_t word) {
    asm("fma.rn.f16x2 %0, %0, %1, %2;" : "+r"(word) : "r"(0x3c003c00u), "r"(0u));
    return word;
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
  }
};

template <>
struct Logit<float> {
  using Raw = uint32_t;
  static constexpr uint32_t kSign = 0x80000000u, kMask = 0xffffffffu, kPosInf = 0xff800000u;
  static __device__ __forceinline__ uint32_t to_keys(uint32_t word) {
    return word ^ ((word & kSign) ? kMask : kSign);
  }
  static __device__ __forceinline__ float value(uint32_t raw) { return __uint_as_float(raw); }
  static __device__ __forceinline__ uint32_t normal(uint32_t word) {
    asm("add.rn.f32 %0, %0, %1;" : "+r"(word) : "r"(0u));
    return word;
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    asm("max.NaN.f32 %0, %0, %1;" : "+r"(a) : "r"(b));
    return a;
  }
};

template <typename T>
constexpr uint32_t kNegInf = Logit<T>::kMask - Logit<T>::kPosInf;  // as a key

template <typename T>
__device__ __forceinline__ uint32_t to_raw(uint32_t key) {
  using L = Logit<T>;
  return key ^ ((key & L::kSign) ? L::kSign : L::kMask);
}

template <typename T>
__device__ __forceinline__ float decode(uint32_t key) {
  return Logit<T>::value(to_raw<T>(key));
}

template <typename T>
__device__ __forceinline__ uint32_t key_of(float x) {
  const T rounded = from_float<T>(x);
  const uint32_t raw = *reinterpret_cast<const typename Logit<T>::Raw*>(&rounded);
  return Logit<T>::to_keys(Logit<T>::normal(raw)) & Logit<T>::kMask;
}

// a >= b, where the compiler's comparisons (fast math) take subnormal numbers for zero: the bfloat16 or float32 next to
// zero is one, and often the bound.
__device__ __forceinline__ bool at_least(float a, float b) {
  uint32_t result;
  asm("set.ge.u32.f32 %0, %1, %2;" : "=r"(result) : "f"(a), "f"(b));
  return result != 0;
}

// `release`: what this thread wrote is seen by those that wait. A fence, costly where every warp has one.
__device__ __forceinline__ void cluster_arrive(bool release) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (release) asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  else asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// *p = value, in the shared memory of block `rank` of the cluster; p is this block's own address of the variable.
[[maybe_unused]] __device__ __forceinline__ void store_remote(uint64_t* p, unsigned rank, uint64_t value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(remote), "l"(value) : "memory");
#endif
}

[[maybe_unused]] __device__ __forceinline__ uint32_t load_remote(const uint32_t* p, unsigned rank) {
  uint32_t value = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const uint32_t local = static_cast<uint32_t>(__cvta_generic_to_shared(p));
  uint32_t remote;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(local), "r"(rank));
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(remote) : "memory");
#endif
  return value;
}

struct Sum {
  static __device__ __forceinline__ uint64_t apply(uint64_t a, uint64_t b) { return a + b; }
};
struct Max {
  static __device__ __forceinline__ uint64_t apply(uint64_t a, uint64_t b) { return a > b ? a : b; }
};

// Communication among the threads of a row: kRanks blocks of kThreads. Values cross blocks through `slots`, which each
// block writes into all others; they alternate, so that one barrier per exchange is enough: who writes a slot for the
// second time has passed the barrier of the exchange between, before which everyone had read the first.
template <int kRanks, int kThreads>
struct Team {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kBins = kRanks * kThreads < 2048 ? kRanks * kThreads : 2048;  // keys that are counted
  struct Shared {
    uint64_t partial[kWarps];
    uint64_t slots[2][kRanks];
    uint32_t bins[kBins];  // block r is to add up the r-th part of all blocks' bins
  };
  Shared& shared;
  unsigned rank;
  unsigned parity = 0;

  __device__ __forceinline__ void sync(bool release) {
    if constexpr (kRanks > 1) {
      cluster_arrive(release);
      cluster_wait();
    } else {
      __syncthreads();
    }
  }

  // The row's count in bin rank * (kBins / kRanks) + thread, after a sync; 0 in the threads that have none.
  __device__ __forceinline__ uint32_t own_bin() const {
    constexpr unsigned kOwn = kBins / kRanks;
    static_assert(kOwn <= kThreads);
    if (threadIdx.x >= kOwn) return 0;
    if constexpr (kRanks == 1) return shared.bins[threadIdx.x];
    uint32_t count = 0;
#pragma unroll
    for (unsigned r = 0; r < kRanks; ++r) count += load_remote(&shared.bins[rank * kOwn + threadIdx.x], r);
    return count;
  }

  // Thread r of the first warp sends `value` to block r; afterwards slots[parity] is complete in every block.
  __device__ __forceinline__ void exchange(uint64_t value) {
    parity ^= 1;
    if constexpr (kRanks > 1) {
      if (threadIdx.x < kRanks) store_remote(&shared.slots[parity][rank], threadIdx.x, value);
    } else {
      if (threadIdx.x == 0) shared.slots[parity][0] = value;
    }
    sync(threadIdx.x < 32);  // the other warps have written nothing since the last barrier
  }

  template <typename Op>
  __device__ uint64_t reduce(uint64_t value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) value = Op::apply(value, __shfl_xor_sync(0xffffffffu, value, d));
    if (lane == 0) shared.partial[warp] = value;
    __syncthreads();
    if (warp == 0) {
      value = lane < kWarps ? shared.partial[lane] : 0;
#pragma unroll
      for (int d = 16; d > 0; d /= 2) value = Op::apply(value, __shfl_xor_sync(0xffffffffu, value, d));
    }
    exchange(value);
    uint64_t result = shared.slots[parity][0];
#pragma unroll
    for (int r = 1; r < kRanks; ++r) result = Op::apply(result, shared.slots[parity][r]);
    return result;
  }

  // Sum over the threads before this one, in order of rank and thread; `total` is that over all.
  __device__ uint64_t exclusive_sum(uint64_t value, uint64_t& total) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint64_t inclusive = inclusive_warp_sum(value, lane);
    if (lane == 31) shared.partial[warp] = inclusive;
    __syncthreads();
    uint64_t warps = 0;
    if (warp == 0) {
      const uint64_t own = lane < kWarps ? shared.partial[lane] : 0;
      warps = inclusive_warp_sum(own, lane);
      if (lane < kWarps) shared.partial[lane] = warps - own;
    }
    exchange(__shfl_sync(0xffffffffu, warps, 31));
    uint64_t before = 0;
    total = 0;
#pragma unroll
    for (int r = 0; r < kRanks; ++r) {
      if (r == rank) before = total;
      total += shared.slots[parity][r];
    }
    before += shared.partial[warp] + inclusive - value;
    __syncthreads();  // `partial` is free again
    return before;
  }

  static __device__ __forceinline__ uint64_t inclusive_warp_sum(uint64_t value, int lane) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const uint64_t other = __shfl_up_sync(0xffffffffu, value, d);
      if (lane >= d) value += other;
    }
    return value;
  }
};

// Masks, in memory of the host that is written meanwhile. A row waits until the state of its mask is no longer 0.
struct Board {
  const uint32_t* words;  // [k, ceil(vocab / 32)]: bit t % 32 of word t / 32 is set if token t may be sampled
  const int32_t* states;  // [k]
  int32_t* ids;           // [k]: what was sampled, for the host
  unsigned long long began;  // ns: when the first row began to wait; 0: none has
};

struct SampleArgs {
  const void* logits;            // [b, vocab], rows `stride` elements apart
  const SamplingParams* params;  // [b]
  int32_t* out;                  // [b]
  int32_t* token_ids;    // [num_rows, max_len] or null
  const int32_t* rows;   // [b]
  int64_t stride, max_len;
  int vocab, slice;      // slice: tokens per block
  int vecs;              // vectors per thread
  const Board* board;    // of the rows with masks; or null: the host is told of none
};

// This block's slice of a row, in vectors of 16 bytes. Each warp owns `vecs` times 32 of them in a row, its lanes every
// 32nd, so that warps are in index order. Vectors are aligned where the row need not be: `shift` positions before the
// slice, and all behind it, are padding.
template <typename T, int kThreads, bool kStaged>
struct Slice {
  using L = Logit<T>;
  using Raw = typename L::Raw;
  static constexpr int kLen = 16 / sizeof(T), kWords = 4, kPerWord = kLen / kWords;
  using Words = Vec<uint32_t, kWords>;
  const Raw* aligned;           // address of position 0
  Words* staged;                // in shared memory
  int first, shift, end, vecs;  // first: index of position `shift`; end: position behind the last token

  __device__ Slice(const SampleArgs& args, int row, int rank, void* memory) : vecs(args.vecs) {
    const Raw* begin = static_cast<const Raw*>(args.logits) + row * args.stride;
    shift = static_cast<int>(reinterpret_cast<uintptr_t>(begin) % 16 / sizeof(Raw));
    first = min(rank * args.slice, args.vocab);  // slices are whole vectors: all are shifted alike
    end = shift + min(args.slice, args.vocab - first);
    aligned = begin + first - shift;
    staged = static_cast<Words*>(memory);
  }

  // Of a row that is put into shared memory in another way than by `stage`: without a shift.
  __device__ Slice(const SampleArgs& args, int rank, void* memory)
      : aligned(nullptr), staged(static_cast<Words*>(memory)), shift(0), vecs(args.vecs) {
    first = min(rank * args.slice, args.vocab);
    end = min(args.slice, args.vocab - first);
  }

  __device__ __forceinline__ int index(int position) const { return first + position - shift; }
  __device__ __forceinline__ int vector(int i) const { return (threadIdx.x / 32 * vecs + i) * 32 + threadIdx.x % 32; }

  static __device__ __forceinline__ uint32_t raw(const Words& words, int j) {
    return words.data[j / kPerWord] >> (j % kPerWord * 16) & L::kMask;
  }

  __device__ __forceinline__ bool is_whole(int v) const { return v * kLen >= shift && v * kLen + kLen <= end; }

  static __device__ __forceinline__ Words padding() {
    constexpr uint32_t kRaw = L::kPosInf;  // as it happens, the bits of -inf
    constexpr uint32_t kWord = kPerWord == 2 ? kRaw * 0x10001u : kRaw;
    return {kWord, kWord, kWord, kWord};
  }

  __device__ __forceinline__ Words read_whole(int v) const {
    return *reinterpret_cast<const Words*>(aligned + int64_t(v) * kLen);
  }

  static __device__ __forceinline__ Words normal(Words words) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) words.data[w] = L::normal(words.data[w]);
    return words;
  }

  __device__ __forceinline__ Words read(int v) const {
    if (is_whole(v)) return normal(read_whole(v));
    Words words = padding();
#pragma unroll
    for (int j = 0; j < kLen; ++j) {
      const int position = v * kLen + j;
      if (position < shift || position >= end) continue;
      const int at = j % kPerWord * 16;
      uint32_t& word = words.data[j / kPerWord];
      word = (word & ~(L::kMask << at)) | static_cast<uint32_t>(aligned[position]) << at;
    }
    return normal(words);
  }

  static __device__ __forceinline__ void take(const Words& words, uint32_t& best) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) best = L::larger(best, words.data[w]);
  }

  // Fill shared memory (where kStaged) and find this thread's largest key.
  __device__ uint32_t stage() const {
    constexpr int kBatch = 5;  // loads in flight
    uint32_t best = padding().data[0];
    for (int begin = 0; begin < vecs; begin += kBatch) {
      Words words[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int v = vector(begin + i);
        words[i] = begin + i < vecs && is_whole(v) ? read_whole(v) : padding();
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        words[i] = normal(words[i]);
        take(words[i], best);
        if constexpr (kStaged) {
          if (begin + i < vecs) staged[vector(begin + i)] = words[i];
        }
      }
    }
    // The slice's first vector, and its last ones, may be whole in part.
#pragma unroll 1
    for (int i = 0; i < vecs; ++i) {
      const int v = vector(i);
      if (is_whole(v) || v * kLen >= end) continue;
      const Words words = read(v);
      take(words, best);
      if constexpr (kStaged) staged[v] = words;
    }
    const uint32_t keys = L::to_keys(best);
    return kPerWord == 1 ? keys : max(keys & L::kMask, keys >> 16 * (kPerWord - 1));
  }

  // f(position of the first, words) for this thread's own vectors in order.
  template <typename F>
  __device__ __forceinline__ void visit(F&& f) const {
    for (int i = 0; i < vecs; ++i) {
      const int v = vector(i);
      if constexpr (kStaged) f(v * kLen, staged[v]);
      else f(v * kLen, read(v));
    }
  }
};

}  // namespace

}  // namespace minisgl
