// Matchers of llguidance, and what is known of the places where outputs have got.
#pragma once

#include <minisgl/masks/known_masks.h>
#include <minisgl/masks/openings.h>
#include <minisgl/masks/pattern.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace minisgl {

constexpr size_t kMostKnown = 64 << 20;  // bytes of masks that are known
constexpr double kWorth = 30e-6;         // seconds of a core: to copy a mask takes a few

inline KnownMasks known_masks(kMostKnown, kWorth);

// Of a model. It stays for ever.
struct Vocabulary {
  ConstraintInit init{};
  std::string bytes;  // of all tokens
  std::vector<size_t> begins;
  size_t longest = 0;

  std::string_view text(uint32_t token) const {
    if (token + 1 >= begins.size()) return "\xff";
    return std::string_view(bytes).substr(begins[token], begins[token + 1] - begins[token]);
  }
};

// Where an output has got in a regular expression that is the whole grammar.
struct Course {
  const Vocabulary* vocabulary = nullptr;
  std::shared_ptr<Pattern> pattern;  // null: there is none
  int64_t number = 0;                // of the pattern
  std::vector<int32_t> places;       // before and behind each token

  Course() = default;
  Course(const Vocabulary* vocabulary, std::shared_ptr<Pattern> made) : vocabulary(vocabulary), pattern(std::move(made)) {
    static std::atomic<int64_t> num_patterns = 0;
    number = num_patterns++;
    if (pattern) places = {pattern->start()};
  }

  void follow(const uint32_t* ids, size_t num) {
    for (size_t i = 0; pattern && i < num; i++) {
      places.push_back(pattern->follow(places.back(), vocabulary->text(ids[i])));
    }
  }

  // At its beginning it gets an empty pattern for a full one.
  void renew() {
    if (pattern && places.size() == 1 && pattern->is_full()) *this = Course(vocabulary, pattern->again());
  }

  void go_back(size_t num) {
    if (pattern) places.resize(std::max<size_t>(1, places.size() - std::min(num, places.size())));
  }

  std::optional<KnownMasks::Key> key() const {
    if (const auto found = pattern ? pattern->key(places.back()) : std::nullopt) return KnownMasks::Key{number, *found};
    return {};
  }
};

struct Matcher {
  std::atomic<int64_t> num_tokens = 0;  // of the output, that it has taken; -1: it is broken
  std::atomic<double> cost = 0;         // seconds of a core that the last mask took, or a quarter of what was known before
  void* own;
  Course course;
  std::shared_ptr<Openings> openings;  // null: there are none
  int32_t place = Openings::kNowhere;  // in them
  std::mutex lock;

  Matcher(void* own, Course course, std::shared_ptr<Openings> openings, int32_t place)
      : own(own), course(std::move(course)), openings(std::move(openings)), place(place) {
    if (library.is_error(own)) num_tokens = -1;
  }
  ~Matcher() { library.free(own); }

  // Write the mask behind `length` tokens of the output, of which these are the last. Those that it has are not taken again.
  // false: it is broken, or there are not enough of them.
  bool advance(int64_t length, const uint32_t* ids, int64_t num, uint32_t* words, size_t num_bytes) {
    const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
    const int64_t missing = length - num_tokens;
    bool holds = num_tokens >= 0 && missing >= 0 && missing <= num;
    const bool goes_on = holds && !library.is_stopped(own);
    const uint32_t* last = ids + num - (goes_on ? missing : 0);
    if (goes_on && follow(last, size_t(missing), words, num_bytes)) {
      num_tokens = length;
      cost = std::max(seconds(CLOCK_THREAD_CPUTIME_ID) - start, cost / 4);
      return true;
    }
    if (goes_on && missing > 0) {
      holds = library.consume_tokens(own, last, size_t(missing)) == 0;
      if (holds) course.follow(last, size_t(missing));
    }
    if (holds && num_bytes > 0) holds = mask(words, num_bytes);
    num_tokens = holds ? length : -1;
    cost = std::max(seconds(CLOCK_THREAD_CPUTIME_ID) - start, cost / 4);
    return holds;
  }

  // It gets other tokens than those of outputs that go on.
  void leave() { place = Openings::kNowhere; }

 private:
  // Whether another matcher has taken these tokens before and computed the mask, if one is asked for. If so it is written, and
  // this one goes on as a copy of that.
  bool follow(const uint32_t* ids, size_t num, uint32_t* words, size_t num_bytes) {
    for (size_t i = 0; i < num && place != Openings::kNowhere; i++) place = openings->follow(place, ids[i]);
    void* other = num_bytes > 0 && place != Openings::kNowhere ? openings->copy(place, words, num_bytes) : nullptr;
    if (other == nullptr) return false;
    library.free(own);
    own = other;
    return true;
  }

  bool mask(uint32_t* words, size_t num_bytes) {
    if (place == Openings::kNowhere) return compute(words, num_bytes);
    const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
    if (!compute(words, num_bytes)) return false;
    openings->pass(place, own, words, num_bytes, seconds(CLOCK_THREAD_CPUTIME_ID) - start);
    return true;
  }

  bool compute(uint32_t* words, size_t num_bytes) {
    const auto key = library.is_stopped(own) ? std::nullopt : course.key();
    if (key && known_masks.find(*key, words, num_bytes)) return true;
    const double start = key ? seconds(CLOCK_THREAD_CPUTIME_ID) : 0;
    if (library.compute_mask_into(own, words, num_bytes) != 0) return false;
    if (key) known_masks.add(*key, words, num_bytes, seconds(CLOCK_THREAD_CPUTIME_ID) - start);
    return true;
  }
};

}  // namespace minisgl
