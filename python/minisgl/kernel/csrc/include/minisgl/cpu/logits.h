// What becomes of a row's logits beside sampling: the rules that change them first, and the log-probabilities that they tell.
#pragma once

#include <bit>
#include <numeric>

#include "ops.h"

namespace minisgl::cpu {

constexpr int64_t kSumBlock = 512;  // numbers that are summed up together
constexpr int64_t kTopBlock = 64;   // … and of which the largest is known

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// A row of logits as it is, or without the tokens that a bitmask does not allow.
struct AllTokens {
  const float* logits;

  Floats vector(int64_t i) const { return load(logits + i); }
  float operator[](int64_t i) const { return logits[i]; }
  static constexpr bool is_empty(int64_t, int64_t) { return false; }
};

struct AllowedTokens {
  const float* logits;
  const uint32_t* words;

  Floats vector(int64_t i) const {  // i: a multiple of the lanes
    Words lane;
    for (int j = 0; j < kLanes; ++j) lane[j] = 1u << j;
    Words bits = Words{} + (words[i / 32] >> (i % 32));
    return (bits & lane) != 0u ? load(logits + i) : broadcast(kNone);
  }
  float operator[](int64_t i) const { return words[i / 32] >> (i % 32) & 1 ? logits[i] : kNone; }

  // Whether none of begin … end - 1 is allowed; begin: a multiple of 32.
  bool is_empty(int64_t begin, int64_t end) const {
    uint32_t any = 0;
    for (int64_t w = begin / 32; w < blocks_of(end, 32); ++w) any |= words[w];
    return any == 0;
  }

  // The token that alone is allowed; -1: there are others, or none.
  int64_t only(int64_t count) const {
    int64_t found = -1;
    for (int64_t w = 0; w < blocks_of(count, 32); ++w) {
      if (words[w] == 0) continue;
      if (found >= 0 || !std::has_single_bit(words[w])) return -1;
      found = w * 32 + std::countr_zero(words[w]);
    }
    return found < count ? found : -1;
  }
};

// The index of the largest value, the first of equal ones; -1 where that is not finite or there is a NaN.
template <class Row>
int64_t arg_max(const Row& row, int64_t count) {
  Ints nan{};
  bool bad = false;
  float most = kNone;
  int64_t at = 0;
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    int64_t end = std::min(count, begin + kSumBlock), i = begin;
    if (row.is_empty(begin, end)) continue;
    Floats high = broadcast(kNone);
    for (; i + kLanes <= end; i += kLanes) {
      Floats v = row.vector(i);
      nan |= v != v;
      high = maximum(v, high);
    }
    float top = largest(high);
    for (; i < end; ++i) {
      float v = row[i];
      bad |= v != v;
      top = std::max(top, v);
    }
    if (top > most) most = top, at = begin;
  }
  for (int j = 0; j < kLanes; ++j) bad |= nan[j] != 0;
  if (bad || !std::isfinite(most)) return -1;
  while (row[at] != most) ++at;
  return at;
}

// One addition after the other would take longer than all the rest.
inline double sum_of(const float* x, int64_t count) {
  double parts[kLanes] = {}, total = 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) parts[j] += x[i + j];
  for (; i < count; ++i) total += x[i];
  for (int j = 0; j < kLanes; ++j) total += parts[j];
  return total;
}

// Which of the numbers are no less than `least`, and below `high`. tops: the largest ones of their blocks.
inline void find_between(const float* x, int64_t count, const float* tops, float least, float high, std::vector<int32_t>& found) {
  found.clear();
  for (int64_t begin = 0; begin < count; begin += kTopBlock) {
    if (tops[begin / kTopBlock] < least) continue;
    int64_t end = std::min(count, begin + kTopBlock), i = begin;
    for (; i + kLanes <= end; i += kLanes)
      for (uint32_t bits = sign_bits((load(x + i) >= least) & (load(x + i) < high)); bits != 0; bits &= bits - 1)
        found.push_back(int32_t(i + std::countr_zero(bits)));
    for (; i < end; ++i)
      if (x[i] >= least && x[i] < high) found.push_back(int32_t(i));
  }
}

// A number that at least `rank` of `count` are no less than; -inf where there are fewer blocks. sorted: room.
inline float bound_of(int64_t rank, const float* tops, int64_t count, std::vector<float>& sorted) {
  int64_t blocks = blocks_of(count, kTopBlock);
  if (rank > blocks) return kNone;
  sorted.assign(tops, tops + blocks);
  std::nth_element(sorted.begin(), sorted.begin() + rank - 1, sorted.end(), std::greater<float>());
  return sorted[rank - 1];
}

// Changes some logits in place, and puts them back. A thread has one, with room of its own.
class LogitChanges {
 public:
  // Repetition, presence and frequency penalties of the tokens in a history: [params.position] ids.
  void penalize(float* logits, int64_t count, const SamplingParams& params, const int32_t* history) {
    if (params.repetition_penalty == 1 && params.presence_penalty == 0 && params.frequency_penalty == 0) return;
    seen_.resize(std::max<size_t>(seen_.size(), count));
    tokens_.clear();
    for (int64_t i = 0; i < params.position; ++i) {
      uint32_t token = history[i];
      if (token >= count) continue;
      uint32_t& seen = seen_[token];
      if (seen == 0) tokens_.push_back(token);
      seen = (seen | 1) + (i < params.prompt_len ? 0 : 2);  // twice as often as in the output, and one
    }
    for (uint32_t token : tokens_) {
      float logit = logits[token], times = float(seen_[token] >> 1), penalty = params.repetition_penalty;
      seen_[token] = 0;
      if (penalty != 1) logit = logit > 0 ? logit / penalty : logit * penalty;
      if (times > 0) logit = logit - params.frequency_penalty * times - params.presence_penalty;
      change(logits, token, logit);
    }
  }

  // values: are added to the logits of tokens. What is -inf counts only where the output must not end yet.
  void add(float* logits, int64_t count, const SamplingParams& params, const int32_t* ids, const float* values, int64_t size) {
    for (int64_t i = 0; i < size; ++i)
      if (uint32_t(ids[i]) < count && (values[i] != kNone || params.position < params.min_len))
        change(logits, ids[i], logits[ids[i]] + values[i]);
  }

  void undo(float* logits) {
    for (; !before_.empty(); before_.pop_back()) logits[before_.back().token] = before_.back().logit;
  }

 private:
  struct Before {
    int32_t token;
    float logit;
  };

  void change(float* logits, int32_t token, float logit) {
    before_.push_back({token, logits[token]});
    logits[token] = logit;
  }

  std::vector<uint32_t> seen_, tokens_;
  std::vector<Before> before_;
};

// The log-probability of a token, and those of the `top_k` largest, of equal ones the first. All are NaN where the largest
// logit is not finite or there is a NaN. A thread has one, with room of its own.
class LogProbabilities {
 public:
  // words: 1 + 2 * top_k.
  void operator()(const float* logits, int64_t count, int64_t token, int64_t top_k, int32_t* words) {
    auto put = [&](int64_t at, float value) { words[at] = std::bit_cast<int32_t>(value); };
    float most = find_tops(logits, count);
    if (!std::isfinite(most)) {
      std::fill(words, words + 1 + 2 * top_k, 0);
      for (int64_t i = 0; i <= top_k; ++i) put(2 * i, NAN);
      return;
    }
    float total = float(std::log(sum_of_exponentials(logits, count, most)));
    if (top_k > 0) find_between(logits, count, tops_.get(), bound_of(top_k, tops_.get(), count, sorted_), INFINITY, largest_);
    auto is_before = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    if (top_k > 0) std::partial_sort(largest_.begin(), largest_.begin() + top_k, largest_.end(), is_before);
    for (int64_t i = 0; i < top_k; ++i) {
      words[2 * i + 1] = largest_[i];
      put(2 * i + 2, logits[largest_[i]] - most - total);
    }
    put(0, logits[token] - most - total);
  }

 private:
  // The largest logit of each block → of all; NaN where there is one.
  float find_tops(const float* logits, int64_t count) {
    float* tops = tops_.reserve(blocks_of(count, kTopBlock));
    Floats high = broadcast(kNone);
    Ints nan{};
    float most = kNone;
    for (int64_t begin = 0; begin < count; begin += kTopBlock, high = broadcast(kNone)) {
      int64_t end = std::min(count, begin + kTopBlock), i = begin;
      for (; i + kLanes <= end; i += kLanes) {
        Floats v = load(logits + i);
        nan |= v != v;
        high = maximum(v, high);
      }
      float block = largest(high);
      for (; i < end; ++i) {
        nan[0] |= logits[i] != logits[i];
        block = std::max(block, logits[i]);
      }
      tops[begin / kTopBlock] = block;
      most = std::max(most, block);
    }
    for (int j = 0; j < kLanes; ++j)
      if (nan[j] != 0) return NAN;
    return most;
  }

  static double sum_of_exponentials(const float* logits, int64_t count, float most) {
    double total = 0;
    int64_t i = 0;
    while (i + kLanes <= count) {
      Floats part{};
      for (int64_t end = std::min(count, i + kSumBlock); i + kLanes <= end; i += kLanes) part += exponential(load(logits + i) - most);
      total += sum(part);
    }
    for (; i < count; ++i) total += exponential(broadcast(logits[i] - most))[0];
    return total;
  }

  Buffer<float> tops_;
  std::vector<float> sorted_;
  std::vector<int32_t> largest_;
};

}  // namespace minisgl::cpu
