// Where a text has got in a regular expression, as far as masks can tell.
//
// A place is what is left of the expression (Brzozowski's derivatives). Two places have the same mask if what is left has
// the same members, and the same beginnings of members, of up to as many bytes as the longest token has: so a count of
// repetitions matters only while it is less than that. `key` names all places whose masks are the same for this reason.
#pragma once

#include <minisgl/masks/pattern_source.h>

#include <algorithm>
#include <atomic>
#include <bitset>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace minisgl {

class Pattern {
 public:
  static constexpr int32_t kLost = -1;  // where a text has got is not known

  // No pattern where the expression has something that is not followed here. longest: bytes of a token.
  static std::shared_ptr<Pattern> make(std::string_view text, int32_t longest) {
    const std::optional<PatternSource> source = PatternSource::parse(text);
    if (!source) return nullptr;
    auto made = std::make_shared<Pattern>(text, longest);
    made->atoms = source->atoms;
    made->begin = made->build(*source, source->root);
    return made;
  }

  Pattern(std::string_view text, int32_t longest) : text(text), longest(longest) {
    add({Kind::kNever});
    add({Kind::kEmpty});
    nodes[kEmptyNode].nullable = true;
  }

  ~Pattern() { num_of_all -= int64_t(nodes.size()); }

  int32_t start() const { return begin; }

  // Whether it follows nothing more: it, or all of them together, would take too much memory.
  bool is_full() {
    std::lock_guard guard(lock);
    return has_many();
  }

  // The same one, with nothing known.
  std::shared_ptr<Pattern> again() const { return make(text, longest); }

  // The place behind a token that the grammar takes.
  int32_t follow(int32_t place, std::string_view token) {
    std::lock_guard guard(lock);
    for (size_t i = 0; i < token.size() && place != kLost;) {
      const auto byte = uint8_t(token[i]);
      const size_t num = byte < 0x80 ? 1 : byte < 0xC2 ? 0 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : byte < 0xF5 ? 4 : 0;
      if (num == 0 || i + num > token.size()) return kLost;  // part of a character
      for (size_t j = 1; j < num; j++) {
        if ((uint8_t(token[i + j]) & 0xC0) != 0x80) return kLost;
      }
      place = derivative(place, num == 1 ? byte : kHigh);
      if (place == kNeverNode || has_many()) return kLost;
      i += num;
    }
    return place;
  }

  // Of the places with the same mask; none where the next byte is prescribed: masks then depend on the tokens before.
  std::optional<int32_t> key(int32_t place) {
    if (place == kLost) return {};
    std::lock_guard guard(lock);
    const int32_t short_one = shortened(place);
    const Symbols& symbols = nodes[short_one].first;
    if (symbols.count() < 2 && !symbols[kHigh]) return {};
    return short_one;
  }

 private:
  enum class Kind : int32_t { kNever, kEmpty, kAtom, kThen, kEither, kRepeat };
  static constexpr int32_t kNeverNode = 0, kEmptyNode = 1, kHigh = PatternSource::kHigh, kEndless = PatternSource::kEndless;
  static constexpr size_t kMostNodes = 1 << 15, kMostSteps = 1 << 16, kMostOfAll = 1 << 18, kMostBranches = 16;
  using Symbols = std::bitset<kHigh + 1>;

  struct Node {
    Kind kind;
    int32_t low = 0, high = 0;  // times; of an atom `low` is its number
    std::vector<int32_t> parts{};
    bool nullable = false;
    int32_t shortest = 0;  // bytes of a member, at least
    Symbols first{};       // with which one may begin
  };

  bool has_many() const { return nodes.size() > kMostNodes || num_of_all > kMostOfAll; }

  int32_t add(Node node) {
    std::vector<int32_t> all{int32_t(node.kind), node.low, node.high};
    all.insert(all.end(), node.parts.begin(), node.parts.end());
    const auto [found, is_new] = numbers.try_emplace(std::move(all), int32_t(nodes.size()));
    if (is_new) {
      node.shortest = shortest(node);
      node.first = first(node);
      num_of_all++;
      nodes.push_back(std::move(node));
    }
    return found->second;
  }

  int32_t shortest(const Node& node) const {
    if (node.nullable || node.parts.empty()) return node.kind == Kind::kAtom;
    const int32_t one = nodes[node.parts[0]].shortest;
    if (node.kind == Kind::kRepeat) return one;
    if (node.kind == Kind::kThen) return std::min(longest, one + nodes[node.parts[1]].shortest);
    int32_t least = one;
    for (const int32_t part : node.parts) least = std::min(least, nodes[part].shortest);
    return least;
  }

  int32_t then(int32_t a, int32_t b) {
    if (a == kNeverNode || b == kNeverNode) return kNeverNode;
    if (a == kEmptyNode) return b;
    if (b == kEmptyNode) return a;
    if (nodes[a].kind == Kind::kThen) {
      const std::vector<int32_t> parts = nodes[a].parts;
      return then(parts[0], then(parts[1], b));
    }
    return add({Kind::kThen, 0, 0, {a, b}, nodes[a].nullable && nodes[b].nullable});
  }

  int32_t either(const std::vector<int32_t>& branches) {
    std::vector<int32_t> flat;
    for (const int32_t one : branches) {
      if (nodes[one].kind == Kind::kEither) {
        flat.insert(flat.end(), nodes[one].parts.begin(), nodes[one].parts.end());
      } else if (one != kNeverNode) {
        flat.push_back(one);
      }
    }
    std::sort(flat.begin(), flat.end());
    flat.erase(std::unique(flat.begin(), flat.end()), flat.end());
    if (flat.empty()) return kNeverNode;
    if (flat.size() == 1) return flat[0];
    bool nullable = false;
    for (const int32_t one : flat) nullable |= nodes[one].nullable;
    return add({Kind::kEither, 0, 0, std::move(flat), nullable});
  }

  int32_t repeat(int32_t one, int32_t low, int32_t high) {
    if (one == kEmptyNode || high == 0) return kEmptyNode;
    if (one == kNeverNode) return low == 0 ? kEmptyNode : kNeverNode;
    if (low == 1 && high == 1) return one;
    if (nodes[one].nullable) low = 0;
    return add({Kind::kRepeat, low, high, {one}, low == 0});
  }

  int32_t build(const PatternSource& source, int32_t number) {
    const PatternSource::Part& part = source.parts[number];
    std::vector<int32_t> made;
    for (const int32_t inner : part.parts) made.push_back(build(source, inner));
    switch (part.kind) {
      case PatternSource::Kind::kAtom: return add({Kind::kAtom, part.low});
      case PatternSource::Kind::kEither: return either(made);
      case PatternSource::Kind::kRepeat: return repeat(made[0], part.low, part.high);
      default: break;
    }
    int32_t all = kEmptyNode;
    for (auto one = made.rbegin(); one != made.rend(); ++one) all = then(*one, all);
    return all;
  }

  // What is left behind a symbol: an ASCII character, or `kHigh` for any other.
  int32_t derivative(int32_t number, int32_t symbol) {
    const int64_t step = int64_t(number) * 256 + symbol;
    if (const auto found = steps.find(step); found != steps.end()) return found->second;
    const int32_t made = derived(number, symbol);
    if (steps.size() > kMostSteps) steps.clear();
    return steps[step] = made;
  }

  int32_t derived(int32_t number, int32_t symbol) {
    const Node node = nodes[number];  // a copy: there will be more of them
    if (node.kind == Kind::kAtom) {
      const PatternSource::Atom& atom = atoms[node.low];
      if (symbol == kHigh && atom.is_high_unknown) return kLost;
      return atom.symbols[symbol] ? kEmptyNode : kNeverNode;
    }
    std::vector<int32_t> found;
    for (const int32_t part : node.parts) {
      found.push_back(derivative(part, symbol));
      if (found.back() == kLost) return kLost;
      if (node.kind == Kind::kThen && !nodes[part].nullable) break;
    }
    if (node.kind == Kind::kEither) {
      const int32_t made = either(found);
      return nodes[made].parts.size() > kMostBranches ? kLost : made;
    }
    if (node.kind == Kind::kRepeat) {
      const int32_t high = node.high == kEndless ? kEndless : node.high - 1;
      return then(found[0], repeat(node.parts[0], std::max(node.low - 1, 0), high));
    }
    if (node.kind != Kind::kThen) return kNeverNode;
    const int32_t made = then(found[0], node.parts[1]);
    return found.size() == 1 ? made : either({made, found[1]});
  }

  // With no count that is larger than tokens are long.
  int32_t shortened(int32_t number) {
    if (const auto found = shorts.find(number); found != shorts.end()) return found->second;
    const Node node = nodes[number];
    std::vector<int32_t> made;
    for (const int32_t part : node.parts) made.push_back(shortened(part));
    int32_t all = number;
    if (node.kind == Kind::kThen) all = then(made[0], made[1]);
    if (node.kind == Kind::kEither) all = either(made);
    if (node.kind == Kind::kRepeat) {
      const int32_t most = longest / std::max(1, nodes[made[0]].shortest);  // times that a token can go through it
      all = repeat(made[0], std::min(node.low, most + 1), node.high > most ? kEndless : node.high);
    }
    return shorts[number] = all;
  }

  Symbols first(const Node& node) const {
    if (node.kind == Kind::kAtom) return atoms[node.low].symbols;
    Symbols all;
    for (const int32_t part : node.parts) {
      all |= nodes[part].first;
      if (node.kind == Kind::kThen && !nodes[part].nullable) break;
    }
    return all;
  }

  static inline std::atomic<int64_t> num_of_all = 0;  // nodes; of 400 bytes, with what belongs to each
  const std::string text;
  const int32_t longest;
  std::mutex lock;
  int32_t begin = kNeverNode;
  std::vector<PatternSource::Atom> atoms;
  std::vector<Node> nodes;
  std::map<std::vector<int32_t>, int32_t> numbers;  // of nodes by what they are
  std::unordered_map<int64_t, int32_t> steps;
  std::unordered_map<int32_t, int32_t> shorts;
};

}  // namespace minisgl
