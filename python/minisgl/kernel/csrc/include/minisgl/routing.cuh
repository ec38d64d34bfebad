// How a router's logits choose a token's experts, by the lanes of a warp.
#pragma once

#include "minisgl/common.cuh"

namespace minisgl {
namespace {

// What lane i < top_k holds of a token: its i-th most probable expert, and the weight of that. Of equal ones the lower first.
struct Choice {
  int expert;
  float weight;
};

// A float as an integer of the same order, larger than 0. NaN comes last: who chooses it gives NaN.
__device__ __forceinline__ uint32_t key_of(float x) {
  uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0xffffffffu;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float number_of(uint32_t key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The choice of a token whose logits a warp has: lane i those of experts i, i + 32 and so on, as keys, 0 where there is none.
// top_k: 32 at most. The weights are probabilities, which `renormalize` makes sum to 1.
template <int kMost>
__device__ __forceinline__ Choice choose_by_keys(uint32_t (&keys)[kMost / 32], int experts, int top_k, bool renormalize) {
  constexpr unsigned kAll = 0xffffffffu;
  int lane = threadIdx.x % 32;
  uint32_t largest = 0;
#pragma unroll
  for (int i = 0; i < kMost / 32; ++i) {
    if (i * 32 >= experts) break;
    largest = max(largest, keys[i]);
  }
  float top = number_of(__reduce_max_sync(kAll, largest)), total = 0.f, mine = 0.f;
#pragma unroll
  for (int i = 0; i < kMost / 32; ++i) {
    if (i * 32 >= experts) break;
    total += keys[i] ? __expf(number_of(keys[i]) - top) : 0.f;
  }
  Choice choice{0, 0.f};
  for (int c = 0; c < top_k; ++c) {
    uint32_t best = __reduce_max_sync(kAll, largest);
    int found = kMost;
#pragma unroll
    for (int i = 0; i < kMost / 32; ++i) {
      if (i * 32 >= experts) break;
      if (keys[i] == best) found = min(found, i * 32 + lane);
    }
    int expert = __reduce_min_sync(kAll, found);
    if (lane == c) choice.expert = expert, mine = __expf(number_of(best) - top);
    largest = 0;
#pragma unroll
    for (int i = 0; i < kMost / 32; ++i) {
      if (i * 32 >= experts) break;
      if (i * 32 + lane == expert) keys[i] = 0;
      largest = max(largest, keys[i]);
    }
  }
  choice.weight = mine / warp_sum(renormalize ? mine : total);
  return choice;
}

// They are read past L1: a kernel may do it before it waits for the one ahead, where that has waited for who wrote them.
// logits: [experts], of kMost at most.
template <int kMost, typename L>
__device__ __forceinline__ Choice choose_experts(const L* logits, int experts, int top_k, bool renormalize) {
  int lane = threadIdx.x % 32;
  uint32_t keys[kMost / 32];
#pragma unroll
  for (int i = 0; i < kMost / 32; ++i) {
    if (i * 32 >= experts) break;
    keys[i] = i * 32 + lane < experts ? key_of(to_float(__ldcg(logits + i * 32 + lane))) : 0;
  }
  return choose_by_keys<kMost>(keys, experts, top_k, renormalize);
}

}  // namespace
}  // namespace minisgl
