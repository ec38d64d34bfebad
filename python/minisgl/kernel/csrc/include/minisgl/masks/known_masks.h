// Masks that were dear to compute, by what they follow from. The oldest are forgotten first.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <utility>
#include <vector>

namespace minisgl {

class KnownMasks {
 public:
  using Key = std::pair<int64_t, int32_t>;  // of a pattern, and of its places

  // most_bytes: of masks that are kept; dear: seconds of a core from which on one is.
  KnownMasks(size_t most_bytes, double dear) : most_bytes(most_bytes), dear(dear) {}

  void limit(size_t bytes, double seconds) {
    std::lock_guard guard(lock);
    most_bytes = bytes;
    dear = seconds;
    forget();
  }

  // Whether it is known; if so, it is written.
  bool find(const Key& key, uint32_t* words, size_t num_bytes) {
    std::lock_guard guard(lock);
    const auto found = masks.find(key);
    if (found == masks.end() || found->second.size() * 4 != num_bytes) return false;
    std::memcpy(words, found->second.data(), num_bytes);
    num_found++;
    return true;
  }

  void add(const Key& key, const uint32_t* words, size_t num_bytes, double seconds) {
    std::lock_guard guard(lock);
    if (seconds < dear || !masks.try_emplace(key, words, words + num_bytes / 4).second) return;
    ages.push_back(key);
    total += num_bytes;
    forget();
  }

  int64_t count() {
    std::lock_guard guard(lock);
    return num_found;
  }

 private:
  void forget() {
    for (; total > most_bytes; ages.pop_front()) {
      const auto oldest = masks.find(ages.front());
      total -= oldest->second.size() * 4;
      masks.erase(oldest);
    }
  }

  size_t most_bytes;
  double dear;
  std::mutex lock;
  std::map<Key, std::vector<uint32_t>> masks;
  std::deque<Key> ages;
  size_t total = 0;
  int64_t num_found = 0;
};

}  // namespace minisgl
