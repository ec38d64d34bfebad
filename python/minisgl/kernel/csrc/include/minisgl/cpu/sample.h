// Logits to token ids, with the semantics of `kernel/sampling.py`: temperature, top-k, top-p, min-p, then one uniform
// number, a function of seed and position, inverts the cumulative distribution.
#pragma once

#include "logits.h"

namespace minisgl::cpu {

inline uint64_t splitmix(uint64_t x) {  // Steele et al., OOPSLA 2014
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

inline double uniform(uint64_t seed, int64_t position) {
  return double(splitmix(splitmix(seed) ^ uint64_t(position)) >> 12) * 0x1p-52;
}

// The first index whose cumulative weight is above `number` times the total. sums: of blocks of the weights.
inline int64_t invert_blocks(const float* weights, int64_t count, const double* sums, double number) {
  int64_t blocks = blocks_of(count, kSumBlock), block = 0;
  double target = number * std::accumulate(sums, sums + blocks, 0.0), mass = 0;
  while (block + 1 < blocks && mass + sums[block] <= target) mass += sums[block++];
  for (int64_t i = block * kSumBlock; i < count; ++i)
    if ((mass += weights[i]) > target) return i;
  while (count > 1 && weights[count - 1] == 0) --count;  // sums are rounded: it is the last one that may be sampled
  return count - 1;
}

class Sampler {
 public:
  // One row. Called by one thread, with room of its own. Rows: `AllTokens` or `AllowedTokens`.
  template <class Row>
  int64_t operator()(const Row& row, int64_t count, const SamplingParams& params) {
    int64_t best = arg_max(row, count);
    if (best < 0 || params.temperature == 0) return best;
    double number = uniform(params.seed, params.position);
    double total = weigh(row, count, row[best], params.temperature);
    bool is_filtered = params.top_k > 0 || params.top_p < 1 || params.min_p > 0;
    return is_filtered ? pick_filtered(count, params, total, number) : invert_blocks(weights_.get(), count, sums_.get(), number);
  }

 private:
  // weights_ = exp((logits - best) / temperature), at most 1; → their sum.
  template <class Row>
  double weigh(const Row& row, int64_t count, float best, float temperature) {
    float* weights = weights_.reserve(count + kLanes);
    double* sums = sums_.reserve(blocks_of(count, kSumBlock));
    float* tops = tops_.reserve(blocks_of(count, kTopBlock));
    for (int64_t begin = 0; begin < count; begin += kTopBlock) {
      int64_t end = std::min(count, begin + kTopBlock), i = begin;
      if (row.is_empty(begin, end)) {
        std::fill(weights + begin, weights + end, 0.0f);
        tops[begin / kTopBlock] = 0;
        continue;
      }
      Floats high{};
      for (; i + kLanes <= end; i += kLanes) {
        Floats weight = exponential((row.vector(i) - best) / temperature);
        high = maximum(weight, high);
        store(weights + i, weight);
      }
      float top = largest(high);
      for (; i < end; ++i) {
        weights[i] = exponential(broadcast((row[i] - best) / temperature))[0];
        top = std::max(top, weights[i]);
      }
      tops[begin / kTopBlock] = top;
    }
    double total = 0;
    for (int64_t begin = 0; begin < count; begin += kSumBlock) {
      int64_t size = std::min(kSumBlock, count - begin);
      total += sums[begin / kSumBlock] = row.is_empty(begin, begin + size) ? 0 : sum_of(weights + begin, size);
    }
    return total;
  }

  // Weights that are kept: those above `lowest`, and of those that equal it the ones up to `last`. mass: their sum.
  struct Kept {
    float lowest;
    int64_t last;
    double mass;
  };

  struct Sum {
    int64_t count;
    double mass;
  };

  int64_t pick_filtered(int64_t count, const SamplingParams& params, double total, double number) {
    int64_t top_k = params.top_k > 0 ? std::min<int64_t>(params.top_k, count) : count;
    float least = std::numeric_limits<float>::denorm_min();  // what weighs nothing is not kept
    if (top_k < count) least = std::max(least, bound_of(top_k, tops_.get(), count, sorted_));
    double of_top_k = top_k < count && params.top_p < 1 ? largest_weights(count, top_k, kAll, least).mass : total;
    double enough = params.top_p < 1 ? params.top_p * of_top_k : kAll;
    if (top_k == count && params.top_p < 1)  // smaller ones, all together, are less than what top-p leaves out
      least = std::max(least, float((1 - double(params.top_p)) * total / double(count) * 0.999));
    return pick(count, largest_weights(count, top_k, enough, std::max(least, params.min_p)), number);
  }

  // The largest weights, of equal ones the first: at least one, `most` of them, fewer whose sum is `enough`, or all that are no
  // less than `least`. Bounds come ever closer together until few weights lie between them, which are sorted.
  Kept largest_weights(int64_t count, int64_t most, double enough, float least) {
    const float* weights = weights_.get();
    float high = 2;
    Sum kept = sum_above(0, count, least), sure{0, 0};  // of weights that are no less than the bounds
    auto is_all = [&](const Sum& sum) { return sum.count > 0 && (sum.count >= most || sum.mass >= enough); };
    if (!is_all(kept)) return {least, count, kept.mass};
    while (kept.count - sure.count > kFew) {
      float middle = std::bit_cast<float>((std::bit_cast<uint32_t>(least) + std::bit_cast<uint32_t>(high)) / 2);
      if (middle == least) break;
      Sum found = sum_above(0, count, middle);
      (is_all(found) ? least : high) = middle;
      (is_all(found) ? kept : sure) = found;
    }
    find_between(weights, count, tops_.get(), least, high, between_);
    std::sort(between_.begin(), between_.end(),
              [&](int32_t a, int32_t c) { return weights[a] != weights[c] ? weights[a] > weights[c] : a < c; });
    int32_t last = -1;
    for (auto i = between_.begin(); i != between_.end() && !is_all(sure); ++i) sure = {sure.count + 1, sure.mass + weights[last = *i]};
    return {weights[last], last, sure.mass};
  }

  // Of the weights begin … end - 1 that are no less than `least`. begin: a multiple of blocks.
  Sum sum_above(int64_t begin, int64_t end, float least) const {
    const float* weights = weights_.get();
    double parts[kLanes] = {};
    Ints number{};
    Sum sum{0, 0};
    for (int64_t i = begin; i < end; i = std::min(end, (i / kTopBlock + 1) * kTopBlock)) {
      if (tops_.get()[i / kTopBlock] < least) continue;
      int64_t k = i, block_end = std::min(end, i + kTopBlock);
      for (; k + kLanes <= block_end; k += kLanes) {
        Floats weight = load(weights + k);
        number -= weight >= least;
        float kept[kLanes];
        store(kept, weight >= least ? weight : Floats{});
        for (int j = 0; j < kLanes; ++j) parts[j] += kept[j];
      }
      for (; k < block_end; ++k)
        if (weights[k] >= least) sum = {sum.count + 1, sum.mass + weights[k]};
    }
    for (int j = 0; j < kLanes; ++j) sum = {sum.count + number[j], sum.mass + parts[j]};
    return sum;
  }

  // The first token with which the sum of the weights that are kept goes beyond `number` times all of them.
  int64_t pick(int64_t count, const Kept& kept, double number) const {
    const float* weights = weights_.get();
    auto is_kept = [&](int64_t i) { return weights[i] > kept.lowest || (weights[i] == kept.lowest && i <= kept.last); };
    double target = number * kept.mass, mass = 0;
    for (int64_t begin = 0; begin < count; begin += kSumBlock) {
      int64_t end = std::min(count, begin + kSumBlock);
      bool has_last = begin <= kept.last && kept.last < end;
      float least = kept.last >= end ? kept.lowest : std::nextafter(kept.lowest, 2.0f);
      double sum = has_last ? kAll : sum_above(begin, end, least).mass;
      if (mass + sum <= target) {
        mass += sum;
        continue;
      }
      for (int64_t i = begin; i < end; ++i)
        if (is_kept(i) && (mass += weights[i]) > target) return i;
    }
    while (count > 1 && !is_kept(count - 1)) --count;  // sums are rounded: it is the last one that may be sampled
    return count - 1;
  }

  static constexpr double kAll = std::numeric_limits<double>::infinity();
  static constexpr int64_t kFew = 1024;

  Buffer<float> weights_;
  Buffer<double> sums_;  // of blocks
  Buffer<float> tops_;   // the largest weights of blocks
  std::vector<float> sorted_;
  std::vector<int32_t> between_;
};

}  // namespace minisgl::cpu
