// Masks of grammars, computed by a thread that needs nothing of Python, beside a device that waits for them.
//
// Matchers are llguidance's. Jobs are done in order, one for each step; a job's rows wait for the tokens that the device
// samples in the step before. What a mask and its state are is said by `core.Masks`.
#include <minisgl/llguidance.h>
#include <minisgl/masks/known_masks.h>
#include <minisgl/masks/pattern.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <time.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <unordered_map>
#include <vector>

namespace minisgl {

namespace {

using tvm::ffi::Array;
using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::String;

enum State : int32_t { kPending = 0, kReady = 1, kNotReady = 2 };  // of a mask: `core.MASK_READY`, …
constexpr int32_t kIdPending = -3;                                 // a token that is not sampled yet
constexpr double kLongestWait = 30.0;                              // seconds, for the step before
constexpr size_t kMostRemembered = 16 << 20;                       // bytes of texts whose tokens are known
constexpr size_t kMostKnown = 64 << 20;                            // bytes of masks that are known
constexpr double kWorth = 30e-6;                                   // seconds of a core: to copy a mask takes a few

double seconds(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

Library library;

// Tokens that workers wait for. A device says nothing when it has written some, a host does.
struct Tokens {
  std::mutex lock;
  std::condition_variable told;
  std::atomic<bool> are_told = false;

  void tell() {
    std::lock_guard guard(lock);
    are_told = true;
    told.notify_all();
  }

  int32_t at(const int32_t* ref) { return __atomic_load_n(ref, __ATOMIC_ACQUIRE); }

  // Until the token may be there.
  void wait(const int32_t* ref) {
    if (!are_told) {
      const timespec pause{0, 10'000};
      nanosleep(&pause, nullptr);
      return;
    }
    std::unique_lock guard(lock);
    if (at(ref) == kIdPending) told.wait_for(guard, std::chrono::milliseconds(1));
  }
};

Tokens tokens;

// Of a text the tokens. The first call for it is Python's, which takes that lock; llguidance asks again and again for
// what is left of the same strings.
struct Texts {
  explicit Texts(Function ask) : ask(std::move(ask)) {}

  // A `LlgTokenizeFn`.
  static size_t of(const void* texts, const uint8_t* text, size_t num_bytes, uint32_t* tokens, size_t room) {
    return static_cast<Texts*>(const_cast<void*>(texts))->tokenize(text, num_bytes, tokens, room);
  }

 private:
  size_t tokenize(const uint8_t* text, size_t num_bytes, uint32_t* tokens, size_t room) {
    const std::string key(reinterpret_cast<const char*>(text), num_bytes);
    {
      std::lock_guard guard(lock);
      if (const auto found = known.find(key); found != known.end()) return copy(found->second, tokens, room);
    }
    std::vector<uint32_t> made;
    try {
      for (const int64_t token : ask(Bytes(key)).cast<Array<int64_t>>()) made.push_back(uint32_t(token));
    } catch (const std::exception&) {  // it must not go on through llguidance, which takes it for no tokens
      return 0;
    }
    std::lock_guard guard(lock);
    if ((num_remembered += num_bytes * 5) > kMostRemembered) {
      known.clear();
      num_remembered = 0;
    }
    return copy(known[key] = std::move(made), tokens, room);
  }

  static size_t copy(const std::vector<uint32_t>& from, uint32_t* tokens, size_t room) {
    if (const size_t num = std::min(from.size(), room)) std::memcpy(tokens, from.data(), num * sizeof(uint32_t));
    return from.size();
  }

  Function ask;
  std::mutex lock;
  std::unordered_map<std::string, std::vector<uint32_t>> known;
  size_t num_remembered = 0;
};

KnownMasks known_masks(kMostKnown, kWorth);

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
  std::mutex lock;

  Matcher(void* own, Course course) : own(own), course(std::move(course)) {
    if (library.is_error(own)) num_tokens = -1;
  }
  ~Matcher() { library.free(own); }

  // Write the mask behind `length` tokens of the output, of which these are the last. Those that it has are not taken again.
  // false: it is broken, or there are not enough of them.
  bool advance(int64_t length, const uint32_t* ids, int64_t num, uint32_t* words, size_t num_bytes) {
    const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
    const int64_t missing = length - num_tokens;
    bool holds = num_tokens >= 0 && missing >= 0 && missing <= num;
    if (holds && missing > 0 && !library.is_stopped(own)) {
      holds = library.consume_tokens(own, ids + num - missing, size_t(missing)) == 0;
      if (holds) course.follow(ids + num - missing, size_t(missing));
    }
    if (holds && num_bytes > 0) holds = mask(words, num_bytes);
    num_tokens = holds ? length : -1;
    cost = std::max(seconds(CLOCK_THREAD_CPUTIME_ID) - start, cost / 4);
    return holds;
  }

 private:
  bool mask(uint32_t* words, size_t num_bytes) {
    const auto key = library.is_stopped(own) ? std::nullopt : course.key();
    if (key && known_masks.find(*key, words, num_bytes)) return true;
    const double start = seconds(CLOCK_THREAD_CPUTIME_ID);
    if (library.compute_mask_into(own, words, num_bytes) != 0) return false;
    if (key) known_masks.add(*key, words, num_bytes, seconds(CLOCK_THREAD_CPUTIME_ID) - start);
    return true;
  }
};

using Handle = std::shared_ptr<Matcher>;  // a job holds its matchers

// A record of `kernel/masks.py`.
struct Row {
  const Handle* matcher;
  const int32_t* ref;  // where the device writes the last token, or null: the host knows it
  int64_t length;      // tokens of the output before the one that is to be sampled
  int64_t known;       // the last of them that the host knows
  int64_t place;       // of the mask
};

struct Job {
  std::vector<Row> rows;
  std::vector<Handle> matchers;
  uint32_t* words;
  int32_t* states;
  size_t num_words;
};

class Worker {
 public:
  std::atomic<int64_t> num_dear = 0;  // masks that took more than `dear` seconds of a core
  std::atomic<double> cost = 0;       // seconds of a core that the last job took

  explicit Worker(double dear) : dear(dear), thread([this] { run(); }) {}

  ~Worker() {
    {
      std::lock_guard guard(lock);
      is_closing = true;
    }
    told.notify_all();
    thread.join();
  }

  void submit(Job job) {
    {
      std::lock_guard guard(lock);
      jobs.push_back(std::move(job));
    }
    told.notify_one();
  }

 private:
  void run() {
    pthread_setname_np(pthread_self(), "minisgl-masks");
    prctl(PR_SET_TIMERSLACK, 1000UL);  // ns: else a short sleep takes much longer
    std::unique_lock guard(lock);
    while (true) {
      told.wait(guard, [this] { return is_closing || !jobs.empty(); });
      if (jobs.empty()) return;
      const Job job = std::move(jobs.front());
      jobs.pop_front();
      guard.unlock();
      std::vector<int64_t> last;  // of all rows first: they come together, and their place will be used again
      for (const Row& row : job.rows) last.push_back(row.ref == nullptr ? row.known : token_at(row.ref));
      double spent = 0;
      for (size_t i = 0; i < job.rows.size(); i++) {
        const int64_t place = job.rows[i].place;
        uint32_t* words = job.words + place * job.num_words;
        const bool is_there = serve(job.rows[i], last[i], *job.matchers[i], words, job.num_words * 4);
        __atomic_store_n(job.states + place, is_there ? kReady : kNotReady, __ATOMIC_RELEASE);
        const double taken = job.matchers[i]->cost;
        num_dear += taken > dear;
        spent += taken;
      }
      cost = spent;
      guard.lock();
    }
  }

  bool serve(const Row& row, int64_t last, Matcher& matcher, uint32_t* words, size_t num_bytes) {
    if (row.ref != nullptr && last < 0) return false;  // it was not sampled
    const int64_t before = row.ref == nullptr ? -1 : row.known;
    std::lock_guard guard(matcher.lock);
    const uint32_t ids[2] = {uint32_t(before), uint32_t(last)};
    const int64_t num = row.length - matcher.num_tokens;
    if (matcher.num_tokens < 0 || num < 0 || num > 2 || (num > 0 && last < 0) || (num > 1 && before < 0)) return false;
    return matcher.advance(row.length, ids, 2, words, num_bytes);
  }

  int64_t token_at(const int32_t* ref) {
    const double start = seconds(CLOCK_MONOTONIC);
    while (true) {
      const int32_t token = tokens.at(ref);
      if (token != kIdPending) return token;
      {
        std::lock_guard guard(lock);
        if (is_closing) return kIdPending;
      }
      if (seconds(CLOCK_MONOTONIC) - start > kLongestWait) return kIdPending;
      tokens.wait(ref);
    }
  }

  const double dear;
  std::mutex lock;
  std::condition_variable told;
  std::deque<Job> jobs;
  bool is_closing = false;
  std::thread thread;  // last: it uses the others
};

template <class T>
T& at(int64_t handle) {
  return *reinterpret_cast<T*>(handle);
}

Matcher& matcher_at(int64_t handle) { return *at<Handle>(handle); }

int64_t handle_of(auto* object) { return reinterpret_cast<int64_t>(object); }

Limits limits_of(const Array<int64_t>& all) {
  const std::vector<uint64_t> n(all.begin(), all.end());
  return {n[0], n[1], n[2], n[3], n[4], n[5], n[6] != 0, n[7] != 0};
}

// path: of llguidance's library; defaults: its limits, as Python knows them. Throws where it does not export what is
// needed, or where its structures are others than those above.
void open(const String& path, const Array<int64_t>& defaults) {
  ConstraintInit init{}, none{};
  const Limits expected = limits_of(defaults);
  const bool is_there = library.open(path.c_str());
  if (is_there) library.constraint_init_set_defaults(&init, nullptr);
  const bool is_same = std::memcmp(&init.limits, &expected, offsetof(Limits, verbose_errors) + 1) == 0 &&
                       std::memcmp(init.spare, none.spare, sizeof(none.spare)) == 0;
  TVM_FFI_CHECK(is_there && is_same, RuntimeError) << "llguidance has other functions than those that are known here";
}

// What makes matchers. ask: the tokens of a text; texts: of the vocabulary; ends: of outputs.
int64_t make_vocabulary(const Function& ask, const Array<Bytes>& texts, const Array<int64_t>& ends,
                        const Array<String>& slices, const Array<int64_t>& limits) {
  std::vector<uint32_t> lens, all_ends(ends.begin(), ends.end());
  auto made = std::make_unique<Vocabulary>();
  for (const Bytes& text : texts) {
    lens.push_back(uint32_t(text.size()));
    made->begins.push_back(made->bytes.size());
    made->bytes.append(text.data(), text.size());
    made->longest = std::max(made->longest, text.size());
  }
  made->begins.push_back(made->bytes.size());
  std::vector<const char*> names;
  for (const String& slice : slices) names.push_back(slice.c_str());
  names.push_back(nullptr);
  TokenizerInit from{};
  from.struct_size = sizeof(from);
  from.vocab_size = uint32_t(lens.size());
  from.tok_eos = all_ends[0];
  from.token_lens = lens.data();
  from.token_bytes = reinterpret_cast<const uint8_t*>(made->bytes.data());
  from.tokenize_fn = Texts::of;
  from.tokenize_user_data = new Texts(ask);
  from.slices = names.data();
  from.tok_eos_extra = all_ends.data() + 1;
  from.tok_eos_extra_count = uint32_t(all_ends.size() - 1);
  char error[500];
  void* tokenizer = library.new_tokenizer_v2(&from, error, sizeof(error));
  TVM_FFI_CHECK(tokenizer != nullptr, RuntimeError) << error;
  library.constraint_init_set_defaults(&made->init, tokenizer);
  made->init.log_stderr_level = 0;
  made->init.limits = limits_of(limits);
  return handle_of(made.release());
}

// grammar: in llguidance's own form. pattern: the regular expression, if it is nothing else.
int64_t make_matcher(int64_t vocabulary, const String& grammar, const String& pattern) {
  const auto& from = at<const Vocabulary>(vocabulary);
  void* own = library.new_matcher(&from.init, "llguidance", grammar.c_str());
  Course course(&from, Pattern::make(std::string_view(pattern.data(), pattern.size()), int32_t(from.longest)));
  return handle_of(new Handle(std::make_shared<Matcher>(own, std::move(course))));
}

// At the same place.
int64_t copy_matcher(int64_t matcher) {
  Matcher& from = matcher_at(matcher);
  std::lock_guard guard(from.lock);
  from.course.renew();
  auto made = std::make_shared<Matcher>(library.clone(from.own), from.course);
  made->num_tokens = from.num_tokens.load();
  return handle_of(new Handle(std::move(made)));
}

void free_matcher(int64_t matcher) { delete &at<Handle>(matcher); }

int64_t num_tokens_of(int64_t matcher) { return matcher_at(matcher).num_tokens; }

double cost_of(int64_t matcher) { return matcher_at(matcher).cost; }

// What is wrong, if something is.
String error_of(int64_t matcher) {
  Matcher& own = matcher_at(matcher);
  std::lock_guard guard(own.lock);
  const char* error = library.get_error(own.own);
  return error == nullptr ? "" : error;
}

// words: the address, null for no mask.
bool advance(int64_t matcher, int64_t length, const Array<int64_t>& ids, int64_t words, int64_t num_bytes) {
  Matcher& own = matcher_at(matcher);
  const std::vector<uint32_t> tokens(ids.begin(), ids.end());
  std::lock_guard guard(own.lock);
  return own.advance(length, tokens.data(), int64_t(tokens.size()), &at<uint32_t>(words), num_bytes);
}

// For a moment: whether it takes one token more, and has so many fewer.
bool try_take(int64_t matcher, int64_t token) {
  Matcher& own = matcher_at(matcher);
  const auto id = uint32_t(token);
  std::lock_guard guard(own.lock);
  const bool takes = library.validate_tokens(own.own, &id, 1) == 1 && library.consume_tokens(own.own, &id, 1) == 0;
  if (takes) own.course.follow(&id, 1);
  if (library.is_error(own.own)) own.num_tokens = -1;  // by a limit
  return takes;
}

bool rollback(int64_t matcher, int64_t num) {
  Matcher& own = matcher_at(matcher);
  std::lock_guard guard(own.lock);
  own.course.go_back(size_t(num));
  return library.rollback(own.own, size_t(num)) == 0;
}

// How many masks were known when they were asked for.
int64_t num_known() { return known_masks.count(); }

// What is kept of masks, for tests: so many bytes, of those that took so many seconds of a core.
void limit_known(int64_t most_bytes, double dear) { known_masks.limit(size_t(most_bytes), dear); }

// A host has written tokens.
void tell() { tokens.tell(); }

int64_t make_worker(double dear) { return handle_of(new Worker(dear)); }

int64_t num_dear_of(int64_t worker) { return at<Worker>(worker).num_dear; }

double last_cost_of(int64_t worker) { return at<Worker>(worker).cost; }

// All jobs have states when this returns, and it is gone.
void close_worker(int64_t worker) { delete &at<Worker>(worker); }

// rows, words, states: addresses.
void submit(int64_t worker, int64_t rows, int64_t num, int64_t words, int64_t states, int64_t num_words) {
  const Row* first = &at<const Row>(rows);
  Job job{{first, first + num}, {}, &at<uint32_t>(words), &at<int32_t>(states), size_t(num_words)};
  for (const Row& row : job.rows) job.matchers.push_back(*row.matcher);
  at<Worker>(worker).submit(std::move(job));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(open, open);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_vocabulary, make_vocabulary);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_matcher, make_matcher);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(copy_matcher, copy_matcher);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(free_matcher, free_matcher);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_tokens_of, num_tokens_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(cost_of, cost_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(error_of, error_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(advance, advance);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(try_take, try_take);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rollback, rollback);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_known, num_known);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(limit_known, limit_known);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tell, tell);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_worker, make_worker);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_dear_of, num_dear_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(last_cost_of, last_cost_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(close_worker, close_worker);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(submit, submit);

}  // namespace minisgl
