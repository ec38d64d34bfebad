// Logits to token ids; what is sampled is defined by engine/sample.py and kernel/sampling_reference.py.
//
// The filters each keep a prefix of the tokens in order of (logit descending, index ascending), so that together they
// keep one prefix: all tokens with a logit above a threshold, and the first few of those that equal it. Instead of
// sorting, the threshold is found by a search over the ordered bits of the logits ("keys"): first in steps of doubling
// distance from the largest logit, then by bisection. Only tokens inside the undecided range are weighed.
//
// Masses are sums of 64-bit fixed-point numbers, which do not depend on the order of summation: a row's token depends
// on that row alone. A weight below 2^-44 of the largest counts as zero.
//
// From sm_90 a cluster of 8 blocks holds one row in shared memory, an eighth each; otherwise, and for rows too long for
// that, one block reads its row again and again, through the caches.
#include <minisgl/common.cuh>

#include <algorithm>

namespace minisgl {

namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMassScale = 17592186044416.0f;  // 2^44; the sum over 2^19 tokens fits into 64 bits
constexpr int64_t kMaxVocab = int64_t(1) << 19;
constexpr float kNegligible = 32.0f;  // nats below the largest: beyond the fixed point

// Keys: the bits of a logit, mapped so that integers order as the logits do. -0 is +0, every NaN is the largest.
template <typename T>
struct Logit;

template <>
struct Logit<__nv_bfloat16> {
  using Raw = uint16_t;
  static constexpr uint32_t kSign = 0x8000u, kMask = 0xffffu, kPosInf = 0xff80u;
  static __device__ __forceinline__ float value(uint32_t raw) { return __uint_as_float(raw << 16); }
};

template <>
struct Logit<__half> {
  using Raw = uint16_t;
  static constexpr uint32_t kSign = 0x8000u, kMask = 0xffffu, kPosInf = 0xfc00u;
  static __device__ __forceinline__ float value(uint32_t raw) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(raw)));
  }
};

template <>
struct Logit<float> {
  using Raw = uint32_t;
  static constexpr uint32_t kSign = 0x80000000u, kMask = 0xffffffffu, kPosInf = 0xff800000u;
  static __device__ __forceinline__ float value(uint32_t raw) { return __uint_as_float(raw); }
};

template <typename T>
constexpr uint32_t kNegInf = Logit<T>::kMask - Logit<T>::kPosInf;

template <typename T>
__device__ __forceinline__ uint32_t encode(uint32_t raw) {
  using L = Logit<T>;
  uint32_t key = raw ^ ((raw & L::kSign) ? L::kMask : L::kSign);
  if (key == L::kSign - 1) key = L::kSign;
  return key < kNegInf<T> ? L::kMask : key;
}

template <typename T>
__device__ __forceinline__ float decode(uint32_t key) {
  using L = Logit<T>;
  return L::value(key ^ ((key & L::kSign) ? L::kSign : L::kMask));
}

template <typename T>
__device__ __forceinline__ uint32_t key_of(float x) {
  const T rounded = from_float<T>(x);
  return encode<T>(*reinterpret_cast<const typename Logit<T>::Raw*>(&rounded));
}

__device__ __forceinline__ void cluster_arrive() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
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
  struct Shared {
    uint64_t partial[kWarps];
    uint64_t slots[2][kRanks];
  };
  Shared& shared;
  unsigned rank;
  unsigned parity = 0;

  // Thread r of the first warp sends `value` to block r; afterwards slots[parity] is complete in every block.
  __device__ __forceinline__ void exchange(uint64_t value) {
    parity ^= 1;
    if constexpr (kRanks > 1) {
      if (threadIdx.x < kRanks) store_remote(&shared.slots[parity][rank], threadIdx.x, value);
      cluster_arrive();
      cluster_wait();
    } else {
      if (threadIdx.x == 0) shared.slots[parity][0] = value;
      __syncthreads();
    }
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

struct SampleArgs {
  const void* logits;        // [b, vocab], rows `stride` elements apart
  const float* temperature;  // [b], and so on
  const int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const int64_t* seed;
  const int64_t* position;
  int32_t* out;
  int32_t* token_ids;    // [num_rows, max_len] or null
  const int32_t* rows;   // [b]
  int64_t stride, max_len;
  int vocab, slice;      // slice: tokens per block
  int vecs;              // vectors per thread
};

// This block's slice of a row. Thread t owns the `vecs` vectors from t * vecs on, so that threads are in index order.
// Vectors are aligned where the row need not be: `shift` positions before the slice, and all behind it, are padding.
template <typename T, int kThreads, bool kStaged>
struct Slice {
  using Raw = typename Logit<T>::Raw;
  static constexpr int kLen = 16 / sizeof(T);
  using Raws = Vec<Raw, kLen>;
  const Raw* aligned;  // address of position 0
  Raws* staged;        // keys, in shared memory
  int first, shift, end, vecs;  // first: index of position `shift`; end: position behind the last token

  __device__ Slice(const SampleArgs& args, int row, int rank, void* memory) : vecs(args.vecs) {
    const Raw* begin = static_cast<const Raw*>(args.logits) + row * args.stride;
    shift = static_cast<int>(reinterpret_cast<uintptr_t>(begin) % 16 / sizeof(Raw));
    first = min(rank * args.slice, args.vocab);  // slices are whole vectors: all are shifted alike
    end = shift + min(args.slice, args.vocab - first);
    aligned = begin + first - shift;
    staged = static_cast<Raws*>(memory);
  }

  __device__ __forceinline__ int index(int position) const { return first + position - shift; }

  // Vector v of the slice as it is in memory; `whole` where no part of it is padding.
  __device__ __forceinline__ Raws read(int v, bool& whole) const {
    const int position = v * kLen;
    whole = position >= shift && position + kLen <= end;
    return whole ? *reinterpret_cast<const Raws*>(aligned + position) : Raws{};
  }

  __device__ __forceinline__ void to_keys(int v, bool whole, Raws raws, uint32_t (&keys)[kLen]) const {
#pragma unroll
    for (int j = 0; j < kLen; ++j) {
      const int position = v * kLen + j;
      if (whole) keys[j] = encode<T>(raws.data[j]);
      else keys[j] = position >= shift && position < end ? encode<T>(aligned[position]) : kNegInf<T>;
    }
  }

  // Fill shared memory (where kStaged) and find this thread's largest key.
  __device__ uint32_t stage() const {
    constexpr int kBatch = 4;  // loads in flight
    uint32_t best = kNegInf<T>;
    for (int begin = 0; begin < vecs; begin += kBatch) {
      Raws raws[kBatch];
      bool whole[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (begin + i < vecs) raws[i] = read(vector(begin + i), whole[i]);
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (begin + i >= vecs) break;
        uint32_t keys[kLen];
        to_keys(vector(begin + i), whole[i], raws[i], keys);
#pragma unroll
        for (int j = 0; j < kLen; ++j) {
          best = max(best, keys[j]);
          raws[i].data[j] = static_cast<Raw>(keys[j]);
        }
        if constexpr (kStaged) staged[vector(begin + i)] = raws[i];
      }
    }
    return best;
  }

  // Which vector a thread stages i-th: neighbours take neighbouring ones.
  static __device__ __forceinline__ int vector(int i) { return threadIdx.x + i * kThreads; }

  // f(position of the first, keys) for this thread's own vectors in order, until it returns true.
  template <typename F>
  __device__ __forceinline__ void visit(F&& f) const {
    for (int i = 0; i < vecs; ++i) {
      const int v = threadIdx.x * vecs + i;
      uint32_t keys[kLen];
      if constexpr (kStaged) {
        const Raws raws = staged[v];
#pragma unroll
        for (int j = 0; j < kLen; ++j) keys[j] = raws.data[j];
      } else {
        bool whole;
        const Raws raws = read(v, whole);
        to_keys(v, whole, raws, keys);
      }
      if (f(v * kLen, keys)) return;
    }
  }
};

// Tokens that the filters keep: keys above `key`, the first `ties` (in index order) of those that equal it; and of all
// these the ones that weigh at least `min_weight`.
struct Cut {
  uint32_t key = 0;  // below every key
  uint32_t ties = 0;
  float min_weight = 0.0f;
};

template <typename T, int kRanks, int kThreads, bool kStaged>
struct Sampler {
  using Tokens = Slice<T, kThreads, kStaged>;
  static constexpr int kLen = Tokens::kLen;
  Tokens tokens;
  Team<kRanks, kThreads> team;
  uint32_t best;      // largest key of the row
  float best_logit, temperature;
  float rate;         // log2(weight) per unit of logit

  // Unnormalised: the largest weighs 1.
  __device__ __forceinline__ float weight(uint32_t key) const {
    return exp2f((decode<T>(key) - best_logit) * rate);
  }

  static __device__ __forceinline__ uint64_t mass(float weight) { return __float2ull_rz(weight * kMassScale); }

  // Number (or mass) of the row's tokens with low <= key < high.
  template <bool kMass>
  __device__ uint64_t measure(uint32_t low, uint32_t high) {
    const uint32_t width = high - low;
    uint64_t total = 0;
    uint32_t count = 0;
    tokens.visit([&](int, const uint32_t(&keys)[kLen]) {
#pragma unroll
      for (int j = 0; j < kLen; ++j) {
        if (keys[j] - low >= width) continue;
        if constexpr (kMass) total += mass(weight(keys[j]));
        else ++count;
      }
      return false;
    });
    return team.template reduce<Sum>(kMass ? total : count);
  }

  // The largest key such that the tokens from it on measure at least `need` > 0; `above`: what those beyond it measure.
  // 0 where even all tokens that weigh something do not reach it.
  template <bool kMass>
  __device__ uint32_t search(uint64_t need, uint64_t& above) {
    uint32_t low = 0, high = best + 1;  // the key is in [low, high)
    above = 0;                          // from `high` on
    for (float distance = 1.0f; low == 0; distance *= 2.0f) {
      if (distance > kNegligible) return 0;
      const uint32_t middle = key_of<T>(best_logit - distance * temperature);
      if (middle >= high) continue;
      const uint64_t part = measure<kMass>(middle, high);
      if (above + part >= need) {
        low = middle;
      } else {
        high = middle;
        above += part;
      }
    }
    while (high - low > 1) {
      const uint32_t middle = low + (high - low) / 2;
      const uint64_t part = measure<kMass>(middle, high);
      if (above + part >= need) {
        low = middle;
        if (!kMass && above + part == need) {  // all from here on: no need to look inside
          above = need;
          return low - 1;
        }
      } else {
        high = middle;
        above += part;
      }
    }
    return low;
  }

  __device__ Cut filter(uint32_t top_k, float top_p, float min_p) {
    Cut cut;
    cut.min_weight = fminf(min_p, 1.0f);
    uint64_t above;
    if (top_k > 0) {
      cut.key = search<false>(top_k, above);
      if (cut.key > 0) cut.ties = static_cast<uint32_t>(top_k - above);
    }
    if (top_p < 1.0f) {
      uint64_t left = measure<true>(cut.key + 1, best + 1);  // what top-k left
      if (cut.ties > 0) left += cut.ties * mass(weight(cut.key));
      // Keep while the mass before a token is below top_p * left: integers, so below its ceiling. The first always.
      uint64_t need = __double2ull_ru(static_cast<double>(top_p) * static_cast<double>(left));
      need = min(max(need, uint64_t(1)), left);
      cut.key = search<true>(need, above);
      const uint64_t each = mass(weight(cut.key));
      cut.ties = static_cast<uint32_t>((need - above + each - 1) / max(each, uint64_t(1)));
    }
    return cut;
  }

  // How many tokens with the threshold's key this thread keeps.
  __device__ uint32_t own_ties(const Cut& cut) {
    if (cut.ties == 0) return 0;
    uint64_t own = 0, total;
    tokens.visit([&](int, const uint32_t(&keys)[kLen]) {
#pragma unroll
      for (int j = 0; j < kLen; ++j) own += keys[j] == cut.key;
      return false;
    });
    const uint64_t before = team.exclusive_sum(own, total);
    return before >= cut.ties ? 0 : cut.ties - static_cast<uint32_t>(before);
  }

  // Running sums of the kept weights of one vector. Takes from `ties` what it keeps of them.
  __device__ __forceinline__ void running_sums(const uint32_t (&keys)[kLen], const Cut& cut, uint32_t& ties,
                                               float (&sums)[kLen]) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kLen; ++j) {
      const float w = weight(keys[j]);
      bool keep = keys[j] > cut.key;
      if (keys[j] == cut.key && ties > 0) {
        keep = true;
        --ties;
      }
      if (keep && w >= cut.min_weight) sum += w;
      sums[j] = sum;
    }
  }

  // Invert the CDF over the kept tokens in index order. Returns the token in the one thread that holds it, else -1.
  __device__ int pick(const Cut& cut, uint64_t number) {
    const uint32_t ties = own_ties(cut);
    uint64_t own = 0, total;
    uint32_t left = ties;
    float sums[kLen];
    tokens.visit([&](int, const uint32_t(&keys)[kLen]) {
      running_sums(keys, cut, left, sums);
      own += mass(sums[kLen - 1]);
      return false;
    });
    uint64_t before = team.exclusive_sum(own, total);
    const uint64_t target = __umul64hi(number, total);  // floor(uniform * total)
    if (target < before || target >= before + own) return -1;
    int found = -1;
    left = ties;
    tokens.visit([&](int position, const uint32_t(&keys)[kLen]) {
      running_sums(keys, cut, left, sums);
#pragma unroll
      for (int j = kLen - 1; j >= 0; --j) {
        if (before + mass(sums[j]) > target) found = tokens.index(position + j);
      }
      before += mass(sums[kLen - 1]);
      return found >= 0;
    });
    return found;
  }

  // The lowest index with the largest key.
  __device__ int arg_max() {
    int own = 0x7fffffff;
    tokens.visit([&](int position, const uint32_t(&keys)[kLen]) {
#pragma unroll
      for (int j = kLen - 1; j >= 0; --j) {
        if (keys[j] == best) own = tokens.index(position + j);
      }
      return own != 0x7fffffff;
    });
    return 0x7fffffff - static_cast<int>(team.template reduce<Max>(0x7fffffff - own));
  }
};

// splitmix64 (Steele et al., OOPSLA 2014), as in engine/sample.py.
__device__ __forceinline__ uint64_t splitmix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

__device__ __forceinline__ void write_token(const SampleArgs& args, int row, int token) {
  args.out[row] = token;
  if (args.token_ids == nullptr) return;
  const int64_t position = args.position[row];
  // A failed row (-1) gets some valid id, which nobody will see.
  if (position >= 0 && position < args.max_len) args.token_ids[args.rows[row] * args.max_len + position] = max(token, 0);
}

template <typename T, int kRanks, int kThreads, bool kStaged>
__global__ void __launch_bounds__(kThreads) sample_kernel(const SampleArgs args) {
  using Row = Sampler<T, kRanks, kThreads, kStaged>;
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ typename Team<kRanks, kThreads>::Shared shared;
  const int row = blockIdx.x / kRanks, rank = blockIdx.x % kRanks;
  if constexpr (kRanks > 1) cluster_arrive();
  pdl_trigger();
  pdl_wait();
  Row sampler{{args, row, rank, memory}, {shared, static_cast<unsigned>(rank)}};
  const uint32_t own_best = sampler.tokens.stage();
  if constexpr (kRanks > 1) cluster_wait();  // no block writes to another that has not started
  sampler.best = static_cast<uint32_t>(sampler.team.template reduce<Max>(own_best));
  if (sampler.best == kNegInf<T> || sampler.best >= Logit<T>::kPosInf) {
    if (rank == 0 && threadIdx.x == 0) write_token(args, row, -1);
    return;
  }
  const float temperature = args.temperature[row];
  if (!(temperature > 0.0f)) {
    const int token = sampler.arg_max();
    if (rank == 0 && threadIdx.x == 0) write_token(args, row, token);
    return;
  }
  sampler.temperature = temperature;
  sampler.best_logit = decode<T>(sampler.best);
  sampler.rate = fminf(kLog2e / temperature, 3e38f);
  const int top_k = args.top_k[row] > 0 && args.top_k[row] < args.vocab ? args.top_k[row] : 0;
  const Cut cut = sampler.filter(top_k, args.top_p[row], args.min_p[row]);
  const uint64_t number = splitmix(splitmix(args.seed[row]) ^ args.position[row]) & ~uint64_t(0xfff);
  const int token = sampler.pick(cut, number);
  if (token >= 0) write_token(args, row, token);
}

template <typename T, int kRanks, int kThreads, bool kStaged>
void launch_sample(SampleArgs args, int64_t num_rows, cudaStream_t stream) {
  constexpr int kLen = 16 / sizeof(T);
  args.slice = (args.vocab + kRanks * kLen - 1) / (kRanks * kLen) * kLen;
  // Odd, for then neighbouring threads' vectors lie in different banks.
  args.vecs = ((args.slice + 2 * kLen - 2) / kLen + kThreads - 1) / kThreads | 1;
  LaunchConfig config{dim3(num_rows * kRanks), dim3(kThreads)};
  config.cluster = kRanks;
  const auto kernel = sample_kernel<T, kRanks, kThreads, kStaged>;
  if (kStaged) {
    config.smem = size_t(args.vecs) * kThreads * 16;
    MINISGL_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(config.smem)));
  }
  launch(config, stream, kernel, args);
}

template <typename T>
void choose_sample(const SampleArgs& args, int64_t num_rows, int device, cudaStream_t stream) {
#ifdef MINISGL_PDL  // set from sm_90 on, which has clusters too
  int limit = 0;
  MINISGL_CUDA_CHECK(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  constexpr int kRanks = 8, kThreads = 512;
  const int64_t bytes = (args.vocab / kRanks + 2 * kThreads * 16) * int64_t(sizeof(T));  // and rounding, at most
  if (bytes + 1024 <= limit) return launch_sample<T, kRanks, kThreads, true>(args, num_rows, stream);
#endif
  launch_sample<T, 1, 1024, false>(args, num_rows, stream);
}

template <typename T>
const T* column(const TensorView& t, bool is_right_type, int64_t size) {
  MINISGL_CHECK(is_right_type && t.IsContiguous() && t.numel() == size);
  return static_cast<const T*>(t.data_ptr());
}

}  // namespace

// logits: [b, vocab] bf16, fp16 or fp32, any row stride; temperature (0: greedy), top_p, min_p: [b] float32; top_k: [b]
// int32 (0: off); seed: [b] int64, the bits of a uint64; position: [b] int64, of the token to be sampled; out: [b]
// int32, -1 where the largest logit is not finite. With token_ids [num_rows, max_len] int32 and rows [b] int32, the
// token also goes to token_ids[rows[i], position[i]].
void sample(TensorView logits, TensorView temperature, TensorView top_k, TensorView top_p, TensorView min_p,
            TensorView seed, TensorView position, TensorView out, tvm::ffi::Optional<TensorView> token_ids,
            tvm::ffi::Optional<TensorView> rows) {
  MINISGL_CHECK(logits.ndim() == 2);
  const int64_t num_rows = logits.size(0), vocab = logits.size(1);
  if (num_rows == 0) return;
  MINISGL_CHECK(vocab > 0 && vocab <= kMaxVocab && (logits.stride(1) == 1 || vocab == 1));
  SampleArgs args{};
  args.logits = logits.data_ptr();
  args.temperature = column<float>(temperature, is_fp32(temperature), num_rows);
  args.top_k = column<int32_t>(top_k, is_int32(top_k), num_rows);
  args.top_p = column<float>(top_p, is_fp32(top_p), num_rows);
  args.min_p = column<float>(min_p, is_fp32(min_p), num_rows);
  args.seed = column<int64_t>(seed, is_int64(seed), num_rows);
  args.position = column<int64_t>(position, is_int64(position), num_rows);
  args.out = const_cast<int32_t*>(column<int32_t>(out, is_int32(out), num_rows));
  if (token_ids.has_value()) {
    const TensorView table = token_ids.value();
    MINISGL_CHECK(rows.has_value() && table.ndim() == 2);
    args.token_ids = const_cast<int32_t*>(column<int32_t>(table, is_int32(table), table.numel()));
    args.max_len = table.size(1);
    args.rows = column<int32_t>(rows.value(), is_int32(rows.value()), num_rows);
  }
  args.stride = logits.stride(0);
  args.vocab = static_cast<int>(vocab);
  const cudaStream_t stream = current_stream(logits);
  const int device = logits.device().device_id;
  if (is_bf16(logits)) choose_sample<__nv_bfloat16>(args, num_rows, device, stream);
  else if (is_fp16(logits)) choose_sample<__half>(args, num_rows, device, stream);
  else if (is_fp32(logits)) choose_sample<float>(args, num_rows, device, stream);
  else TVM_FFI_THROW(TypeError) << "sample: expected logits in bfloat16, float16 or float32";
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, minisgl::sample);

}  // namespace minisgl
