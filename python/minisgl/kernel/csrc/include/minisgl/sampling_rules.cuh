// What changes a row's logits before its token is found: penalties, entries of the row's own, and a bitmask. Their
// reference is `LogitRules.changed` in engine/rules.py.
//
// A cluster holds such a row in shared memory in float32, whatever type the logits have, and changes it there: the
// logits stay as they are for others, and no copy of them is made. Rows without rules are not looked at.
#pragma once

#include <minisgl/sampler.cuh>

namespace minisgl {

namespace {

constexpr int kNotReady = -2;
constexpr int32_t kMaskPending = 0, kMaskReady = 1;  // `Board::states`
constexpr uint32_t kNoneBits = 0xff800000u;  // -inf
constexpr int kNumCounts = 4096;  // tokens of the vocabulary whose occurrences are counted at a time

// What a step finds in the device's memory: `TokenStore.places`.
struct Places {
  const int32_t* entries;  // bounds [num_rows + 1], then all ids, then all values
  Board board;
};

struct RuleArgs {
  const int32_t* token_ids;  // [num_rows, max_len]: the rows' histories
  int64_t num_rows;
  Places* places;
};

// What is added to the logits of a row; -inf only before `min_len`.
struct Entries {
  const int32_t* ids;
  const float* values;
  int count;

  __device__ Entries(const SampleArgs& args, const RuleArgs& rules, int row) {
    const int32_t* bounds = rules.places->entries;
    const int begin = bounds[args.rows[row]];
    count = bounds[args.rows[row] + 1] - begin;
    ids = bounds + rules.num_rows + 1 + begin;
    values = reinterpret_cast<const float*>(ids + bounds[rules.num_rows]);
  }

  static __device__ __forceinline__ bool is_ban(float value) { return __float_as_uint(value) == kNoneBits; }
};

__device__ __forceinline__ bool has_penalties(const SamplingParams& params) {
  return params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f || params.frequency_penalty != 0.0f;
}

// Whether a row's logits are changed now. Bans are a row's first entries.
__device__ __forceinline__ bool is_ruled(const SampleArgs& args, const RuleArgs& rules, int row) {
  const SamplingParams& params = args.params[row];
  if (params.mask >= 0 || has_penalties(params)) return true;
  const Entries entries(args, rules, row);
  return entries.count > 0 &&
         (params.position < params.min_len || !Entries::is_ban(entries.values[entries.count - 1]));
}

constexpr uint64_t kLongestWait = 1'000'000'000;  // ns

__device__ __forceinline__ uint64_t nanoseconds() {
  uint64_t time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  return time;
}

// By one thread, for all of its row. Whether its mask is ready: the words are read after that. Only the host ends the
// wait, and no other block does, so rows may wait that keep others from running; a second for all rows of a step.
__device__ bool wait_for_mask(Board& board, int mask) {
  uint64_t began = 0;
  while (true) {
    int32_t state;
    asm volatile("ld.acquire.sys.global.b32 %0, [%1];" : "=r"(state) : "l"(board.states + mask) : "memory");
    if (state != kMaskPending) return state == kMaskReady;
    const uint64_t now = nanoseconds();
    if (began == 0) {
      began = atomicCAS(&board.began, 0ull, static_cast<unsigned long long>(now));
      if (began == 0) began = now;
    }
    if (now > began + kLongestWait) return false;
    __nanosleep(500);
  }
}

// One block's slice of a row, in its shared memory.
template <typename S, int kThreads>
struct ChangedSlice {
  using Tokens = Slice<float, kThreads, true>;
  using Few = Vec<S, Tokens::kLen>;
  const Tokens& tokens;
  float* logits;     // `tokens.staged`
  uint32_t* counts;  // [kNumCounts]; in the end, words of a mask
  int size;          // tokens

  __device__ void load(const S* row) const {
    constexpr int kBatch = 4;  // loads in flight
    const bool is_aligned = reinterpret_cast<uintptr_t>(row + tokens.first) % sizeof(Few) == 0;
    for (int i = 0; i < tokens.vecs; i += kBatch) {
      Few few[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int begin = tokens.vector(i + b) * Tokens::kLen, index = tokens.first + begin;
        if (i + b >= tokens.vecs || begin >= size) continue;
        few[b] = is_aligned && begin + Tokens::kLen <= size ? *reinterpret_cast<const Few*>(row + index)
                                                             : read(row + index, size - begin);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (i + b < tokens.vecs) store(tokens.vector(i + b) * Tokens::kLen, few[b]);
      }
    }
  }

  // The first `count` of a vector.
  static __device__ Few read(const S* at, int count) {
    Few few;
#pragma unroll
    for (int j = 0; j < Tokens::kLen; ++j) few.data[j] = j < count ? at[j] : from_float<S>(0.0f);
    return few;
  }

  __device__ __forceinline__ void store(int begin, const Few& few) const {
    Vec<float, Tokens::kLen> values;
#pragma unroll
    for (int j = 0; j < Tokens::kLen; ++j) {
      values.data[j] = begin + j < size ? to_float(few.data[j]) : __uint_as_float(kNoneBits);
    }
    *reinterpret_cast<Vec<float, Tokens::kLen>*>(logits + begin) = values;
  }

  // Repetition, frequency and presence penalties. history: [params.position] ids.
  __device__ void penalize(const SamplingParams& params, const int32_t* history, int64_t max_len) const {
    const int length = static_cast<int>(min(params.position, max_len));
    for (int begin = 0; begin < size; begin += kNumCounts) {
      for (int i = threadIdx.x; i < kNumCounts; i += kThreads) counts[i] = 0;
      __syncthreads();
      const uint32_t first = tokens.first + begin;
      const int num = min(kNumCounts, size - begin);
      for (int i = threadIdx.x; i < length; i += kThreads) {
        const uint32_t at = static_cast<uint32_t>(history[i]) - first;
        if (at >= static_cast<uint32_t>(num)) continue;
        if (i < params.prompt_len) atomicOr(&counts[at], 1u);
        else atomicAdd(&counts[at], 2u);  // twice as often as in the output
      }
      __syncthreads();
      for (int i = threadIdx.x; i < num; i += kThreads) {
        if (counts[i] != 0) logits[begin + i] = penalized(logits[begin + i], params, counts[i] / 2);
      }
      __syncthreads();
    }
  }

  // A token that is in the history, so many times in the output. Rounded as torch does it.
  static __device__ float penalized(float logit, const SamplingParams& params, uint32_t times) {
    const float penalty = params.repetition_penalty;
    if (penalty != 1.0f) logit = logit > 0.0f ? __fdiv_rn(logit, penalty) : __fmul_rn(logit, penalty);
    if (times == 0) return logit;
    const float by_frequency = __fmul_rn(params.frequency_penalty, static_cast<float>(times));
    return __fsub_rn(__fsub_rn(logit, by_frequency), params.presence_penalty);
  }

  __device__ void add(const SamplingParams& params, const Entries& entries) const {
    const bool is_early = params.position < params.min_len;
    for (int i = threadIdx.x; i < entries.count; i += kThreads) {
      const uint32_t at = static_cast<uint32_t>(entries.ids[i] - tokens.first);
      const float value = entries.values[i];
      if (at < static_cast<uint32_t>(size) && (is_early || !Entries::is_ban(value))) atomicAdd(&logits[at], value);
    }
  }

  // Put the words of a mask that belong to this slice in place of the counts, in whole vectors of 16 bytes, one load for
  // four words: the board has room behind its last one. → the bit there of the slice's first token.
  __device__ int load_mask(const uint32_t* words) const {
    const uint32_t* own = words + tokens.first / 32;
    const int before = static_cast<int>(reinterpret_cast<uintptr_t>(own) % 16 / sizeof(uint32_t));
    const int bit = before * 32 + tokens.first % 32, num = size > 0 ? (bit + size + 127) / 128 : 0;
    for (int i = threadIdx.x; i < num; i += kThreads) {
      reinterpret_cast<uint4*>(counts)[i] = reinterpret_cast<const uint4*>(own - before)[i];
    }
    __syncthreads();
    return bit;
  }

  // Make them words as `Slice` has them, with -inf in place of those that the mask forbids, whose bits begin there; -1:
  // there is none. → this thread's largest key.
  __device__ uint32_t finish(int first_bit) const {
    using L = Logit<float>;
    uint32_t best = Tokens::padding().data[0];
    for (int i = 0; i < tokens.vecs; ++i) {
      const int vector = tokens.vector(i), begin = vector * Tokens::kLen, bit = first_bit + begin;
      typename Tokens::Words words = Tokens::normal(tokens.staged[vector]);
      if (first_bit >= 0 && begin < size) {  // a slice begins at a whole vector, which lies within a word of the mask
        const uint32_t bits = counts[bit / 32] >> (bit % 32);
#pragma unroll
        for (int j = 0; j < Tokens::kLen; ++j) words.data[j] = bits >> j & 1 ? words.data[j] : kNoneBits;
      }
      tokens.staged[vector] = words;
      Tokens::take(words, best);
    }
    return L::to_keys(best);
  }
};

}  // namespace

}  // namespace minisgl
