// What a warp does with heads of a gated delta net at single tokens: convolution, gates, rule, norm.
//
// For `src/delta.cu` alone, which see; the shapes are macros that its build defines.
#pragma once

#include <minisgl/common.cuh>

#include <algorithm>

namespace minisgl {
namespace {

#ifndef DELTA_DTYPE
#define DELTA_DTYPE __nv_bfloat16
#define DELTA_NUM_K 16
#define DELTA_NUM_V 32
#define DELTA_DIM_K 128
#define DELTA_DIM_V 128
#define DELTA_WIDTH 4
#endif

using Element = DELTA_DTYPE;
constexpr int kNumK = DELTA_NUM_K, kNumV = DELTA_NUM_V, kDimK = DELTA_DIM_K, kDimV = DELTA_DIM_V;
constexpr int kBefore = DELTA_WIDTH - 1;  // tokens that the convolution remembers
constexpr int kGroup = kNumV / kNumK;     // heads of values that share one of keys
constexpr int kKeys = kNumK * kDimK, kValues = kNumV * kDimV, kChannels = 2 * kKeys + kValues;
static_assert(kNumV % kNumK == 0 && kDimV % 4 == 0 && kBefore > 0);

// A warp's share of a head's state: so many columns, of which a lane has four in some rows. Whole lines of 128 bytes, as
// registers allow: with half of that a step of 256 tokens takes a tenth longer.
constexpr int kColumns = kDimK > 128 ? 16 : 32, kLanes = kColumns / 4, kStride = 32 / kLanes;
constexpr int kRows = (kDimK + kStride - 1) / kStride, kShares = (kDimV + kColumns - 1) / kColumns;
// Warps of a block of `tokens`: up to kFewBlocks blocks one for each share; more blocks have fewer, so that an SM has
// others whose states are on their way while one computes.
constexpr unsigned kFewBlocks = 128;
constexpr int kFewWarps = std::min(8, kGroup * kShares), kManyWarps = std::min(4, kFewWarps), kBlocksPerSM = 3;
constexpr int kLocal = 2 * kDimK + kGroup * kDimV;  // features of a query, its key and their values
constexpr int kKept = kChannels + kValues + 2 * kNumV;  // features of a token that is kept: as of `x`, then as of `ba`
constexpr int kRun = 16, kAtOnce = 4, kRunWarps = 4;  // of `convolve` and `finish`: tokens of a warp, that it reads at once

struct Params {
  const Element* x;     // [num_tokens, kChannels + kValues], rows x_stride apart: queries, keys, values, gates
  const Element* ba;    // [num_tokens, 2 * kNumV], rows ba_stride apart
  const Element* conv;  // [kChannels, kBefore + 1]
  const float* a_log;   // [kNumV]
  const float* dt_bias;
  const Element* norm;  // [kDimV]
  Element* seen;        // [slots, kChannels, kBefore]
  float* memory;        // [slots, kNumV, kDimK, kDimV]
  const int* slots;     // [num_seqs]
  const int* cu_q;      // [num_seqs + 1]
  Element* out;         // [num_tokens, kValues]
  Element* qkv;         // [num_tokens, kChannels]
  float* gates;         // [2, num_tokens, kNumV]: logarithms of decays, betas
  Element* kept;        // [slots, longest, kKept]: tokens that were tried
  const int* held;      // [num_seqs]: how many of these come before a sequence's; or null, like `tried`
  const int* tried;     // [num_seqs]: how many of its last tokens its state does not take in
  int64_t x_stride, ba_stride;
  int num_tokens, num_seqs, longest;
  float eps;
  bool early, all;  // see `delta`

  // Whether `drafts` computes a sequence's tokens.
  __device__ __forceinline__ bool has_draft(int seq, int count) const {
    return all || (tried != nullptr && (tried[seq] > 0 || (held[seq] > 0 && count == 1)));
  }
};

__device__ __forceinline__ float silu(float x) { return x / (1.f + __expf(-x)); }

struct Gates {
  float log_decay, beta;
};

// ba: of a token.
__device__ __forceinline__ Gates gates_of(const Params& p, const Element* ba, int head) {
  ba += head;
  float a = to_float(ba[kNumV]) + p.dt_bias[head], b = to_float(ba[0]);
  float softplus = a > 20.f ? a : log1pf(__expf(a));
  return {-__expf(p.a_log[head]) * softplus, 1.f / (1.f + __expf(-b))};
}

__device__ __forceinline__ Gates gates_of(const Params& p, int t, int head) { return gates_of(p, p.ba + t * p.ba_stride, head); }

__device__ __forceinline__ void load_weight(float (&weight)[kBefore + 1], const Params& p, int channel) {
#pragma unroll
  for (int i = 0; i <= kBefore; i++) weight[i] = to_float(p.conv[channel * (kBefore + 1) + i]);
}

// What a channel's convolution has seen before a token, the newest last.
struct Window {
  float at[kBefore];

  // Before token t of the sequence that starts at token `start` and has this slot.
  __device__ __forceinline__ void fill(const Params& p, int channel, int t, int start, int slot) {
    const Element* state = p.seen + (int64_t(slot) * kChannels + channel) * kBefore;
#pragma unroll
    for (int i = 0; i < kBefore; i++) {
      int from = t - kBefore + i;
      at[i] = to_float(from >= start ? p.x[from * p.x_stride + channel] : state[from - start + kBefore]);
    }
  }

  // The convolution at the token itself, after SiLU; the token is the newest afterwards.
  __device__ __forceinline__ float push(const float (&weight)[kBefore + 1], float x) {
    float y = x * weight[kBefore];
#pragma unroll
    for (int i = 0; i < kBefore; i++) y += at[i] * weight[i];
#pragma unroll
    for (int i = 0; i < kBefore; i++) at[i] = i + 1 < kBefore ? at[i + 1] : x;
    return silu(y);
  }

  __device__ __forceinline__ void save(const Params& p, int channel, int slot) const {
    Element* state = p.seen + (int64_t(slot) * kChannels + channel) * kBefore;
#pragma unroll
    for (int i = 0; i < kBefore; i++) state[i] = from_float<Element>(at[i]);
  }
};

// What a warp does with a head's outputs at a token: RMS norm, times the weight of the norm, times SiLU of the gate.
struct Finish {
  static constexpr int kPer = (kDimV + 31) / 32;
  float gains[kPer];

  __device__ __forceinline__ void load(const Params& p, int t, int head) {
    const Element* z = p.x + t * p.x_stride + kChannels + head * kDimV;
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      int e = threadIdx.x % 32 + i * 32;
      gains[i] = e < kDimV ? to_float(p.norm[e]) * silu(to_float(z[e])) : 0.f;
    }
  }

  // values: elements lane + 32 i, zeros where there are none.
  __device__ __forceinline__ void store(const Params& p, int t, int head, const float (&values)[kPer]) const {
    Element* out = p.out + int64_t(t) * kValues + head * kDimV;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kPer; i++) squares += values[i] * values[i];
    float scale = rsqrtf(warp_sum(squares) / kDimV + p.eps);
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      int e = threadIdx.x % 32 + i * 32;
      if (e < kDimV) out[e] = from_float<Element>(values[i] * scale * gains[i]);
    }
  }

  // from: [kDimV].
  __device__ __forceinline__ void store_row(const Params& p, int t, int head, const float* from) const {
    float values[kPer];
#pragma unroll
    for (int i = 0; i < kPer; i++) {
      int e = threadIdx.x % 32 + i * 32;
      values[i] = e < kDimV ? from[e] : 0.f;
    }
    store(p, t, head, values);
  }
};

// A warp's share of a head's state: rows lane / kLanes + kStride i, four columns from `column` on.
struct Share {
  float4 rows[kRows];
  float* memory;  // the head's
  int head, column;

  static __device__ __forceinline__ int index(int i) { return int(threadIdx.x) % 32 / kLanes + i * kStride; }
  __device__ __forceinline__ bool has(int i) const {
    return (kDimV % kColumns == 0 || column < kDimV) && (kDimK % kStride == 0 || index(i) < kDimK);
  }
  __device__ __forceinline__ float4* row(int i) const {
    return reinterpret_cast<float4*>(memory + index(i) * kDimV + column);
  }

  __device__ __forceinline__ void load(const Params& p, int slot, int key, int unit) {
    head = key * kGroup + unit / kShares;
    column = unit % kShares * kColumns + threadIdx.x % kLanes * 4;
    memory = p.memory + (int64_t(slot) * kNumV + head) * (kDimK * kDimV);
#pragma unroll
    for (int i = 0; i < kRows; i++) rows[i] = has(i) ? __ldcs(row(i)) : float4{0, 0, 0, 0};
  }

  __device__ __forceinline__ void store(int i) const {
    if (has(i)) __stcs(row(i), rows[i]);
  }
  __device__ __forceinline__ void store() const {
#pragma unroll
    for (int i = 0; i < kRows; i++) store(i);
  }
};

__device__ __forceinline__ void add_scaled(float4& sum, float scale, const float4& x) {
  sum.x += scale * x.x, sum.y += scale * x.y, sum.z += scale * x.z, sum.w += scale * x.w;
}

// Over the lanes that have the same columns.
__device__ __forceinline__ void sum_rows(float4& x) {
#pragma unroll
  for (int offset = kLanes; offset < 32; offset *= 2) {
    x.x += __shfl_xor_sync(0xffffffffu, x.x, offset);
    x.y += __shfl_xor_sync(0xffffffffu, x.y, offset);
    x.z += __shfl_xor_sync(0xffffffffu, x.z, offset);
    x.w += __shfl_xor_sync(0xffffffffu, x.w, offset);
  }
}

struct Scratch {
  float q[kDimK], k[kDimK], v[kGroup * kDimV];  // in this order those of `channel_of`
  float out[kGroup * kDimV];
};

// Of feature i of a key's head: its queries, keys, then values.
__device__ __forceinline__ int channel_of(int key, int i) {
  if (i < kDimK) return key * kDimK + i;
  return i < 2 * kDimK ? kKeys + (key - 1) * kDimK + i : 2 * kKeys + key * kGroup * kDimV + i - 2 * kDimK;
}

// Queries and keys become 1 long, queries then 1 / sqrt(kDimK). → their product. Each warp finds it by itself.
struct Lengths {
  float q, k, overlap;

  template <typename Features>
  __device__ explicit Lengths(const Features& s) : q(0), k(0), overlap(0) {
    for (int d = threadIdx.x % 32; d < kDimK; d += 32) {
      q += s.q[d] * s.q[d];
      k += s.k[d] * s.k[d];
      overlap += s.q[d] * s.k[d];
    }
    q = rsqrtf(warp_sum(q) + 1e-6f) * rsqrtf(float(kDimK));
    k = rsqrtf(warp_sum(k) + 1e-6f);
    overlap = warp_sum(overlap) * q * k;
  }
};

// The rule for one token: memory *= decay; memory += k ⊗ beta (v - kᵀ memory); o = qᵀ memory, of which qᵀ k is known.
template <bool kStores = true>
__device__ __forceinline__ void advance(Share& share, Scratch& s, const Lengths& lengths, Gates gates, int local) {
  float decay = __expf(gates.log_decay);
  float4 told{0, 0, 0, 0}, out{0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    int d = kDimK % kStride == 0 ? Share::index(i) : min(Share::index(i), kDimK - 1);
    add_scaled(told, s.k[d], share.rows[i]);
    add_scaled(out, s.q[d], share.rows[i]);
  }
  sum_rows(told);
  sum_rows(out);
  int e = local * kDimV + share.column;
  bool is_there = kDimV % kColumns == 0 || share.column < kDimV;
  const float4 v = is_there ? *reinterpret_cast<const float4*>(s.v + e) : float4{0, 0, 0, 0};
  float k_decay = lengths.k * decay, q_decay = lengths.q * decay, more = lengths.overlap;
  float4 added{gates.beta * (v.x - k_decay * told.x), gates.beta * (v.y - k_decay * told.y),
               gates.beta * (v.z - k_decay * told.z), gates.beta * (v.w - k_decay * told.w)};
  if (threadIdx.x % 32 < kLanes && is_there) {
    *reinterpret_cast<float4*>(s.out + e) = {q_decay * out.x + more * added.x, q_decay * out.y + more * added.y,
                                             q_decay * out.z + more * added.z, q_decay * out.w + more * added.w};
  }
#pragma unroll
  for (int i = 0; i < kRows; i++) {
    int d = kDimK % kStride == 0 ? Share::index(i) : min(Share::index(i), kDimK - 1);
    float4& row = share.rows[i];
    row = {row.x * decay, row.y * decay, row.z * decay, row.w * decay};
    add_scaled(row, s.k[d] * lengths.k, added);
    if constexpr (kStores) share.store(i);
  }
}

}  // namespace
}  // namespace minisgl
