// Attention over the paged cache. Query heads that share a key/value head share one read of it; softmax is online
// (M. Milakov and N. Gimelshein, arXiv 1805.02867), over blocks of `kBlock` tokens.
//
// A single new token (decode) takes dot products with the keys as they lie in the cache, token by token, so that memory is
// read from one end to the other; where there are fewer sequences than threads, caches are split, and the parts put
// together afterwards (Flash-Decoding). Several new tokens (prefill) multiply their queries with panels of
// keys, and the weights with panels of values, as linear layers do.
#pragma once

#include <limits>
#include <vector>

#include "cache.h"
#include "linear.h"

namespace minisgl::cpu {

constexpr int kBlock = 64;        // tokens of the cache at a time
constexpr int kQueryRows = 96;    // queries times heads of a group, of one piece of a prefill
constexpr int kSplitTokens = 32;  // a decode is split into parts of no fewer tokens
constexpr float kNone = -std::numeric_limits<float>::infinity();

inline int64_t padded_dim(const Heads& heads) { return (heads.dim + kPanel - 1) / kPanel * kPanel; }

// A piece of the work: `size` key/value heads of one sequence from `head` on; of a decode, part `part` of `parts` of its
// cache; of a prefill, the tokens from `token` on.
struct Piece {
  int32_t sequence, head, size;
  int32_t part, parts;  // parts 0: prefill
  int64_t token, partial;  // partial: the first of its rows among the partial results
};

// What is summed up for one query head: e^(score - most) and their products with the values.
struct Partial {
  float most, total;
};

inline void soft_cap(float* scores, int count, float cap) {
  for (int t = 0; t < count; t += kLanes) store(scores + t, soft_capped(load(scores + t), cap));
}

// What the weighted values of query head `head` are divided by.
inline float total_of(const Partial& partial, const Scores& kind, int64_t head) {
  return kind.sinks == nullptr ? partial.total : partial.total + std::exp(kind.sinks[head] - partial.most);
}

template <class T>
inline float dot(const float* q, const T* k, int64_t dim) {
  Floats acc[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= dim; i += 2 * kLanes) {
    acc[0] += load(q + i) * load(k + i);
    acc[1] += load(q + i + kLanes) * load(k + i + kLanes);
  }
  for (; i + kLanes <= dim; i += kLanes) acc[0] += load(q + i) * load(k + i);
  float total = sum(acc[0] + acc[1]);
  for (; i < dim; ++i) total += q[i] * widen(k[i]);
  return total;
}

// scores[g][t] = q[g] · k[t] for G query heads and `count` tokens of a block; offsets: of their keys.
template <class T, int G>
inline void decode_scores(const float* q, const T* k, const int64_t* offsets, int count, int64_t dim, float* scores) {
  constexpr int kTokens = G == 1 ? 4 : G == 2 ? 2 : 1;
  int t = 0;
  if (dim % kLanes == 0) {
    for (; t + kTokens <= count; t += kTokens) {
      Floats acc[kTokens][G] = {};
      for (int64_t i = 0; i < dim; i += kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < kTokens; ++j) {
          Floats key = load(k + offsets[t + j] + i);
#pragma GCC unroll 8
          for (int g = 0; g < G; ++g) acc[j][g] += load(q + g * dim + i) * key;
        }
#pragma GCC unroll 4
      for (int j = 0; j < kTokens; ++j)
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) scores[g * kBlock + t + j] = sum(acc[j][g]) * scale_of(k + offsets[t + j], dim);
    }
  }
  for (; t < count; ++t)
    for (int g = 0; g < G; ++g) scores[g * kBlock + t] = dot(q + g * dim, k + offsets[t], dim) * scale_of(k + offsets[t], dim);
}

// out[g] += sum over t of weights[g][t] * v[t]; where values have scales, these are in the weights.
template <class T, int G>
inline void decode_values(const float* weights, const T* v, const int64_t* offsets, int count, int64_t dim, float* out) {
  constexpr int kVectors = G <= 2 ? 4 : G <= 4 ? 2 : 1;
  int64_t i = 0;
  auto columns = [&]<int V>(std::integral_constant<int, V>) {
    Floats acc[G][V];
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) acc[g][j] = load(out + g * dim + i + j * kLanes);
    for (int t = 0; t < count; ++t) {
      const T* row = v + offsets[t] + i;
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) {
        Floats value = load(row + j * kLanes);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) acc[g][j] += broadcast(weights[g * kBlock + t]) * value;
      }
    }
#pragma GCC unroll 8
    for (int g = 0; g < G; ++g)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) store(out + g * dim + i + j * kLanes, acc[g][j]);
    i += V * kLanes;
  };
  while (i + kVectors * kLanes <= dim) columns(std::integral_constant<int, kVectors>{});
  while (i + kLanes <= dim) columns(std::integral_constant<int, 1>{});
  for (; i < dim; ++i)
    for (int g = 0; g < G; ++g)
      for (int t = 0; t < count; ++t) out[g * dim + i] += weights[g * kBlock + t] * widen(v[offsets[t] + i]);
}

// f(key/value head, query head of the piece, integral_constant G) for groups of query heads that share a key.
template <class F>
inline void for_groups(int64_t num_kv, int64_t group, F&& f) {
  for (int64_t h = 0; h < num_kv; ++h)
    for (int64_t g = 0; g < group;) {
      int64_t left = group - g, at = h * group + g;
      if (left >= 8)
        f(h, at, std::integral_constant<int, 8>{}), g += 8;
      else if (left >= 4)
        f(h, at, std::integral_constant<int, 4>{}), g += 4;
      else if (left >= 2)
        f(h, at, std::integral_constant<int, 2>{}), g += 2;
      else
        f(h, at, std::integral_constant<int, 1>{}), g += 1;
    }
}

// One block of scores becomes weights, in place; what was summed up before is scaled to the new maximum.
[[gnu::noinline]] inline void online_softmax(float* scores, int count, Partial& partial, float* out, int64_t dim) {
  for (int t = count; t < kBlock; ++t) scores[t] = kNone;
  Floats high = load(scores);
  for (int t = kLanes; t < kBlock; t += kLanes) high = maximum(load(scores + t), high);
  float most = std::max(largest(high), partial.most);
  float base = most == kNone ? 0.0f : most;
  Floats total{};
  for (int t = 0; t < kBlock; t += kLanes) {
    Floats weight = exponential(load(scores + t) - base);
    total += weight;
    store(scores + t, weight);
  }
  if (partial.most != most) {
    float factor = partial.most == kNone ? 0.0f : std::exp(partial.most - most);
    partial.total *= factor;
    for (int64_t i = 0; i < dim; ++i) out[i] *= factor;
  }
  partial.total += sum(total);
  partial.most = most;
}

// Where rows of tokens [first, first + count) begin, whose pages hold `stride` numbers for each; returns count.
inline int find_rows(const Heads& heads, const int32_t* pages, int64_t first, int64_t end, int64_t stride, int64_t* offsets) {
  int count = int(std::clamp<int64_t>(end - first, 0, kBlock));
  int64_t page = first / heads.page_size, within = first % heads.page_size;
  for (int t = 0; t < count; ++t) {
    offsets[t] = (pages[page] * heads.page_size + within) * stride;
    if (++within == heads.page_size) within = 0, ++page;
  }
  return count;
}

// Part h of `parts` of some tokens' rows into the caches: pieces of them are too short for a processor to see a stream, and it
// drops what it is asked for at once beyond some 20 lines. (GCC takes a function that only fetches for one that does nothing.)
template <class T>
[[gnu::always_inline]] inline void fetch_rows(const T* rows, const int64_t* offsets, int count, int64_t size, int64_t h, int64_t parts) {
  for (int64_t t = count * h / parts; t < count * (h + 1) / parts; ++t)
    for (int64_t i = 0; i < size; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(rows + offsets[t] + i);
}

// One new token over positions [begin, end). q: [num_kv * group, dim], scaled; k, v: at the first head; out: like q, and
// partials: one for each query head; scores: room for [num_kv * group, kBlock]; cap: of scores. Heads read the cache in leaps: so each
// fetches its share of the tile after this one, of keys, of values or of the next block's keys.
template <class T>
void decode(const float* q, const T* k, const T* v, int64_t num_kv, const Heads& heads, const int32_t* pages, int64_t begin,
            int64_t end, float cap, float* out, Partial* partials, float* scores) {
  constexpr int kTile = 8 / sizeof(T);  // tokens whose keys stay in the first-level cache
  int64_t rooms[2][kBlock], *offsets = rooms[0], *next = rooms[1];
  int64_t dim = heads.dim, group = heads.group(), size = row_size<T>(dim), stride = heads.num_kv * size;
  std::fill(out, out + num_kv * group * dim, 0.0f);
  std::fill(partials, partials + num_kv * group, Partial{kNone, 0.0f});
  int count = find_rows(heads, pages, begin, end, stride, offsets);
  for (int64_t first = begin; first < end; first += kBlock) {
    int later = find_rows(heads, pages, first + kBlock, end, stride, next);
    // `rows` from token t on and then `after`, which has `more` tokens at `places`.
    auto fetch = [&](const T* rows, int t, const T* after, const int64_t* places, int more, int64_t h) __attribute__((always_inline)) {
      if (t < count)
        fetch_rows(rows, offsets + t, std::min(kTile, count - t), num_kv * size, h, num_kv);
      else
        fetch_rows(after, places, std::min(kTile, more), num_kv * size, h, num_kv);
    };
    for (int t = 0; t < count; t += kTile)
      for_groups(num_kv, group, [&]<int G>(int64_t h, int64_t at, std::integral_constant<int, G>) {
        if (at % group == 0) fetch(k, t + kTile, v, offsets, count, h);
        decode_scores<T, G>(q + at * dim, k + h * size, offsets + t, std::min(kTile, count - t), dim, scores + at * kBlock + t);
      });
    for (int64_t h = 0; cap > 0 && h < num_kv * group; ++h) soft_cap(scores + h * kBlock, count, cap);
    for (int64_t h = 0; h < num_kv * group; ++h) online_softmax(scores + h * kBlock, count, partials[h], out + h * dim, dim);
    for (int64_t h = 0; kHasScales<T> && h < num_kv * group; ++h)
      for (int t = 0; t < count; ++t) scores[h * kBlock + t] *= scale_of(v + h / group * size + offsets[t], dim);
    for (int t = 0; t < count; t += kTile)
      for_groups(num_kv, group, [&]<int G>(int64_t h, int64_t at, std::integral_constant<int, G>) {
        if (at % group == 0) fetch(v, t + kTile, k, next, later, h);
        decode_values<T, G>(scores + at * kBlock + t, v + h * size, offsets + t, std::min(kTile, count - t), dim, out + at * dim);
      });
    std::swap(offsets, next);
    count = later;
  }
}

// Room that a thread needs, in floats.
inline int64_t decode_floats(const Heads& heads) { return heads.num_q * (2 * heads.dim + kBlock + 2); }
inline int64_t prefill_floats(const Heads& heads) {
  int64_t rows = std::max<int64_t>(kQueryRows, heads.group());
  return rows * (heads.dim + kBlock + padded_dim(heads)) + kBlock * heads.dim + kBlock * padded_dim(heads) + 2 * rows;
}

// Keys of `count` tokens to panels of floats, [kBlock / kPanel, dim, kPanel]. raw: as much room, where they lie as they are at
// first: 32 bits of each are moved at a time.
template <class T>
inline void put_keys(const T* k, const int64_t* offsets, int count, int64_t dim, float* raw, float* keys) {
  constexpr int64_t depth = 4 / sizeof(T);
  int64_t units = (dim + depth - 1) / depth;
  alignas(64) float scales[kBlock] = {};
  if (count < kBlock) std::fill(raw, raw + kBlock * units, 0.0f);
  for (int t = 0; t < count; ++t) {
    const T* row = k + offsets[t];
    float* to = raw + t / kPanel * units * kPanel + t % kPanel;
    for (int64_t u = 0; u < units; ++u) std::memcpy(to + u * kPanel, row + u * depth, 4);
    scales[t] = scale_of(row, dim);
  }
  for (int t = 0; t < kBlock; t += kLanes) {
    Floats scale = load(scales + t);
    const float* from = raw + t / kPanel * units * kPanel + t % kPanel;
    float* to = keys + t / kPanel * dim * kPanel + t % kPanel;
    for (int64_t u = 0; u < units; ++u)
      for (int64_t d = 0; d < depth && u * depth + d < dim; ++d) {
        Floats key = part_of(k, load_as<Words>(from + u * kPanel), int(d));
        store(to + (u * depth + d) * kPanel, kHasScales<T> ? key * scale : key);
      }
  }
}

// One value, to its place in panels of kBlock tokens.
template <class T>
inline void put_value(const T* row, int64_t dim, float* to) {
  float scale = scale_of(row, dim);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(to + i / kPanel * kPanel * kBlock + i % kPanel, load(row + i) * scale);
  for (; i < dim; ++i) to[i / kPanel * kPanel * kBlock + i % kPanel] = widen(row[i]) * scale;
}

// Several tokens of one sequence, all heads that share head `head`. q: the step's queries, [tokens, …] with `stride`
// floats between tokens, the group's first head at 0; out: [tokens, …] likewise, with `out_stride`.
template <class T>
inline void prefill(const float* q, int64_t stride, float scale, Cache<T> cache, const Heads& heads, int64_t head,
                    int64_t group, const Sequence& sequence, int64_t token, int64_t count, int64_t window,
                    const Scores& kind, float* out, int64_t out_stride, float* room) {
  int64_t dim = heads.dim, padded = padded_dim(heads), rows = count * group, size = row_size<T>(dim), offsets[kBlock];
  float* queries = room;
  float* scores = queries + rows * dim;
  float* result = scores + rows * kBlock;
  float* keys = result + rows * padded;         // panels: [kBlock / kPanel, dim, kPanel]
  float* values = keys + kBlock * dim;          // panels: [padded / kPanel, kBlock, kPanel]
  Partial* partials = reinterpret_cast<Partial*>(values + kBlock * padded);
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = q + (token + r / group) * stride + (r % group) * dim;
    for (int64_t i = 0; i < dim; ++i) queries[r * dim + i] = from[i] * scale;
    partials[r] = {kNone, 0.0f};
  }
  std::fill(result, result + rows * padded, 0.0f);
  int64_t position = sequence.start + token - sequence.first, end = position + count;
  int64_t begin = window ? std::max<int64_t>(0, position - window + 1) : 0;
  for (int64_t first = begin; first < end; first += kBlock) {
    int tokens = find_rows(heads, sequence.pages, first, end, heads.num_kv * size, offsets);
    put_keys(cache.k + head * size, offsets, tokens, dim, values, keys);
    if (padded > dim) std::fill(values, values + kBlock * padded, 0.0f);
    for (int t = 0; t < tokens; ++t) put_value(cache.v + head * size + offsets[t], dim, values + t * kPanel);
    for (int p = 0; p < kBlock / kPanel; ++p)
      multiply_rows(rows, keys + p * dim * kPanel, queries, dim, dim, scores + p * kPanel, kBlock, false);
    for (int64_t r = 0; r < rows; ++r) {
      int64_t last = position + r / group;  // the token's own position
      float* row = scores + r * kBlock;
      if (kind.cap > 0) soft_cap(row, tokens, kind.cap);
      if (window)
        for (int64_t t = 0; t < std::min<int64_t>(kBlock, last - window + 1 - first); ++t) row[t] = kNone;
      int seen = int(std::clamp<int64_t>(last + 1 - first, 0, tokens));
      online_softmax(row, seen, partials[r], result + r * padded, dim);
    }
    for (int64_t i = 0; i < padded; i += kPanel)
      multiply_rows(rows, values + i * kBlock, scores, kBlock, tokens, result + i, padded, true);
  }
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + (token + r / group) * out_stride + (r % group) * dim;
    float inverse = 1.0f / total_of(partials[r], kind, head * group + r % group);
    for (int64_t i = 0; i < dim; ++i) to[i] = result[r * padded + i] * inverse;
  }
}

}  // namespace minisgl::cpu
