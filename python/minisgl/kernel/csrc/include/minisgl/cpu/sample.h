// Logits to token ids, with the semantics of `kernel/sampling.py`: temperature, top-k, top-p, min-p, then one uniform
// number, a function of seed and position, inverts the cumulative distribution.
#pragma once

#include <array>
#include <bit>
#include <numeric>

#include "ops.h"

namespace minisgl::cpu {

constexpr int kShift = 18;  // what is left of a float's bits are its sign, its exponent and 5 bits of mantissa
constexpr int64_t kBuckets = (0x3f800000 >> kShift) + 1;  // of numbers from 0 to 1
constexpr int64_t kSumBlock = 1024;

inline uint64_t splitmix(uint64_t x) {  // Steele et al., OOPSLA 2014
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

inline double uniform(uint64_t seed, int64_t position) {
  return double(splitmix(splitmix(seed) ^ uint64_t(position)) >> 12) * 0x1p-52;
}

// The index of the largest value, the first of equal ones; -1 where that is not finite or there is a NaN.
inline int64_t arg_max(const float* x, int64_t count) {
  Floats high = broadcast(kNone);
  Ints nan{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    Floats v = load(x + i);
    nan |= v != v;
    high = maximum(v, high);
  }
  float most = largest(high);
  bool bad = false;
  for (int j = 0; j < kLanes; ++j) bad |= nan[j] != 0;
  for (; i < count; ++i) bad |= x[i] != x[i], most = std::max(most, x[i]);
  if (bad || !std::isfinite(most)) return -1;
  return std::find(x, x + count, most) - x;
}

// The first index whose cumulative weight is above `number` times the total. sums: of blocks of the weights.
inline int64_t invert_blocks(const float* weights, int64_t count, const double* sums, double number) {
  int64_t blocks = (count + kSumBlock - 1) / kSumBlock, block = 0;
  double target = number * std::accumulate(sums, sums + blocks, 0.0), mass = 0;
  while (block + 1 < blocks && mass + sums[block] <= target) mass += sums[block++];
  for (int64_t i = block * kSumBlock; i < count; ++i)
    if ((mass += weights[i]) > target) return i;
  return count - 1;
}

class Sampler {
 public:
  // One row. Called by one thread, with room of its own.
  int64_t operator()(const float* logits, int64_t count, const SamplingParams& params) {
    int64_t best = arg_max(logits, count);
    float temperature = params.temperature;
    if (best < 0 || temperature == 0) return best;
    double number = uniform(params.seed, params.position);
    double total = weigh(logits, count, logits[best], temperature);
    int64_t top_k = params.top_k > 0 ? std::min<int64_t>(params.top_k, count) : count;
    float top_p = params.top_p, min_p = params.min_p;
    bool is_filtered = params.top_k > 0 || top_p < 1 || min_p > 0;
    if (!is_filtered) return invert_blocks(weights_.get(), count, sums_.get(), number);
    sort_into_buckets(count);
    double of_top_k = top_k < count ? largest_weights(count, top_k, kAll, 0).mass : total;
    Largest kept = largest_weights(count, top_k, top_p < 1 ? top_p * of_top_k : kAll, min_p * weights_.get()[best]);
    return largest_weights(count, kept.count, std::nextafter(number * kept.mass, kAll), 0).last;
  }

 private:
  // weights_ = exp((logits - best) / temperature), at most 1; → their sum.
  double weigh(const float* logits, int64_t count, float best, float temperature) {
    float* weights = weights_.reserve(count + kLanes);
    int64_t blocks = (count + kSumBlock - 1) / kSumBlock;
    double* sums = sums_.reserve(blocks);
    double total = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      int64_t begin = b * kSumBlock, end = std::min(count, begin + kSumBlock), i = begin;
      for (; i + kLanes <= end; i += kLanes) store(weights + i, exponential((load(logits + i) - best) / temperature));
      for (; i < end; ++i) weights[i] = exponential(broadcast((logits[i] - best) / temperature))[0];
      double parts[kLanes] = {}, part = 0;  // one addition after the other takes longer than all the rest
      for (i = begin; i + kLanes <= end; i += kLanes)
        for (int j = 0; j < kLanes; ++j) parts[j] += weights[i + j];
      for (; i < end; ++i) part += weights[i];
      for (int j = 0; j < kLanes; ++j) part += parts[j];
      total += sums[b] = part;
    }
    return total;
  }

  // A bucket has the weights whose upper bits are its number. Nearly all that is asked of sorted weights is in the numbers of
  // weights in the buckets and their sums, so that no more than one bucket at a time has to be sorted.
  void sort_into_buckets(int64_t count) {
    const float* weights = weights_.get();
    counts_.fill(0);
    masses_.fill(0);
    for (int64_t i = 0; i < count; ++i) {
      uint32_t bucket = bucket_of(weights[i]);
      ++counts_[bucket];
      masses_[bucket] += weights[i];
    }
  }

  static uint32_t bucket_of(float weight) { return std::bit_cast<uint32_t>(weight) >> kShift; }

  // The first of the weights, largest first and of equal ones the first: how many, their sum, and the index of the last.
  struct Largest {
    int64_t count;
    double mass;
    int32_t last;
  };

  // At least one, `most` of them, or fewer whose sum is `enough`, or that are no less than `least`.
  Largest largest_weights(int64_t count, int64_t most, double enough, float least) {
    const float* weights = weights_.get();
    Largest all{0, 0, -1};
    auto is_all = [&] { return all.count >= most || (all.count > 0 && all.mass >= enough); };
    for (int64_t b = kBuckets - 1; b >= 0 && !is_all(); --b) {
      if (counts_[b] == 0) continue;
      bool is_beyond = all.count + counts_[b] >= most || all.mass + masses_[b] >= enough;
      if (!is_beyond && std::bit_cast<float>(uint32_t(b) << kShift) >= least) {
        all.count += counts_[b];
        all.mass += masses_[b];
        continue;
      }
      bucket_.clear();
      for (int64_t i = 0; i < count; ++i)
        if (bucket_of(weights[i]) == b) bucket_.push_back(int32_t(i));
      std::sort(bucket_.begin(), bucket_.end(),
                [&](int32_t a, int32_t c) { return weights[a] != weights[c] ? weights[a] > weights[c] : a < c; });
      for (int32_t i : bucket_) {
        if (is_all() || weights[i] < least) return all;
        all = {all.count + 1, all.mass + weights[i], i};
      }
    }
    return all;
  }

  static constexpr double kAll = std::numeric_limits<double>::infinity();

  Buffer<float> weights_;
  Buffer<double> sums_;
  std::array<int32_t, kBuckets> counts_;
  std::array<double, kBuckets> masses_;
  std::vector<int32_t> bucket_;
};

}  // namespace minisgl::cpu
