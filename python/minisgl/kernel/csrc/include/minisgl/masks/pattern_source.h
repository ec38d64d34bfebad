// A regular expression in the syntax of Rust's `regex`, which llguidance has: the part of it that means the same to all.
#pragma once

#include <bitset>
#include <cctype>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace minisgl {

struct PatternSource {
  static constexpr int32_t kHigh = 128, kEndless = -1;  // the symbol of all characters beyond ASCII; no upper bound
  static constexpr size_t kLongest = 2000, kDeepest = 50;

  enum class Kind { kAtom, kAll, kEither, kRepeat };

  struct Atom {  // one character of a set
    std::bitset<kHigh + 1> symbols;
    bool is_high_unknown = false;  // it has some of those beyond ASCII
  };

  struct Part {
    Kind kind;
    std::vector<int32_t> parts{};
    int32_t low = 0, high = 0;  // times; of an atom `low` is its number
  };

  std::vector<Atom> atoms;
  std::vector<Part> parts;
  int32_t root = 0;

  // None if there is anything else in it.
  static std::optional<PatternSource> parse(std::string_view text) {
    if (text.empty() || text.size() > kLongest) return {};
    for (const char one : text) {
      if (one < 0x20 || one > 0x7E) return {};
    }
    PatternSource made;
    made.text = text;
    made.root = made.alternatives(0);
    if (!made.is_known || made.at != text.size()) return {};
    return made;
  }

 private:
  std::string_view text;
  size_t at = 0;
  bool is_known = true;
  std::map<std::string, int32_t, std::less<>> numbers;  // of atoms, by how they are written

  char next() const { return at < text.size() ? text[at] : '\0'; }

  bool take(char one) {
    if (next() != one) return false;
    at++;
    return true;
  }

  int32_t unknown() {
    is_known = false;
    at = text.size();
    return 0;
  }

  int32_t add(Part part) {
    parts.push_back(std::move(part));
    return int32_t(parts.size()) - 1;
  }

  int32_t alternatives(size_t depth) {
    if (depth > kDeepest) return unknown();
    std::vector<int32_t> all;
    do {
      std::vector<int32_t> row;
      while (at < text.size() && next() != '|' && next() != ')') row.push_back(repeated(depth));
      all.push_back(add({Kind::kAll, std::move(row)}));
    } while (take('|'));
    return all.size() == 1 ? all[0] : add({Kind::kEither, std::move(all)});
  }

  int32_t repeated(size_t depth) {
    const int32_t one = take('(') ? group(depth) : atom();
    int32_t low = 0, high = kEndless;
    if (take('?')) {
      high = 1;
    } else if (take('+')) {
      low = 1;
    } else if (take('{')) {
      low = number();
      high = take(',') ? (next() == '}' ? kEndless : number()) : low;
      if (!take('}') || (high != kEndless && high < low)) return unknown();
    } else if (!take('*')) {
      return one;
    }
    if (at < text.size() && std::string_view("?+*{").find(next()) != std::string_view::npos) return unknown();
    return add({Kind::kRepeat, {one}, low, high});
  }

  int32_t number() {
    int32_t made = 0;
    const size_t begin = at;
    while (std::isdigit(next()) && at < begin + 6) made = made * 10 + (text[at++] - '0');
    return at == begin ? unknown() : made;
  }

  int32_t group(size_t depth) {
    if (take('?') && !take(':')) return unknown();
    const int32_t inner = alternatives(depth + 1);
    return take(')') ? inner : unknown();
  }

  int32_t atom() {
    const size_t begin = at;
    Atom made;
    if (take('[')) {
      members(made);
    } else if (take('.')) {
      made.symbols.set().reset('\n');
    } else if (next() != '\\' && std::string_view("?+*{}[]()|^$").find(next()) != std::string_view::npos) {
      return unknown();
    } else if (const int one = character(made); one >= 0) {
      made.symbols.set(size_t(one));
    }
    const auto [found, is_new] = numbers.try_emplace(std::string(text.substr(begin, at - begin)), atoms.size());
    if (is_new) atoms.push_back(made);
    return add({Kind::kAtom, {}, found->second});
  }

  // Of a set in brackets.
  void members(Atom& made) {
    const bool is_negated = take('^');
    const size_t begin = at;
    do {
      if (next() == '[' || next() == ']') unknown();
      const int low = character(made);
      int high = low;
      if (low >= 0 && next() == '-' && at + 1 < text.size() && text[at + 1] != ']') {
        at++;
        if (next() == '[') unknown();
        high = character(made);
        if (high < low) unknown();
      }
      for (int one = low; low >= 0 && one <= high; one++) made.symbols.set(size_t(one));
    } while (is_known && next() != ']');
    for (const char* operation : {"--", "&&", "~~"}) {
      if (text.substr(begin, at - begin).find(operation) != std::string_view::npos) unknown();
    }
    if (!take(']')) unknown();
    if (is_negated) made.symbols.flip();
  }

  // One character, or -1 for a class of them, which is added.
  int character(Atom& made) {
    if (at >= text.size()) return unknown() - 1;
    const char one = text[at++];
    if (one != '\\') return one;
    if (at >= text.size()) return unknown() - 1;
    const char escaped = text[at++];
    if (escaped == 'n') return '\n';
    if (escaped == 't') return '\t';
    if (escaped == 'r') return '\r';
    if (std::ispunct(escaped) && escaped != '<' && escaped != '>') return escaped;
    if (std::string_view("dwsDWS").find(escaped) == std::string_view::npos) return unknown() - 1;
    const int lower = std::tolower(escaped);
    for (int i = 0; i < kHigh; i++) {
      const bool is_digit = std::isdigit(i), is_word = std::isalnum(i) || i == '_';
      const bool is_in = lower == 'd' ? is_digit : lower == 'w' ? is_word : std::isspace(i) != 0;
      if (is_in == (lower == escaped)) made.symbols.set(size_t(i));
    }
    made.symbols.set(kHigh);
    made.is_high_unknown = true;
    return -1;
  }
};

}  // namespace minisgl
