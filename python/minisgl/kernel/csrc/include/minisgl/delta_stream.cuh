// Single tokens of many sequences, whose states stream through shared memory (copy engine of sm_90): for `src/delta.cu`.
//
// Blocks stay, one on an SM, and go from key's head to key's head of sequences. Warps have roles. One for each stage of a
// ring has the states of heads copied in and out; four compute convolution, gates and gains of the next keys' heads; the
// others apply the rule to what has arrived, where it lies. So copies never wait for numbers, nor the rule for inputs.
#pragma once

#include <minisgl/delta.cuh>
#include <minisgl/tma.cuh>

namespace minisgl {
namespace {

constexpr int kVec = 16 / sizeof(Element);  // elements that move at once
constexpr int kStateBytes = kDimK * kDimV * 4;  // of a head
constexpr int kStages = std::min(6, 3 * (64 << 10) / kStateBytes);
constexpr int kAhead = 3;   // keys' heads whose inputs are held
constexpr int kHalves = 2;  // of a state's rows, a warp each
static_assert(kStages > 1 && kDimK % (4 * kHalves) == 0 && kDimK % kVec == 0 && kDimV % 32 == 0);
constexpr int kAcross = kDimV / 32, kRuleWarps = kAcross * kHalves, kInputWarps = 4;
constexpr int kRuleThreads = 32 * kRuleWarps, kInputThreads = 32 * kInputWarps;
constexpr int kStreamThreads = kRuleThreads + kInputThreads + 32 * kStages;
constexpr int kInputBarrier = 1, kRuleBarrier = 2;

// Of a key's head of a sequence with one token.
struct alignas(16) Inputs {
  float q[kDimK], k[kDimK], v[kGroup * kDimV];  // in this order those of `channel_of`, as the convolution leaves them
  float gains[kGroup * kDimV];
  float decay[kGroup], beta[kGroup];
  Lengths lengths;
  int token, key;  // token: -1 behind the last one
};

// Shared memory.
struct alignas(128) Stream {
  float states[kStages][kDimK * kDimV];
  Inputs inputs[kAhead];
  alignas(16) float partial[kHalves][2][kDimV];
  float squares[2][kAcross];
  uint64_t arrived[kStages], updated[kStages], ready[kAhead], taken[kAhead];  // of states, then of inputs
};

// A key's head of a sequence; blocks take every so many of them.
struct Item {
  int index, seq, key, slot, start, end;

  __device__ __forceinline__ Item(const Params& p, int index) : index(index) { look(p); }

  __device__ __forceinline__ void look(const Params& p) {
    seq = index / kNumK, key = index % kNumK;
    if (exists(p)) slot = p.slots[seq], start = p.cu_q[seq], end = p.cu_q[seq + 1];
  }
  __device__ __forceinline__ bool exists(const Params& p) const { return seq < p.num_seqs; }
  __device__ __forceinline__ bool is_single(const Params& p) const { return end - start <= 1 && !p.has_draft(seq, end - start); }
  __device__ __forceinline__ void next(const Params& p) { index += gridDim.x, look(p); }
  __device__ __forceinline__ void skip(const Params& p) {
    while (exists(p) && !is_single(p)) next(p);
  }
};

// One thread: every kStages-th state of the block's goes through its stage.
__device__ __forceinline__ void copy_states(const Params& p, Stream& s, int stage, uint64_t policy) {
  uint32_t here = shared_address(s.states[stage]), arrived = shared_address(s.arrived + stage);
  uint32_t updated = shared_address(s.updated + stage), parity = 0;
  Item item(p, blockIdx.x);
  item.skip(p);
  int local = stage - kStages;
  auto next = [&]() -> float* {
    local += kStages;
    while (local >= kGroup && item.exists(p)) local -= kGroup, item.next(p), item.skip(p);
    if (!item.exists(p)) return nullptr;
    return p.memory + (int64_t(item.slot) * kNumV + item.key * kGroup + local) * (kDimK * kDimV);
  };
  auto load = [&](const float* from) {
    barrier_expect(arrived, kStateBytes);
    bulk_load(here, from, kStateBytes, arrived, policy);
  };
  float* state = next();
  if (state != nullptr) load(state);
  pdl_wait();
  while (state != nullptr) {
    float* ahead = next();
    barrier_wait(updated, parity), parity ^= 1;
    bulk_store(state, here, kStateBytes);
    bulk_read();
    state = ahead;
    if (state != nullptr) load(state);
  }
  bulk_stored();
}

struct alignas(16) Piece {
  Element at[kVec];
};

template <int kPieces>
union Pieces {
  Piece pieces[kPieces];
  Element at[kVec * kPieces];
};

// kVec channels from feature i of the item on: convolved, and the window brought up to date.
__device__ __forceinline__ void convolve(const Params& p, const Item& item, Inputs& to, int i) {
  int channel = channel_of(item.key, i);
  Piece* seen = reinterpret_cast<Piece*>(p.seen + (int64_t(item.slot) * kChannels + channel) * kBefore);
  const Piece* weight = reinterpret_cast<const Piece*>(p.conv + channel * (kBefore + 1));
  Pieces<kBefore> window;
  Pieces<kBefore + 1> weights;
  float* features = reinterpret_cast<float*>(&to);
#pragma unroll
  for (int j = 0; j < kBefore; j++) window.pieces[j] = seen[j];
#pragma unroll
  for (int j = 0; j <= kBefore; j++) weights.pieces[j] = weight[j];
  const Piece x = *reinterpret_cast<const Piece*>(p.x + item.start * p.x_stride + channel);
#pragma unroll
  for (int j = 0; j < kVec; j++) {
    Element* at = window.at + j * kBefore;
    const Element* by = weights.at + j * (kBefore + 1);
    float y = to_float(x.at[j]) * to_float(by[kBefore]);
#pragma unroll
    for (int b = 0; b < kBefore; b++) y += to_float(at[b]) * to_float(by[b]);
#pragma unroll
    for (int b = 0; b < kBefore; b++) at[b] = b + 1 < kBefore ? at[b + 1] : x.at[j];
    features[i + j] = silu(y);
  }
#pragma unroll
  for (int j = 0; j < kBefore; j++) seen[j] = window.pieces[j];
}

// What a token's outputs are multiplied by after the norm, kVec of them from element i of the group's on.
__device__ __forceinline__ void fill_gains(const Params& p, const Item& item, Inputs& to, int i) {
  int head = item.key * kGroup;
  const Piece z = *reinterpret_cast<const Piece*>(p.x + item.start * p.x_stride + kChannels + head * kDimV + i);
  const Piece norm = *reinterpret_cast<const Piece*>(p.norm + i % kDimV);
#pragma unroll
  for (int j = 0; j < kVec; j++) to.gains[i + j] = to_float(norm.at[j]) * silu(to_float(z.at[j]));
}

__device__ __forceinline__ void sync_some(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A piece of the inputs of a single token: features, gains, or what a head learns and forgets.
__device__ __forceinline__ void fill(const Params& p, const Item& item, Inputs& to, int piece) {
  constexpr int kFeatures = kLocal / kVec, kGains = kGroup * kDimV / kVec;
  if (piece < kFeatures) return convolve(p, item, to, piece * kVec);
  if (piece < kFeatures + kGains) return fill_gains(p, item, to, (piece - kFeatures) * kVec);
  int local = piece - kFeatures - kGains;
  if (local >= kGroup) return;
  Gates gates = gates_of(p, item.start, item.key * kGroup + local);
  to.decay[local] = __expf(gates.log_decay), to.beta[local] = gates.beta;
}

// Where others compute a sequence's tokens in chunks: the convolution's state behind them.
__device__ __forceinline__ void pass(const Params& p, const Item& item, int thread) {
  if (p.has_draft(item.seq, item.end - item.start)) return;
  for (int i = thread; i < kLocal; i += kInputThreads) {
    Window window;
    window.fill(p, channel_of(item.key, i), item.end, item.start, item.slot);
    window.save(p, channel_of(item.key, i), item.slot);
  }
}

// kInputThreads threads: what the rule needs of each key's head, and the convolution's state.
__device__ __forceinline__ void prepare(const Params& p, Stream& s, int thread) {
  constexpr int kPieces = (kLocal + kGroup * kDimV) / kVec + kGroup;
  pdl_wait();
  int n = 0;
  for (Item item(p, blockIdx.x);; item.next(p)) {
    bool exists = item.exists(p);
    if (exists && !item.is_single(p)) {
      pass(p, item, thread);
      continue;
    }
    Inputs& to = s.inputs[n % kAhead];
    barrier_wait(shared_address(s.taken + n % kAhead), (n / kAhead & 1) ^ 1);
    for (int i = thread; i < kPieces && exists; i += kInputThreads) fill(p, item, to, i);
    sync_some(kInputBarrier, kInputThreads);
    if (thread < 32 && exists) {
      const Lengths lengths(to);
      if (thread == 0) to.lengths = lengths;
    }
    if (thread == 0) to.token = exists ? item.start : -1, to.key = item.key;
    barrier_arrive(shared_address(s.ready + n % kAhead));
    n++;
    if (!exists) return;
  }
}

// A warp of kRuleWarps: 32 columns, and a part of the rows, of which a lane has four columns of every fourth.
struct Rule {
  static constexpr int kPart = kDimK / kHalves, kRows = kPart / 4;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int half = warp / kAcross, across = warp % kAcross, column = across * 32 + lane % 8 * 4, first = half * kPart + lane / 8;

  __device__ __forceinline__ void sum_parts(Stream& s, float4& told, float4& out) const {
    if (lane < 8) {
      *reinterpret_cast<float4*>(s.partial[half][0] + column) = told;
      *reinterpret_cast<float4*>(s.partial[half][1] + column) = out;
    }
    sync_some(kRuleBarrier, kRuleThreads);
    told = out = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kHalves; i++) {
      add_scaled(told, 1.f, *reinterpret_cast<const float4*>(s.partial[i][0] + column));
      add_scaled(out, 1.f, *reinterpret_cast<const float4*>(s.partial[i][1] + column));
    }
  }

  // The rule, as in `advance`, for value `local` of the inputs. → outputs of the lane's columns before the norm
  __device__ __forceinline__ float4 apply(Stream& s, const Inputs& in, int local, int stage) const {
    float4* state = reinterpret_cast<float4*>(s.states[stage] + first * kDimV + column);
    float4 rows[kRows], told{0, 0, 0, 0}, out{0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      rows[i] = state[i * kDimV];
      add_scaled(told, in.k[first + i * 4], rows[i]);
      add_scaled(out, in.q[first + i * 4], rows[i]);
    }
    sum_rows(told);
    sum_rows(out);
    sum_parts(s, told, out);
    const float4 v = *reinterpret_cast<const float4*>(in.v + local * kDimV + column);
    float decay = in.decay[local], beta = in.beta[local];
    float k_decay = in.lengths.k * decay, q_decay = in.lengths.q * decay, more = in.lengths.overlap;
    float4 added{beta * (v.x - k_decay * told.x), beta * (v.y - k_decay * told.y), beta * (v.z - k_decay * told.z),
                 beta * (v.w - k_decay * told.w)};
#pragma unroll
    for (int i = 0; i < kRows; i++) {
      float4 row = {rows[i].x * decay, rows[i].y * decay, rows[i].z * decay, rows[i].w * decay};
      add_scaled(row, in.k[first + i * 4] * in.lengths.k, added);
      state[i * kDimV] = row;
    }
    return {q_decay * out.x + more * added.x, q_decay * out.y + more * added.y, q_decay * out.z + more * added.z,
            q_decay * out.w + more * added.w};
  }

  __device__ __forceinline__ void finish(const Params& p, const Inputs& in, int local, float4 out, float squares) const {
    float scale = rsqrtf(squares / kDimV + p.eps);
    const float4 gains = *reinterpret_cast<const float4*>(in.gains + local * kDimV + column);
    Element* to = p.out + int64_t(in.token) * kValues + (in.key * kGroup + local) * kDimV + column;
    *reinterpret_cast<Vec<Element, 4>*>(to) = {from_float<Element>(out.x * scale * gains.x), from_float<Element>(out.y * scale * gains.y),
                                               from_float<Element>(out.z * scale * gains.z), from_float<Element>(out.w * scale * gains.w)};
  }

  __device__ __forceinline__ void run(const Params& p, Stream& s) const {
    pdl_wait();
    int stage = 0, unit = 0;
    uint32_t parity = 0;
    for (int n = 0;; n++) {
      const Inputs& in = s.inputs[n % kAhead];
      barrier_wait(shared_address(s.ready + n % kAhead), n / kAhead & 1);
      if (in.token < 0) return;
      for (int local = 0; local < kGroup; local++, unit++) {
        barrier_wait(shared_address(s.arrived + stage), parity);
        float4 out = apply(s, in, local, stage);
        copy_fence();
        barrier_arrive(shared_address(s.updated + stage));
        float squares = warp_sum<8>(out.x * out.x + out.y * out.y + out.z * out.z + out.w * out.w), sum = 0;
        if (lane == 0 && half == 0) s.squares[unit % 2][across] = squares;
        sync_some(kRuleBarrier, kRuleThreads);
#pragma unroll
        for (int i = 0; i < kAcross; i++) sum += s.squares[unit % 2][i];
        if (half == 0 && lane < 8) finish(p, in, local, out, sum);
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(shared_address(s.taken + n % kAhead));
    }
  }
};

// policy: of the L2 cache, for states that are read.
__global__ void __launch_bounds__(kStreamThreads, 1) stream_kernel(const Params p, uint64_t policy) {
  extern __shared__ __align__(128) char shared[];
  Stream& s = *reinterpret_cast<Stream*>(shared);
  int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; i++) {
      barrier_init(shared_address(s.arrived + i), 1);
      barrier_init(shared_address(s.updated + i), kRuleThreads);
    }
    for (int i = 0; i < kAhead; i++) {
      barrier_init(shared_address(s.ready + i), kInputThreads);
      barrier_init(shared_address(s.taken + i), kRuleWarps);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (!p.early) pdl_wait();
  if (warp < kRuleWarps) {
    Rule().run(p, s);
  } else if (warp < kRuleWarps + kInputWarps) {
    prepare(p, s, threadIdx.x - kRuleThreads);
  } else if (threadIdx.x % 32 == 0) {
    copy_states(p, s, warp - kRuleWarps - kInputWarps, policy);
  }
}

}  // namespace
}  // namespace minisgl
