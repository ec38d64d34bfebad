// Masks of grammars, computed by a thread that needs nothing of Python, beside a device that waits for them.
//
// Matchers are llguidance's, used through its C functions (llguidance.h of guidance-ai/llguidance), which are looked up
// by name in the library that Python has loaded. Jobs are done in order, one for each step; a job's rows wait for the
// tokens that the device samples in the step before. What a mask and its state are is said by `core.Masks`.
#include <dlfcn.h>
#include <pthread.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <type_traits>
#include <unordered_map>
#include <vector>

namespace minisgl {

namespace {

enum State : int32_t { kPending = 0, kReady = 1, kNotReady = 2 };  // of a mask: `core.MASK_READY`, …
constexpr int32_t kIdPending = -3;                                 // a token that is not sampled yet
constexpr double kLongestWait = 30.0;                              // seconds, for the step before
constexpr size_t kMostRemembered = 16 << 20;                       // bytes of texts whose tokens are known

double now_of(clockid_t clock) {
  timespec now;
  clock_gettime(clock, &now);
  return double(now.tv_sec) + double(now.tv_nsec) * 1e-9;
}

using Tokenize = size_t (*)(const void* own, const uint8_t* text, size_t num_bytes, uint32_t* tokens, size_t room);

struct Limits {  // `LlgParserLimits`
  uint64_t max_items_in_row, initial_lexer_fuel, step_lexer_fuel, step_max_items, max_lexer_states, max_grammar_size;
  bool precompute_large_lexemes, verbose_errors;
};

struct ConstraintInit {  // `LlgConstraintInit`, which does not tell how long it is: `spare` is for newer ones
  void* tokenizer;
  uint32_t log_buffer_level, log_stderr_level;
  bool ff_tokens_ok, backtrack_ok;
  Limits limits;
  char spare[512];
};

struct TokenizerInit {  // `LlgTokenizerInitV2`
  size_t struct_size;
  uint32_t vocab_size, tok_eos;
  const uint32_t* token_lens;
  const uint8_t* token_bytes;
  const char* tokenizer_json;
  bool tokenize_assumes_string;
  Tokenize tokenize_fn;
  bool use_approximate_greedy_tokenize_fn;
  const void* tokenize_user_data;
  const char* const* slices;
  const uint32_t* tok_eos_extra;
  uint32_t tok_eos_extra_count;
};

struct Library {
  void (*constraint_init_set_defaults)(ConstraintInit*, const void* tokenizer);
  void* (*new_tokenizer_v2)(const TokenizerInit*, char* error, size_t room);
  void* (*new_matcher)(const ConstraintInit*, const char* kind, const char* grammar);
  int32_t (*consume_tokens)(void* matcher, const uint32_t* tokens, size_t num);
  int32_t (*compute_mask_into)(void* matcher, uint32_t* words, size_t num_bytes);
  bool (*is_stopped)(const void* matcher);
  bool (*is_error)(const void* matcher);
  const char* (*get_error)(void* matcher);
  void* (*clone)(const void* matcher);
  void (*free)(void* matcher);

  // false: it does not export one of them.
  bool open(const char* path) {
    void* handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    const auto find = [handle](const char* name, auto& function) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
      return function != nullptr;
    };
    return handle != nullptr && find("llg_constraint_init_set_defaults", constraint_init_set_defaults) &&
           find("llg_new_tokenizer_v2", new_tokenizer_v2) && find("llg_new_matcher", new_matcher) &&
           find("llg_matcher_consume_tokens", consume_tokens) &&
           find("llg_matcher_compute_mask_into", compute_mask_into) &&
           find("llg_matcher_is_stopped", is_stopped) && find("llg_matcher_is_error", is_error) &&
           find("llg_matcher_get_error", get_error) && find("llg_clone_matcher", clone) &&
           find("llg_free_matcher", free);
  }
};

Library library;

// Of a text the tokens. The first call for it is Python's, which takes that lock; llguidance asks again and again for
// what is left of the same strings.
struct Texts {
  explicit Texts(Tokenize ask) : ask(ask) {}

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
    std::vector<uint32_t> made(num_bytes + 1);
    made.resize(std::min(ask(nullptr, text, num_bytes, made.data(), made.size()), made.size()));
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

  Tokenize ask;
  std::mutex lock;
  std::unordered_map<std::string, std::vector<uint32_t>> known;
  size_t num_remembered = 0;
};

// The first members are read by `kernel/masks.py`.
struct Matcher {
  int64_t num_tokens = 0;  // of the output, that it has taken; -1: it is broken
  double cost = 0;         // seconds of a core that the last mask took, with its tokens
  void* own;
  std::mutex lock;

  explicit Matcher(void* own) : own(own) {
    if (library.is_error(own)) num_tokens = -1;
  }
  ~Matcher() { library.free(own); }

  // Take tokens of the output, and write the next one's mask. false: it is broken.
  bool advance(const uint32_t* ids, size_t num, uint32_t* words, size_t num_bytes) {
    const double start = now_of(CLOCK_THREAD_CPUTIME_ID);
    bool holds = num_tokens >= 0;
    if (holds && num > 0 && !library.is_stopped(own)) holds = library.consume_tokens(own, ids, num) == 0;
    if (holds && num_bytes > 0) holds = library.compute_mask_into(own, words, num_bytes) == 0;
    num_tokens = holds ? num_tokens + int64_t(num) : -1;
    cost = now_of(CLOCK_THREAD_CPUTIME_ID) - start;
    return holds;
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

// What Python reads of a worker.
struct Spent {
  int64_t num_dear = 0;  // masks that took more than `dear` seconds of a core
  double seconds = 0;    // of a core, that the last job took
};

class Worker : public Spent {
 public:
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
      double spent = 0;
      std::vector<int64_t> tokens;  // of all rows first: they come together, and their place will be used again
      for (const Row& row : job.rows) tokens.push_back(row.ref == nullptr ? row.known : token_at(row.ref));
      for (size_t i = 0; i < job.rows.size(); i++) {
        const int64_t place = job.rows[i].place;
        uint32_t* words = job.words + place * job.num_words;
        const bool is_there = serve(job.rows[i], tokens[i], *job.matchers[i], words, job.num_words * 4);
        __atomic_store_n(job.states + place, is_there ? kReady : kNotReady, __ATOMIC_RELEASE);
        spent += job.matchers[i]->cost;
        num_dear += job.matchers[i]->cost > dear;
      }
      this->seconds = spent;
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
    return matcher.advance(ids + 2 - num, num, words, num_bytes);
  }

  int64_t token_at(const int32_t* ref) {
    const double start = now_of(CLOCK_MONOTONIC);
    while (true) {
      const int32_t token = __atomic_load_n(ref, __ATOMIC_ACQUIRE);
      if (token != kIdPending) return token;
      {
        std::lock_guard guard(lock);
        if (is_closing) return kIdPending;
      }
      if (now_of(CLOCK_MONOTONIC) - start > kLongestWait) return kIdPending;
      const timespec pause{0, 10'000};
      nanosleep(&pause, nullptr);
    }
  }

  const double dear;
  std::mutex lock;
  std::condition_variable told;
  std::deque<Job> jobs;
  bool is_closing = false;
  std::thread thread;  // last: it uses the others
};

}  // namespace

}  // namespace minisgl

using namespace minisgl;

extern "C" {

// path: of llguidance's library; limits: what Python knows as its defaults. false: it does not export what is needed, or
// its structures are others than those above.
bool masks_open(const char* path, const Limits* limits) {
  ConstraintInit init{}, none{};
  if (!library.open(path)) return false;
  library.constraint_init_set_defaults(&init, nullptr);
  return std::memcmp(&init.limits, limits, offsetof(Limits, verbose_errors) + 1) == 0 &&
         std::memcmp(init.spare, none.spare, sizeof(none.spare)) == 0;
}

// What makes matchers; it stays for ever. ask: Python's tokenizer; lens and bytes: of the vocabulary's texts; ends: of
// outputs; slices end with null. On failure null, and why in `error`.
void* masks_vocabulary(Tokenize ask, const uint32_t* lens, const uint8_t* bytes, uint32_t vocab_size,
                       const uint32_t* ends, uint32_t num_ends, const char* const* slices, const Limits* limits,
                       char* error, size_t room) {
  TokenizerInit from{};
  from.struct_size = sizeof(from);
  from.vocab_size = vocab_size;
  from.tok_eos = ends[0];
  from.token_lens = lens;
  from.token_bytes = bytes;
  from.tokenize_fn = Texts::of;
  from.tokenize_user_data = new Texts(ask);
  from.slices = slices;
  from.tok_eos_extra = ends + 1;
  from.tok_eos_extra_count = num_ends - 1;
  void* tokenizer = library.new_tokenizer_v2(&from, error, room);
  if (tokenizer == nullptr) return nullptr;
  auto* init = new ConstraintInit{};
  library.constraint_init_set_defaults(init, tokenizer);
  init->log_stderr_level = 0;
  init->limits = *limits;
  return init;
}

// grammar: in llguidance's own form.
void* masks_matcher(const void* vocabulary, const char* grammar) {
  void* own = library.new_matcher(static_cast<const ConstraintInit*>(vocabulary), "llguidance", grammar);
  return new Handle(std::make_shared<Matcher>(own));
}

// What is wrong, if something is; else null. It is there as long as the matcher.
const char* masks_error(const void* matcher) {
  Matcher& own = **static_cast<const Handle*>(matcher);
  std::lock_guard guard(own.lock);
  return library.get_error(own.own);
}

const Matcher* masks_numbers(const void* matcher) { return static_cast<const Handle*>(matcher)->get(); }

// At the same place.
void* masks_copy(const void* matcher) {
  Matcher& from = **static_cast<const Handle*>(matcher);
  std::lock_guard guard(from.lock);
  const auto made = std::make_shared<Matcher>(library.clone(from.own));
  made->num_tokens = from.num_tokens;
  return new Handle(made);
}

void masks_free(void* matcher) { delete static_cast<Handle*>(matcher); }

// num_bytes: 0 for no mask.
bool masks_advance(const void* matcher, const uint32_t* ids, size_t num, uint32_t* words, size_t num_bytes) {
  Matcher& own = **static_cast<const Handle*>(matcher);
  std::lock_guard guard(own.lock);
  return own.advance(ids, num, words, num_bytes);
}

void* masks_worker(double dear) { return new Worker(dear); }

const Spent* masks_spent(const void* worker) { return static_cast<const Worker*>(worker); }

// All jobs have states when this returns, and it is gone.
void masks_close(void* worker) { delete static_cast<Worker*>(worker); }

void masks_submit(void* worker, const Row* rows, size_t num, uint32_t* words, int32_t* states, size_t num_words) {
  Job job{{rows, rows + num}, {}, words, states, num_words};
  for (const Row& row : job.rows) job.matchers.push_back(*row.matcher);
  static_cast<Worker*>(worker)->submit(std::move(job));
}

}  // extern "C"
