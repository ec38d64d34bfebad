// The parts of a step. Each is called by all threads of a pool's task, shares its work out, and ends with a barrier.
#pragma once

#include <memory>

#include "amx.h"
#include "attention.h"
#include "linear.h"
#include "pool.h"
#include "quantized.h"

namespace minisgl::cpu {

// Memory that only grows, aligned to cache lines, not initialised.
template <class T>
class Buffer {
 public:
  T* reserve(int64_t count) {
    if (count > size_) {
      data_.reset(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)));
      size_ = count;
    }
    return data_.get();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

// Strides that keep rows out of each other's way in the caches, whose sets repeat every 4 KiB.
inline int64_t padded_stride(int64_t count) { return (count + 15) / 16 * 16 + 16; }

inline int64_t grain_of(int64_t count, int threads) { return std::max<int64_t>(1, std::min<int64_t>(4, count / (threads * 16))); }

// out = x * rsqrt(mean(x²) + eps) * weight (arXiv 1910.07467).
inline void rms_norm(const float* x, const float* weight, float eps, int64_t count, float* out) {
  Floats squares[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    squares[0] += load(x + i) * load(x + i);
    squares[1] += load(x + i + kLanes) * load(x + i + kLanes);
  }
  float total = sum(squares[0] + squares[1]);
  for (; i < count; ++i) total += x[i] * x[i];
  float factor = 1.0f / std::sqrt(total / count + eps);
  for (int64_t j = 0; j < count; ++j) out[j] = x[j] * factor * weight[j];
}

constexpr int64_t kFewRows = 4;  // that each thread prepares for itself, rather than wait for another

// What is to be multiplied with weights; x: [count, stride].
struct Input {
  const float* x;
  int64_t count, width, stride;
  const float* norm;  // [width] or null
  float eps;
};

// The rows as the weights' products want them: normalised where there is a norm, 16-bit for int8 weights, 8-bit for packed
// ones, and as long as whole units are, or in tiles.
class InputRoom {
 public:
  void reserve(int64_t count, int64_t width) {
    values_.reserve(count * padded_stride(width));
    shorts_.reserve(count * padded_stride(width));
    int64_t groups = num_groups(width) | 1;
    scales_.reserve(count * groups);
    bytes_.reserve(count * groups * kGroup);
    totals_.reserve(count * groups * 3);
    if (uses_tiles(count, width, Type::kBFloat16)) tiles_.reserve(tiles_size(count, width, Type::kBFloat16));
  }

  // each(f) calls f for each row; `reserve` was called before.
  template <class Each>
  Rows prepare(const Input& in, const Linear& w, Each&& each) {
    return w.parts.empty() ? plain(in, w.type, each) : packed(in, w.columns, each);
  }

 private:
  template <class Each>
  Rows packed(const Input& in, const int64_t* columns, Each&& each) {
    int64_t groups = num_groups(in.width), stride = groups | 1, totals = in.count * stride * 2;
    Rows rows{in.count};
    rows.bytes = {bytes_.get(), scales_.get(), totals_.get(), totals_.get() + totals, groups, stride};
    each([&](int64_t r) {
      const float* row = in.x + r * in.stride;
      float* copy = values_.get() + r * padded_stride(in.width);
      if (in.norm != nullptr) rms_norm(row, in.norm, in.eps, in.width, copy), row = copy;
      int64_t at = r * stride;
      ByteRow to{bytes_.get() + at * kGroup, scales_.get() + at, totals_.get() + 2 * at, totals_.get() + totals + at};
      to.fill(row, in.width, columns);
    });
    return rows;
  }

  template <class Each>
  Rows plain(const Input& in, Type type, Each&& each) {
    int64_t stride = padded_stride(in.width);
    bool is_short = type == Type::kInt8, is_copied = in.norm != nullptr || (!is_short && in.width % depth_of(type) != 0);
    char* tiles = uses_tiles(in.count, in.width, type) ? tiles_.get() : nullptr;
    Rows rows{in.count, in.x, in.stride, shorts_.get(), stride, scales_.get(), tiles};
    if (is_copied) rows.values = values_.get(), rows.stride = stride;
    if (!is_copied && !is_short && tiles == nullptr) return rows;
    each([&](int64_t r) {
      const float* row = in.x + r * in.stride;
      float* copy = values_.get() + r * stride;
      if (in.norm != nullptr)
        rms_norm(row, in.norm, in.eps, in.width, copy);
      else if (is_copied)
        std::copy(row, row + in.width, copy);
      if (is_copied) copy[in.width] = 0;
      if (is_copied) row = copy;
      if (is_short) scales_.get()[r] = to_shorts(row, in.width, shorts_.get() + r * stride);
      if (tiles != nullptr && is_short) tile_row(shorts_.get() + r * stride, r, in.width, tiles);
      if (tiles != nullptr && !is_short) tile_row(row, r, in.width, tiles);
    });
    return rows;
  }

  Buffer<float> values_, scales_, totals_;
  Buffer<int16_t> shorts_;
  Buffer<int8_t> bytes_;
  Buffer<char> tiles_;
};

// A pool, the room that each of its threads has for itself, and that which they share.
class Workers {
 public:
  explicit Workers(int threads) : pool(threads), sums_(threads), rooms_(threads), few_rows_(threads) {}

  float* sums(int thread, int64_t count) { return sums_[thread].reserve(count); }
  float* room(int thread, int64_t count) { return rooms_[thread].reserve(count); }

  // Room for what `prepare` returns.
  void reserve_rows(int64_t count, int64_t width) {
    if (count > kFewRows) rows_.reserve(count, width);
    for (auto& few : few_rows_) few.reserve(std::min(count, kFewRows), width);
  }

  // All threads call it, with more than a few rows.
  Rows prepare(const Input& in, const Linear& w) {
    return rows_.prepare(in, w, [&](auto&& f) { pool.share(in.count, 4, f); });
  }
  // One thread's own.
  Rows prepare_few(int thread, const Input& in, const Linear& w) {
    return few_rows_[thread].prepare(in, w, [&](auto&& f) {
      for (int64_t r = 0; r < in.count; ++r) f(r);
    });
  }

  Pool pool;

 private:
  std::vector<Buffer<float>> sums_, rooms_;
  InputRoom rows_;
  std::vector<InputRoom> few_rows_;
};

// Which rows a product is for, where some want few of its features: the first counts[p] of panel p. Row r goes to row places[r].
struct PanelRows {
  const int32_t* counts = nullptr;  // null: all
  const int32_t* places = nullptr;  // null: its own

  int64_t most(int64_t first, int64_t panels, int64_t rows) const {
    return counts == nullptr ? rows : *std::max_element(counts + first, counts + first + panels);
  }
};

// sums: [rows, kPanel] of a panel's output features → out: [rows, stride]. places: of PanelRows, from the first of these rows on.
inline void write_panel(const float* sums, int64_t rows, PanelRange range, const Linear& w, Into into, float* out, int64_t stride,
                        const int32_t* places) {
  auto [first, width] = range;
  for (int64_t r = 0; r < rows; ++r) {
    float* to = out + (places == nullptr ? r : places[r]) * stride + first;
    const float* from = sums + r * kPanel;
    if (width == kPanel) {
      for (int h = 0; h < kPanel; h += kLanes) {
        Floats value = load(from + h);
        if (w.bias != nullptr) value += load(w.bias + first + h);
        store(to + h, into == Into::kAdd ? load(to + h) + value : value);
      }
      continue;
    }
    for (int64_t j = 0; j < width; ++j) {
      float value = w.bias == nullptr ? from[j] : from[j] + w.bias[first + j];
      to[j] = into == Into::kAdd ? to[j] + value : value;
    }
  }
}

inline void write_gated(const float* gates, const float* ups, int64_t rows, PanelRange range, const Linear& w, Into activation,
                        float* out, int64_t stride) {
  alignas(64) float biases[2][kPanel] = {};
  auto [first, width] = range;
  for (int64_t j = 0; w.bias != nullptr && j < width; ++j)
    biases[0][j] = w.bias[first + j], biases[1][j] = w.bias[w.part() + first + j];
  for (int64_t r = 0; r < rows; ++r) {
    alignas(64) float result[kPanel];
    for (int h = 0; h < kPanel; h += kLanes) {
      Floats gate = load(gates + r * kPanel + h) + load(biases[0] + h), up = load(ups + r * kPanel + h) + load(biases[1] + h);
      store(result + h, activation == Into::kGelu ? gelu_gated(gate, up) : gated(gate, up));
    }
    std::copy(result, result + width, out + r * stride + first);
  }
}

// out (+)= rows * wᵀ + bias, or of a pair activation(gate) * up. A thread prepares a few rows when it has its first item:
// with that in hand, nobody goes on and changes them. chosen: not of a pair.
inline void linear(Workers& workers, int thread, const Linear& w, const Input& in, Into into, float* out, int64_t stride,
                   const PanelRows& chosen = {}) {
  bool is_ready = in.count > kFewRows, is_gated = into == Into::kSilu || into == Into::kGelu;
  Rows x{in.count};
  if (is_ready) x = workers.prepare(in, w);
  bool is_tiled = x.tiles != nullptr;
  int64_t block = is_tiled ? tile_block(w) : std::max<int64_t>(1, x.count), blocks = (x.count + block - 1) / block;
  int64_t panels = num_panels(w), size = block * kPanel * (is_tiled ? 2 : 1);
  int64_t together = std::max(streams_of(x.count), is_gated ? 2 : 1), groups = (panels + together - 1) / together;
  float* sums = workers.sums(thread, together * size);
  TileUse use(is_tiled);
  workers.pool.share(blocks * groups, grain_of(blocks * groups, workers.pool.size()), [&](int64_t item) {
    int64_t first = item % groups * together, count = std::min(together, panels - first), row = item / groups * block;
    int64_t wanted = chosen.most(first, count, in.count) - row;
    if (wanted <= 0) return;
    if (!is_ready) x = workers.prepare_few(thread, in, w), is_ready = true;
    Rows rows = is_tiled ? tile_rows(w, x, row) : x;
    rows.count = std::min(rows.count, wanted);
    if (is_tiled)
      tile_products(w, first, count, rows, sums, size);
    else if (!w.parts.empty())
      packed_products(w, first, count, rows.bytes, rows.count, sums);
    else
      panel_products(w, first, count, rows, sums);
    int64_t next = is_tiled ? size : rows.count * kPanel;
    const int32_t* places = chosen.places == nullptr ? nullptr : chosen.places + row;
    float* to = places == nullptr ? out + row * stride : out;
    for (int64_t p = 0; p < count; ++p) {
      if (!is_gated)
        write_panel(sums + p * next, rows.count, {w, first + p}, w, into, to, stride, places);
      else if (p % 2 == 0)
        write_gated(sums + p * next, sums + (p + 1) * next, rows.count, {w, first + p}, w, into, to, stride);
    }
  });
}

// Rows of a packed table: ids outside [first, first + table.out) give zeros. out: [count, stride].
inline void embed(Workers& workers, const Linear& table, const int64_t* ids, int64_t count, int64_t first, float* out,
                  int64_t stride) {
  workers.pool.share(count, 8, [&](int64_t r) {
    int64_t id = ids[r] - first, in = table.in;
    float* to = out + r * stride;
    if (id < 0 || id >= table.out) {
      std::fill(to, to + in, 0.0f);
      return;
    }
    for (const Part& part : table.parts)
      if (id >= part.first && id < part.first + part.out) return unpack_row(part, id - part.first, in, table.columns, to);
    const char* from = static_cast<const char*>(table.data) + id / kPanel * panel_bytes(table) + id % kPanel * 4;
    for (int64_t i = 0; i < in; ++i) {
      if (table.type == Type::kFloat32)
        to[i] = load_as<float>(from + i * kUnitBytes);
      else if (table.type == Type::kBFloat16)
        to[i] = widen(load_as<BFloat16>(from + i / 2 * kUnitBytes + i % 2 * 2));
      else if (table.type == Type::kFloat16)
        to[i] = widen(load_as<Float16>(from + i / 2 * kUnitBytes + i % 2 * 2));
      else
        to[i] = load_as<int8_t>(from + i / 4 * kUnitBytes + kQuad[i % 4]) * table.scale[id];
    }
  });
}

// Of one token's queries and keys.
inline void norm_heads(float* x, const HeadNorm& norm, float eps, const Heads& heads) {
  int64_t queries = heads.num_q * heads.dim, keys = heads.num_kv * heads.dim;
  if (norm.is_wide) {
    rms_norm(x, norm.weight, eps, queries, x);
    rms_norm(x + queries, norm.weight + queries, eps, keys, x + queries);
    return;
  }
  for (int64_t i = 0; i < queries + keys; i += heads.dim) rms_norm(x + i, norm.weight + i, eps, heads.dim, x + i);
}

// Norms of heads (where there are weights), rotation of pairs (i, i + dim / 2),
// and keys and values to their slots. qkv: [tokens, stride], queries in place. positions: null where token t is at row t of
// the rotation.
template <class T>
void norm_rope_store(Workers& workers, float* qkv, int64_t tokens, int64_t stride, const HeadNorm& norm, float eps,
                     const Rotation& rotation, const int64_t* positions, const int64_t* slots, const Heads& heads, Cache<T> cache) {
  int64_t dim = heads.dim, half = dim / 2;
  workers.pool.share(tokens, 2, [&](int64_t t) {
    int64_t row = (positions == nullptr ? t : positions[t]) * dim;
    const float* cosine = rotation.cosines + row;
    const float* sine = rotation.sines + row;
    if (norm.weight != nullptr) norm_heads(qkv + t * stride, norm, eps, heads);
    for (int64_t h = 0; h < heads.num_q + heads.num_kv; ++h) {
      float* x = qkv + t * stride + h * dim;
      int64_t i = 0;
      for (; i + kLanes <= half; i += kLanes) {
        Floats low = load(x + i), high = load(x + i + half);
        store(x + i, low * load(cosine + i) + high * load(sine + i));
        store(x + i + half, high * load(cosine + i + half) + low * load(sine + i + half));
      }
      for (; i < half; ++i) {
        float low = x[i], high = x[i + half];
        x[i] = low * cosine[i] + high * sine[i];
        x[i + half] = high * cosine[i + half] + low * sine[i + half];
      }
    }
    const float* k = qkv + t * stride + heads.num_q * dim;
    const float* v = k + heads.num_kv * dim;
    for (int64_t h = 0; h < heads.num_kv; ++h) {
      int64_t place = (slots[t] * heads.num_kv + h) * row_size<T>(dim);
      store_row(cache.k + place, k + h * dim, dim);
      store_row(cache.v + place, v + h * dim, dim);
    }
  });
}

// The pieces of one step's attention, and the partial results of split decodes.
struct AttentionPlan {
  std::vector<Piece> pieces;
  std::vector<std::pair<int32_t, int32_t>> split;  // pieces whose part is 0 and parts > 1, and one of their key/value heads
  int64_t num_partials = 0;
};

inline void plan_attention(const std::vector<Sequence>& sequences, const Heads& heads, int64_t window, int threads,
                           AttentionPlan& plan) {
  plan.pieces.clear();
  plan.split.clear();
  plan.num_partials = 0;
  int64_t decodes = 0, step = std::max<int64_t>(1, kQueryRows / heads.group());
  for (auto& s : sequences) decodes += s.count == 1;
  int64_t wanted = (2 * threads + decodes - 1) / std::max<int64_t>(1, decodes);  // pieces of each decode
  for (int32_t i = 0; i < int32_t(sequences.size()); ++i) {
    const Sequence& s = sequences[i];
    if (s.count > 1) {  // later tokens see more: the longest pieces first
      for (int64_t t = (s.count - 1) / step * step; t >= 0; t -= step)
        for (int32_t h = 0; h < heads.num_kv; ++h) plan.pieces.push_back({i, h, 1, 0, 0, s.first + t, 0});
      continue;
    }
    int64_t length = window ? std::min(window, s.start + 1) : s.start + 1;
    // Tokens are divided rather than heads: memory is faster from one end to the other, and cores may be far from each other.
    int64_t parts = std::clamp<int64_t>(length / kSplitTokens, 1, wanted);
    if (parts < wanted && 2 * parts >= wanted) parts = (wanted + 1) / 2;
    int64_t ranges = 2 * parts >= wanted ? 1 : std::min(heads.num_kv, (wanted + parts - 1) / parts);
    for (int64_t r = 0; r < ranges; ++r) {
      int32_t head = int32_t(heads.num_kv * r / ranges), size = int32_t(heads.num_kv * (r + 1) / ranges) - head;
      for (int32_t h = 0; parts > 1 && h < size; ++h) plan.split.emplace_back(int32_t(plan.pieces.size()), h);
      for (int32_t part = 0; part < parts; ++part) {
        plan.pieces.push_back({i, head, size, part, int32_t(parts), s.first, plan.num_partials});
        if (parts > 1) plan.num_partials += size * heads.group();
      }
    }
  }
}

struct PartialRoom {
  Buffer<float> results;
  Buffer<Partial> partials;

  void reserve(const AttentionPlan& plan, const Heads& heads) {
    partials.reserve(plan.num_partials);
    results.reserve(plan.num_partials * heads.dim);
  }
};

// q: [tokens, stride], rotated; out: [tokens, out_stride].
template <class T>
void attention(Workers& workers, int thread, const float* q, int64_t stride, const std::vector<Sequence>& sequences,
               const AttentionPlan& plan, const Heads& heads, int64_t window, const Scores& kind, Cache<T> cache, PartialRoom& partial,
               float* out, int64_t out_stride) {
  int64_t dim = heads.dim, group = heads.group();
  float scale = 1.0f / std::sqrt(float(dim));
  float* room = workers.room(thread, std::max(prefill_floats(heads), decode_floats(heads)));
  workers.pool.share(plan.pieces.size(), 1, [&](int64_t index) {
    const Piece& piece = plan.pieces[index];
    const Sequence& s = sequences[piece.sequence];
    int64_t head = piece.head * group, num_heads = piece.size * group;
    if (piece.parts == 0) {
      int64_t count = std::min(std::max<int64_t>(1, kQueryRows / group), s.first + s.count - piece.token);
      prefill(q + head * dim, stride, scale, cache, heads, piece.head, group, s, piece.token, count, window, kind,
              out + head * dim, out_stride, room);
      return;
    }
    float* queries = room;
    float* result = queries + num_heads * dim;
    float* scores = result + num_heads * dim;
    Partial* partials = reinterpret_cast<Partial*>(scores + num_heads * kBlock);
    const float* from = q + piece.token * stride + head * dim;
    for (int64_t i = 0; i < num_heads * dim; ++i) queries[i] = from[i] * scale;
    int64_t end = s.start + 1, begin = window ? std::max<int64_t>(0, end - window) : 0, length = end - begin;
    bool is_split = piece.parts > 1;
    if (is_split) partials = partial.partials.get() + piece.partial, result = partial.results.get() + piece.partial * dim;
    int64_t first = piece.head * row_size<T>(dim);
    decode(queries, cache.k + first, cache.v + first, piece.size, heads, s.pages,
           begin + length * piece.part / piece.parts, begin + length * (piece.part + 1) / piece.parts, kind.cap, result, partials, scores);
    if (is_split) return;
    float* to = out + piece.token * out_stride + head * dim;
    for (int64_t h = 0; h < num_heads; ++h) {
      float total = total_of(partials[h], kind, head + h);
      for (int64_t i = 0; i < dim; ++i) to[h * dim + i] = result[h * dim + i] / total;
    }
  });
  if (plan.split.empty()) return;
  workers.pool.share(plan.split.size(), 1, [&](int64_t index) {
    auto [first, part_head] = plan.split[index];
    const Piece& piece = plan.pieces[first];
    int64_t num_heads = piece.size * group;
    for (int64_t h = part_head * group; h < (part_head + 1) * group; ++h) {
      float* to = out + piece.token * out_stride + (piece.head * group + h) * dim;
      const Partial* partials = partial.partials.get() + piece.partial + h;
      const float* results = partial.results.get() + (piece.partial + h) * dim;
      float most = kNone, total = 0;
      for (int p = 0; p < piece.parts; ++p) most = std::max(most, partials[p * num_heads].most);
      std::fill(to, to + dim, 0.0f);
      for (int p = 0; p < piece.parts; ++p) {
        const Partial& one = partials[p * num_heads];
        float factor = std::exp(one.most - most);
        total += one.total * factor;
        for (int64_t i = 0; i < dim; ++i) to[i] += results[p * num_heads * dim + i] * factor;
      }
      total = total_of({most, total}, kind, piece.head * group + h);
      for (int64_t i = 0; i < dim; ++i) to[i] /= total;
    }
  });
}

}  // namespace minisgl::cpu
