// How a token is found in a row that is held as `Slice` holds it: what the filters keep, and where the number falls.
#pragma once

#include <minisgl/sampling_row.cuh>

namespace minisgl {

namespace {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMassScale = 17592186044416.0f;  // 2^44; the sum over 2^19 tokens fits into 64 bits
constexpr int64_t kMaxVocab = int64_t(1) << 19;
constexpr float kNegligible = 32.0f;  // nats below the largest: beyond the fixed point

// Tokens that the filters keep: keys above `key`, the first `ties` (in index order) of those that equal it; and of all
// these the ones that weigh at least `min_weight`.
struct Cut {
  uint32_t key = 0;  // below every key
  uint32_t ties = 0;
  float min_weight = 0.0f;
};

// The same for one warp, in terms of logits: those from `from` on, and those that equal `tied` up to an index.
struct WarpCut {
  float from, tied, min_weight;
  int last_tied;
};

template <typename T, int kRanks, int kThreads, bool kStaged>
struct Sampler {
  using L = Logit<T>;
  using Tokens = Slice<T, kThreads, kStaged>;
  using Words = typename Tokens::Words;
  using RowTeam = Team<kRanks, kThreads>;
  static constexpr int kLen = Tokens::kLen;
  static constexpr bool kCounted = sizeof(T) == 2;
  Tokens tokens;
  RowTeam team;
  uint32_t best;      // largest key of the row
  float best_logit, temperature;
  float rate;         // log2(weight) per unit of logit

  // Unnormalised: the largest weighs 1.
  __device__ __forceinline__ float weight(float logit) const { return exp2f((logit - best_logit) * rate); }

  static __device__ __forceinline__ uint64_t mass(float weight) { return __float2ull_rz(weight * kMassScale); }
  __device__ __forceinline__ uint64_t mass_of(uint32_t key) const { return mass(weight(decode<T>(key))); }

  static __device__ __forceinline__ uint32_t key(const Words& words, int j) {
    return L::to_keys(words.data[j / Tokens::kPerWord]) >> (j % Tokens::kPerWord * 16) & L::kMask;
  }

  // How far the smallest prefix reaches whose mass before its last token is below top_p of all: the first always.
  static __device__ __forceinline__ uint64_t needed(float top_p, uint64_t all) {
    const uint64_t need = __double2ull_ru(static_cast<double>(top_p) * static_cast<double>(all));
    return min(max(need, uint64_t(1)), all);
  }

  // Count this block's tokens by key. Returns the mass of this thread's tokens beyond the bins, where it is wanted.
  __device__ uint64_t count_keys(bool weigh_rest) {
    uint64_t rest = 0;
    tokens.visit([&](int, const Words& words) {
#pragma unroll
      for (int j = 0; j < kLen; ++j) {
        const uint32_t bin = best - key(words, j);
        if (bin < RowTeam::kBins) atomicAdd(&team.shared.bins[bin], 1u);
        else if (weigh_rest) rest += mass(weight(L::value(Tokens::raw(words, j))));
      }
    });
    return rest;
  }

  // Find the cut among the counted keys; false where it lies below them. Bins are zero before.
  __device__ bool find_counted(uint32_t top_k, float top_p, Cut& cut) {
    const uint64_t rest = count_keys(top_k == 0);
    team.sync(true);
    const uint32_t count = team.own_bin();
    const uint32_t own_key = best - (team.rank * (RowTeam::kBins / kRanks) + threadIdx.x);
    uint64_t total;
    uint32_t kept = count, ties = 0;  // ties: in the thread of the last token that is kept
    if (top_k > 0) {
      const uint64_t before = team.exclusive_sum(count, total);
      if (total < top_k) return false;
      kept = before < top_k ? min(count, static_cast<uint32_t>(top_k - before)) : 0;
      if (kept > 0 && before + kept == top_k) ties = kept;
    }
    if (top_p < 1.0f) {
      const uint64_t each = kept > 0 ? mass_of(own_key) : 0, own = kept * each;
      const uint64_t before = team.exclusive_sum(own, total);
      if (top_k == 0) total += team.template reduce<Sum>(rest);
      const uint64_t need = needed(top_p, total);
      ties = before < need && need <= before + own ? static_cast<uint32_t>((need - before + each - 1) / each) : 0;
    }
    // Where all of a key are kept they need not be told apart.
    uint64_t found = ties == 0 ? 0 : ties < count ? uint64_t(own_key) << 32 | ties : uint64_t(own_key - 1) << 32;
    found = team.template reduce<Max>(found);
    cut.key = static_cast<uint32_t>(found >> 32);
    cut.ties = static_cast<uint32_t>(found);
    return found != 0;
  }

  // Number (or mass) of the row's tokens with low <= key < high.
  template <bool kMass>
  __device__ uint64_t measure(uint32_t low, uint32_t high) {
    const uint32_t width = high - low;
    uint64_t total = 0;
    tokens.visit([&](int, const Words& words) {
#pragma unroll
      for (int j = 0; j < kLen; ++j) {
        if (key(words, j) - low >= width) continue;
        if constexpr (kMass) total += mass(weight(L::value(Tokens::raw(words, j))));
        else ++total;
      }
    });
    return team.template reduce<Sum>(total);
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

  __device__ void find_searched(uint32_t top_k, float top_p, Cut& cut) {
    uint64_t above;
    cut.key = cut.ties = 0;
    if (top_k > 0) {
      cut.key = search<false>(top_k, above);
      if (cut.key > 0) cut.ties = static_cast<uint32_t>(top_k - above);
    }
    if (top_p >= 1.0f) return;
    uint64_t left = measure<true>(cut.key + 1, best + 1);  // what top-k left
    if (cut.ties > 0) left += cut.ties * mass_of(cut.key);
    const uint64_t need = needed(top_p, left);
    cut.key = search<true>(need, above);
    const uint64_t each = mass_of(cut.key);
    cut.ties = static_cast<uint32_t>((need - above + each - 1) / max(each, uint64_t(1)));
  }

  __device__ Cut filter(uint32_t top_k, float top_p, float least) {
    Cut cut;
    cut.min_weight = fminf(least, 1.0f);
    if (top_k == 0 && top_p >= 1.0f) return cut;
    if constexpr (kCounted) {
      if (find_counted(top_k, top_p, cut)) return cut;
    }
    find_searched(top_k, top_p, cut);
    return cut;
  }

  // A sum over the threads of this warp and of those before it.
  __device__ __forceinline__ uint64_t warp_sums(uint64_t own, uint64_t& before, uint64_t& total) {
    const uint64_t mine = team.exclusive_sum(own, total);
    before = __shfl_sync(0xffffffffu, mine, 0);
    return __shfl_sync(0xffffffffu, mine + own, 31) - before;
  }

  // Which of the tokens with the threshold's key this warp keeps: those up to an index.
  __device__ WarpCut for_warp(const Cut& cut) {
    constexpr int kAll = 0x7fffffff;
    const float infinity = __uint_as_float(0x7f800000u);
    WarpCut result{-infinity, -infinity, cut.min_weight, -1};
    if (cut.key > kNegInf<T>) result.from = decode<T>(cut.key + 1), result.tied = decode<T>(cut.key);
    if (cut.ties == 0) return result;
    const uint32_t tied = to_raw<T>(cut.key);
    const auto count = [&](const Words& words) {
      uint32_t own = 0;
#pragma unroll
      for (int j = 0; j < kLen; ++j) own += Tokens::raw(words, j) == tied;
      return own;
    };
    uint64_t own = 0, before, total;
    tokens.visit([&](int, const Words& words) { own += count(words); });
    const uint64_t in_warp = warp_sums(own, before, total);
    if (before >= cut.ties) return result;
    uint64_t left = cut.ties - before;
    result.last_tied = kAll;
    if (left >= in_warp) return result;
    tokens.visit([&](int position, const Words& words) {  // this warp holds the border
      const uint64_t here = count(words), up_to = RowTeam::inclusive_warp_sum(here, threadIdx.x % 32);
      int last = kAll;
      if (up_to - here < left && left <= up_to) {
        uint64_t number = up_to - here;
#pragma unroll
        for (int j = 0; j < kLen; ++j) {
          if (Tokens::raw(words, j) == tied && ++number == left) last = tokens.index(position + j);
        }
      }
      const uint64_t in_row = __shfl_sync(0xffffffffu, up_to, 31);
      if (left > 0) result.last_tied = __reduce_min_sync(0xffffffffu, last);
      left = in_row < left ? left - in_row : 0;
    });
    return result;
  }

  // Running sums of the kept weights of one vector.
  template <bool kFiltered>
  __device__ __forceinline__ void running_sums(const Words& words, const WarpCut& cut, int position,
                                               float (&sums)[kLen]) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kLen; ++j) {
      const float logit = L::value(Tokens::raw(words, j));
      const float w = weight(logit);
      if constexpr (kFiltered) {
        const bool is_tied = __float_as_uint(logit) == __float_as_uint(cut.tied);  // there is no -0
        const bool keep = at_least(logit, cut.from) || (is_tied && tokens.index(position + j) <= cut.last_tied);
        if (keep && w >= cut.min_weight) sum += w;
      } else {
        sum += w;
      }
      sums[j] = sum;
    }
  }

  template <bool kFiltered>
  __device__ __forceinline__ uint64_t own_mass(const WarpCut& cut) const {
    uint64_t own = 0;
    tokens.visit([&](int position, const Words& words) {
      if constexpr (kFiltered) {
        uint32_t largest = words.data[0];
        Tokens::take(words, largest);
        float top = L::value(largest & L::kMask);
        if constexpr (kCounted) top = fmaxf(top, L::value(largest >> 16));
        if (top < cut.tied) return;  // subnormal numbers count as zero here, and then stay
      }
      float sums[kLen];
      running_sums<kFiltered>(words, cut, position, sums);
      own += mass(sums[kLen - 1]);
    });
    return own;
  }

  // Invert the CDF over the kept tokens in index order. Returns the token in the one thread that holds it, else -1.
  template <bool kFiltered>
  __device__ int pick(const WarpCut& cut, uint64_t number) {
    uint64_t before, total;
    const uint64_t in_warp = warp_sums(own_mass<kFiltered>(cut), before, total);
    const uint64_t target = __umul64hi(number, total);  // floor(uniform * total)
    if (target < before || target >= before + in_warp) return -1;
    int found = -1;
    tokens.visit([&](int position, const Words& words) {
      float sums[kLen];
      running_sums<kFiltered>(words, cut, position, sums);
      const uint64_t own = mass(sums[kLen - 1]);
      const uint64_t up_to = before + RowTeam::inclusive_warp_sum(own, threadIdx.x % 32);
      if (up_to - own <= target && target < up_to) {
#pragma unroll
        for (int j = kLen - 1; j >= 0; --j) {
          if (up_to - own + mass(sums[j]) > target) found = tokens.index(position + j);
        }
      }
      before = __shfl_sync(0xffffffffu, up_to, 31);
    });
    return found;
  }

  // The lowest index with the largest key among this warp's tokens.
  __device__ int arg_max() const {
    const uint32_t wanted = to_raw<T>(best);
    int own = 0x7fffffff;
    tokens.visit([&](int position, const Words& words) {
#pragma unroll
      for (int j = 0; j < kLen; ++j) {
        if (Tokens::raw(words, j) == wanted) own = min(own, tokens.index(position + j));
      }
    });
    return __reduce_min_sync(0xffffffffu, own);
  }
};

// splitmix64 (Steele et al., OOPSLA 2014), as in kernel/sampling.py.
__device__ __forceinline__ uint64_t splitmix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

}  // namespace

}  // namespace minisgl
