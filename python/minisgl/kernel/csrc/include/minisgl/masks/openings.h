// Matchers that have computed the masks of a place which many outputs of a grammar pass, such as the first key of a schema.
#pragma once

#include <minisgl/llguidance.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace minisgl {

inline Library library;

constexpr size_t kMostPlaces = 4096;      // of a grammar that are told apart
constexpr int kLongestOpening = 64;       // tokens: what a matcher takes up, and a copy of it, grows with them
constexpr int64_t kMostKept = 1024;       // matchers, of all grammars; large ones weigh more than 1
constexpr int64_t kMostKeptOfOne = 128;   // of a grammar
constexpr double kWorthKeeping = 60e-6;   // seconds of a core, for a mask
constexpr double kShortCopy = 50e-6;      // seconds of a core, for a copy of a matcher that weighs 1: some 250 KiB at most

inline double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

// The tokens with which outputs of a grammar begin, as a tree. All threads use it. A place is numbered when a second output
// has passed the one before it; so what only one output says takes up a single place.
//
// A copy of a matcher has what that has found out: the first mask of a text within quotes takes a matcher 300 microseconds,
// the others 10. So who comes to such a place gets a copy of one that was there. Of a large grammar a copy may take longer than
// a mask, and a megabyte: then none is kept. How long one takes says how large it is.
class Openings {
 public:
  static constexpr int32_t kNowhere = -1, kStart = 0;

  ~Openings() {
    for (const Place& place : places) release(place);
  }

  // Where a token leads, or kNowhere.
  int32_t follow(int32_t place, uint32_t token) {
    std::lock_guard guard(lock);
    if (place == kNowhere || places[place].num_passed < 2 || places[place].depth >= kLongestOpening) return kNowhere;
    const auto [found, is_new] = nexts.try_emplace(uint64_t(place) << 32 | token, int32_t(places.size()));
    if (!is_new) return found->second;
    if (places.size() < kMostPlaces) {
      places.push_back({places[place].depth + 1, places[place].matcher != nullptr});
      return found->second;
    }
    nexts.erase(found);
    return kNowhere;
  }

  // A matcher at this place, which is the caller's, and its mask; or null.
  void* copy(int32_t place, uint32_t* words, size_t num_bytes) {
    std::lock_guard guard(lock);
    if (place == kNowhere || places[place].matcher == nullptr) return nullptr;
    Place& found = places[place];
    if (found.words.size() * sizeof(uint32_t) != num_bytes) return nullptr;
    void* matcher = library.clone(found.matcher);
    if (library.is_error(matcher)) {
      library.free(matcher);
      return nullptr;
    }
    std::memcpy(words, found.words.data(), num_bytes);
    found.num_passed++;
    num_copied++;
    return matcher;
  }

  // A matcher that is there has computed its mask in so many seconds of a core.
  void pass(int32_t place, void* matcher, const uint32_t* words, size_t num_bytes, double taken) {
    std::lock_guard guard(lock);
    if (place == kNowhere) return;
    Place& found = places[place];
    found.num_passed++;
    found.num_dear += taken >= worth;
    found.least = found.num_passed == 1 ? taken : std::min(found.least, taken);
    // A cheap one takes long now and then, such as the first of a step, whose code and data are not in the caches.
    const bool is_dear = found.num_dear >= (found.is_behind ? 1 : 3) && 2 * found.num_dear > found.num_passed;
    if (!is_dear || found.matcher != nullptr || !has_room(1)) return;
    const double longest = std::max(found.least / 2, double(short_copy));
    if ((copying *= 0.99) > longest) return;  // by and by it is tried again, as it may have taken long by chance
    const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
    found.matcher = library.clone(matcher);
    copying = seconds(CLOCK_THREAD_CPUTIME_ID) - start;
    found.weight = 1 + int64_t(copying / short_copy);
    if (copying > longest || !has_room(found.weight)) {
      library.free(found.matcher);
      found.matcher = nullptr;
      return;
    }
    num_kept += found.weight;
    total += found.weight;
    found.words.assign(words, words + num_bytes / sizeof(uint32_t));
  }

  static inline std::atomic<double> worth = kWorthKeeping, short_copy = kShortCopy;
  static inline std::atomic<int64_t> num_copied = 0;  // of all grammars

 private:
  struct Place {
    int depth = 0;           // tokens before it
    bool is_behind = false;  // a place whose masks are dear
    int64_t num_passed = 0, num_dear = 0, weight = 0;
    double least = 0;  // seconds of a core that a mask took
    void* matcher = nullptr;
    std::vector<uint32_t> words;
  };

  static void release(const Place& place) {
    if (place.matcher == nullptr) return;
    library.free(place.matcher);
    total -= place.weight;
  }

  bool has_room(int64_t weight) const { return num_kept + weight <= kMostKeptOfOne && total + weight <= kMostKept; }

  static inline std::atomic<int64_t> total = 0;

  std::mutex lock;
  std::vector<Place> places{1};
  std::unordered_map<uint64_t, int32_t> nexts;  // by place and token
  int64_t num_kept = 0;  // by weight
  double copying = 0;    // seconds of a core that the last copy took which was to be kept
};

}  // namespace minisgl
