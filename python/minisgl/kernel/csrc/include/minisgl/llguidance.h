// The C functions of llguidance that are used here, as its llguidance.h (guidance-ai/llguidance) has them. They are looked
// up by name in the library that Python has loaded.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace minisgl {

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
  int32_t (*validate_tokens)(void* matcher, const uint32_t* tokens, size_t num);  // how many it would take
  int32_t (*rollback)(void* matcher, size_t num);
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
           find("llg_matcher_validate_tokens", validate_tokens) && find("llg_matcher_rollback", rollback) &&
           find("llg_matcher_is_stopped", is_stopped) && find("llg_matcher_is_error", is_error) &&
           find("llg_matcher_get_error", get_error) && find("llg_clone_matcher", clone) &&
           find("llg_free_matcher", free);
  }
};

}  // namespace minisgl
