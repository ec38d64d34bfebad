// Which logits of a step are wanted: of a row with a mask those of tokens that may be sampled.
#pragma once

#include <numeric>

#include "ops.h"

namespace minisgl::cpu {

// Rows that want most of the head's panels come first: each panel is then multiplied with rows from the first one on, never with
// more than all of them, and no row's numbers come out otherwise than they would.
class WantedLogits {
 public:
  // `rows` stays what it is until the next call: threads that come late may ask.
  void reserve(const LogitMasks& masks, int64_t rows, const Linear& head) {
    of_.resize(rows), sizes_.resize(rows), places_.resize(rows);
    last_.resize(masks.num_words), counts_.resize(num_panels(head));
  }

  // By one thread. Masks that are not there yet leave their rows whole.
  void choose(const LogitMasks& masks, int64_t rows, const Linear& head) {
    std::fill(of_.begin(), of_.end(), nullptr);
    for (int64_t i = 0; i < masks.count; ++i)
      if (masks.samples[i] >= 0 && __atomic_load_n(masks.states + i, __ATOMIC_ACQUIRE) == kMaskReady)
        of_[masks.samples[i]] = masks.words + i * masks.num_words;
    for (int64_t r = 0; r < rows; ++r) sizes_[r] = of_[r] == nullptr ? masks.num_words + 1 : size_of(of_[r], masks.num_words);
    std::iota(places_.begin(), places_.end(), 0);
    std::sort(places_.begin(), places_.end(), [&](int32_t a, int32_t b) { return std::pair(-sizes_[a], a) < std::pair(-sizes_[b], b); });
    std::fill(last_.begin(), last_.end(), 0);
    for (int32_t i = 0; i < rows; ++i) want(of_[places_[i]], i + 1);
    for (int64_t p = 0; p < int64_t(counts_.size()); ++p) {
      PanelRange range(head, p);
      int64_t begin = range.first / 32, end = std::min<int64_t>((range.first + range.width + 31) / 32, last_.size());
      counts_[p] = begin < end ? *std::max_element(last_.begin() + begin, last_.begin() + end) : int32_t(rows);
    }
  }

  PanelRows rows() const { return {counts_.data(), places_.data()}; }

 private:
  static int64_t size_of(const uint32_t* words, int64_t count) {
    int32_t size = 0;
    for (int64_t w = 0; w < count; ++w) size += words[w] != 0;
    return size;
  }

  void want(const uint32_t* words, int32_t count) {
    for (size_t w = 0; w < last_.size(); ++w) last_[w] = words == nullptr || words[w] != 0 ? count : last_[w];
  }

  std::vector<const uint32_t*> of_;  // of each row its mask, or null
  std::vector<int64_t> sizes_;
  std::vector<int32_t> places_, counts_, last_;  // last: of 32 tokens, how many rows from the first one on want some
};

}  // namespace minisgl::cpu
