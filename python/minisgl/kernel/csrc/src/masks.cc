// Masks of grammars, computed by a thread that needs nothing of Python, beside a device that waits for them: what Python
// asks for.
#include <minisgl/masks/worker.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/string.h>

#include <cstring>
#include <unordered_map>

namespace minisgl {

namespace {

using tvm::ffi::Array;
using tvm::ffi::Bytes;
using tvm::ffi::Function;
using tvm::ffi::String;

constexpr size_t kMostRemembered = 16 << 20;  // bytes of texts whose tokens are known

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
  const bool has_openings = course.pattern == nullptr;  // a pattern's masks are known by what is left of it
  auto openings = has_openings ? std::make_shared<Openings>() : nullptr;
  const int32_t place = has_openings ? Openings::kStart : Openings::kNowhere;
  return handle_of(new Handle(std::make_shared<Matcher>(own, std::move(course), std::move(openings), place)));
}

// At the same place.
int64_t copy_matcher(int64_t matcher) {
  Matcher& from = matcher_at(matcher);
  std::lock_guard guard(from.lock);
  from.course.renew();
  auto made = std::make_shared<Matcher>(library.clone(from.own), from.course, from.openings, from.place);
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
  if (takes) own.course.follow(&id, 1), own.leave();
  if (library.is_error(own.own)) own.num_tokens = -1;  // by a limit
  return takes;
}

bool rollback(int64_t matcher, int64_t num) {
  Matcher& own = matcher_at(matcher);
  std::lock_guard guard(own.lock);
  own.course.go_back(size_t(num));
  own.leave();
  return library.rollback(own.own, size_t(num)) == 0;
}

// How many masks were known when they were asked for.
int64_t num_known() { return known_masks.count(); }

// What is kept of masks, for tests: so many bytes, of those that took so many seconds of a core.
void limit_known(int64_t most_bytes, double dear) { known_masks.limit(size_t(most_bytes), dear); }

// How many masks came with a copy of another matcher.
int64_t num_copied() { return Openings::num_copied; }

// For tests: the seconds of a core from which on matchers are kept whose masks took as long, and those of a short copy.
void keep_from(double worth, double short_copy) { Openings::worth = worth, Openings::short_copy = short_copy; }

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

// After `submit`. ids, words, states: addresses.
void go_on(int64_t worker, int64_t ids, int64_t words, int64_t states) {
  at<Worker>(worker).go_on(&at<const int32_t>(ids), &at<uint32_t>(words), &at<int32_t>(states));
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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_copied, num_copied);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(keep_from, keep_from);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tell, tell);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_worker, make_worker);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(num_dear_of, num_dear_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(last_cost_of, last_cost_of);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(close_worker, close_worker);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(submit, submit);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(go_on, go_on);

}  // namespace minisgl
