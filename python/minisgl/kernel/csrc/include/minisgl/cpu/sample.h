// Logits to token ids, with the semantics of `engine/sample.py`: temperature, top-k, top-p, min-p, then one uniform
// number, a function of seed and position, inverts the cumulative distribution.
#pragma once

#include <numeric>

#include "ops.h"

namespace minisgl::cpu {

constexpr int64_t kCandidates = 128;  // filtered rows look at so many first
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

// The first index whose cumulative weight is above `number` times the total.
inline int64_t invert(const float* weights, int64_t count, double number) {
  double total = 0;
  for (int64_t i = 0; i < count; ++i) total += weights[i];
  double target = number * total, mass = 0;
  for (int64_t i = 0; i < count; ++i)
    if ((mass += weights[i]) > target) return i;
  return count - 1;
}

// The same for a whole vocabulary, with the sums of blocks, which were taken on the way.
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
  int64_t operator()(const float* logits, int64_t count, const Sampling& params, int64_t row) {
    int64_t best = arg_max(logits, count);
    float temperature = params.temperature[row];
    if (best < 0 || temperature == 0) return best;
    double number = uniform(params.seed[row], params.position[row]);
    double total = weigh(logits, count, logits[best], temperature);
    int64_t top_k = params.top_k[row] > 0 ? std::min(params.top_k[row], count) : count;
    if (params.top_k[row] <= 0 && params.top_p[row] >= 1 && params.min_p[row] <= 0)
      return invert_blocks(weights_.get(), count, sums_.get(), number);
    find_candidates(count, std::min(kCandidates, count));
    int64_t kept = 0;
    if (!filter(count, total, top_k, params.top_p[row], params.min_p[row], kept)) {
      find_candidates(count, count);
      filter(count, total, top_k, params.top_p[row], params.min_p[row], kept);
    }
    return order_[invert(top_.data(), kept, number)];
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
      double part = 0;
      for (i = begin; i < end; ++i) part += weights[i];
      total += sums[b] = part;
    }
    return total;
  }

  // The `num` largest weights, largest first, of equal ones the first: order_ and top_.
  void find_candidates(int64_t count, int64_t num) {
    const float* weights = weights_.get();
    auto larger = [&](int32_t a, int32_t b) { return weights[a] != weights[b] ? weights[a] > weights[b] : a < b; };
    order_.clear();
    if (num == count) {
      order_.resize(count);
      std::iota(order_.begin(), order_.end(), 0);
      std::sort(order_.begin(), order_.end(), larger);
    } else {
      float least = 0;  // of the heap, whose smallest is in front
      for (int64_t i = 0; i < count; ++i) {
        if (int64_t(order_.size()) == num && weights[i] <= least) continue;
        if (int64_t(order_.size()) == num) std::pop_heap(order_.begin(), order_.end(), larger), order_.pop_back();
        order_.push_back(int32_t(i));
        std::push_heap(order_.begin(), order_.end(), larger);
        least = weights[order_.front()];
      }
      std::sort(order_.begin(), order_.end(), larger);
    }
    top_.resize(num);
    for (int64_t i = 0; i < num; ++i) top_[i] = weights[order_[i]];
  }

  // Which of the candidates are left: the first `kept`. False: more candidates are needed to tell.
  bool filter(int64_t count, double total, int64_t top_k, float top_p, float min_p, int64_t& kept) {
    int64_t num = top_.size(), within = std::min(top_k, num);
    if (num < top_k && top_k < count && top_p < 1) return false;  // what top-p is a share of is not known
    double after_top_k = total;
    if (top_k <= num) after_top_k = std::accumulate(top_.begin(), top_.begin() + within, 0.0);
    double limit = double(top_p) * after_top_k, mass = 0;
    for (kept = 0; kept < within; ++kept) {
      if (kept > 0 && top_p < 1 && mass >= limit) break;
      if (top_[kept] < min_p * top_[0]) break;
      mass += top_[kept];
    }
    return kept < within || top_k <= num || num == count;
  }

  Buffer<float> weights_;
  Buffer<double> sums_;
  std::vector<int32_t> order_;
  std::vector<float> top_;
};

}  // namespace minisgl::cpu
