// The gated delta rule (S. Yang et al., arXiv 2412.06464) with all that surrounds it in a layer: a causal convolution of
// each channel before it, a norm with a gate after it.
//
// A few tokens are computed together, by the form of section 3.3 of that paper: a head's memory is read once for all
// their keys and queries, and written once. Longer chunks would need no less arithmetic where there are no units for
// products of matrices: what they save in updates they spend on products of their own tokens.
#pragma once

#include "ops.h"

namespace minisgl::cpu {

constexpr int kTogether = kLanes == 8 ? 4 : 8;  // tokens: their products with two vectors of a memory fit the registers
constexpr int kWide = kLanes == 8 ? 4 : 8;      // vectors of a memory's row that one token takes at a time

inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

// What a key head's tokens share, and one of its value heads then adds to. Of tokens i and j of a chunk, keys[i][j] and
// queries[i][j] are the products of what is i's with j's key; of a value head, `pull` says how much of j's change token
// i takes off its own, `mix` how much goes to its output, `start` what is left of the memory of before, and `end` what is
// left of token i's change after the chunk.
template <int T>
struct DeltaChunk {
  float keys[T][T], queries[T][T];
  float beta[T], start[T], end[T], pull[T][T], mix[T][T];

  // rows: [T, stride], queries, then keys from `key` on.
  void multiply(const float* rows, int64_t stride, int64_t key, int64_t dim) {
    for (int i = 0; i < T; ++i)
      for (int j = 0; j <= i; ++j) {
        const float* with = rows + j * stride + key;
        queries[i][j] = dot(rows + i * stride, with, dim);
        if (T > 1) keys[i][j] = dot(rows + i * stride + key, with, dim);
      }
  }

  // decay: of the memory at each token; beta is already known.
  void weigh(const float* decay) {
    float left[T];  // of token j's change, at token i
    float kept = 1.0f;
    for (int i = 0; i < T; ++i) {
      kept *= decay[i];
      start[i] = kept;
      for (int j = 0; j < i; ++j) {
        left[j] *= decay[i];
        pull[i][j] = beta[i] * left[j] * keys[i][j];
        mix[i][j] = left[j] * queries[i][j];
      }
      left[i] = 1.0f;
      mix[i][i] = queries[i][i];
    }
    for (int i = 0; i < T; ++i) end[i] = left[i];
  }
};

// products[m] = rows[m] * memory, for V vectors of its columns. rows: [M, row_stride], memory: [dim, stride].
template <int M, int V>
[[gnu::noinline]] void read_memory(const float* rows, int64_t row_stride, const float* memory, int64_t stride, int64_t dim,
                                   float (*products)[V * kLanes]) {
  Floats sums[M][V] = {};
  for (int64_t k = 0; k < dim; ++k) {
    Floats values[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) values[v] = load(memory + k * stride + v * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Floats x = broadcast(rows[m * row_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[m][v] += x * values[v];
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < V; ++v) store(products[m] + v * kLanes, sums[m][v]);
}

// memory = kept * memory + keysᵀ * changes. keys: [T, key_stride].
template <int T, int V>
[[gnu::noinline]] void write_memory(const float* keys, int64_t key_stride, const float (*changes)[V * kLanes], float kept, int64_t dim,
                                    float* memory, int64_t stride) {
  Floats parts[T][V];
  for (int t = 0; t < T; ++t)
    for (int v = 0; v < V; ++v) parts[t][v] = load(changes[t] + v * kLanes);
  for (int64_t k = 0; k < dim; ++k) {
    float* row = memory + k * stride;
    Floats values[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) values[v] = load(row + v * kLanes) * kept;
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      Floats key = broadcast(keys[t * key_stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) values[v] += key * parts[t][v];
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(row + v * kLanes, values[v]);
  }
}

// Rows of queries, keys and values of a chunk: [T, stride], each beginning where it says, in whole vectors.
struct DeltaRows {
  float* data;
  int64_t stride, key, value;
};

// T tokens and V vectors of columns of a value head: its memory's and outputs' from their first on. out: [T, out_stride].
template <int T, int V>
inline void delta_columns(const DeltaChunk<T>& chunk, const DeltaRows& rows, int64_t dim, float* memory, int64_t stride, float* out,
                          int64_t out_stride) {
  alignas(64) float products[2 * T][V * kLanes];  // of queries, then of keys
  if constexpr (T == 1) {
    const float* both = rows.data;
    read_memory<2, V>(both, rows.key, memory, stride, dim, products);
  } else {
    read_memory<T, V>(rows.data, rows.stride, memory, stride, dim, products);
    read_memory<T, V>(rows.data + rows.key, rows.stride, memory, stride, dim, products + T);
  }
  for (int i = 0; i < T; ++i)
    for (int c = 0; c < V * kLanes; c += kLanes) {
      Floats value = load(rows.data + i * rows.stride + rows.value + c);
      Floats change = (value - load(products[T + i] + c) * chunk.start[i]) * chunk.beta[i];
      Floats result = load(products[i] + c) * chunk.start[i];
      for (int j = 0; j < i; ++j) {
        change -= load(products[T + j] + c) * chunk.pull[i][j];
        result += load(products[T + j] + c) * chunk.mix[i][j];
      }
      store(products[T + i] + c, change);  // takes the place of what its key has read
      store(out + i * out_stride + c, result + change * chunk.mix[i][i]);
    }
  for (int i = 0; i < T - 1; ++i)
    for (int c = 0; c < V * kLanes; c += kLanes) store(products[T + i] + c, load(products[T + i] + c) * chunk.end[i]);
  write_memory<T, V>(rows.data + rows.key, rows.stride, products + T, chunk.start[T - 1], dim, memory, stride);
}

// All columns, as many at a time as the registers hold. size: in whole vectors.
template <int T, int V = T == 1 ? kWide : 2>
inline void delta_rule(const DeltaChunk<T>& chunk, DeltaRows rows, int64_t dim, int64_t size, float* memory, int64_t stride, float* out,
                       int64_t out_stride) {
  int64_t c = 0;
  for (; c + V * kLanes <= size; c += V * kLanes, rows.value += V * kLanes)
    delta_columns<T, V>(chunk, rows, dim, memory + c, stride, out + c, out_stride);
  if constexpr (V > 1)
    if (c < size) delta_rule<T, V / 2>(chunk, rows, dim, size - c, memory + c, stride, out + c, out_stride);
}

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }
inline float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

// One key head with its value heads, of one sequence: what a thread does at a time.
class DeltaHead {
 public:
  // Floats of its room.
  static int64_t room(const DeltaNet& net) {
    int64_t size = row_size(net), value = whole_vectors(net.dim_v);
    return size * (2 * net.width - 1 + 2 * kTogether) + value * (2 * kTogether + 1) + net.dim_k * (value + net.group() * net.dim_v);
  }

  DeltaHead(const DeltaNet& net, int64_t head, float* room) : net_(net), head_(head), size_(row_size(net)) {
    int64_t value = whole_vectors(net.dim_v);
    taps_ = room;
    inputs_ = taps_ + net.width * size_;
    rows_ = {inputs_ + (net.width - 1 + kTogether) * size_, size_, whole_vectors(net.dim_k), 2 * whole_vectors(net.dim_k)};
    out_ = rows_.data + kTogether * size_;
    gate_ = out_ + kTogether * value;
    norm_ = gate_ + kTogether * value;
    memory_ = norm_ + value;
    copy_ = memory_ + net.dim_k * value;
    if (rows_.key != net.dim_k || value != net.dim_v) std::fill(room, memory_, 0.0f);
    std::copy(net.norm, net.norm + net.dim_v, norm_);
    for_segments([&](int64_t channel, int64_t count, int64_t at) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < net.width; ++j) taps_[j * size_ + at + i] = net.conv[(channel + i) * net.width + j];
    });
  }

  void run(const DeltaInput& in, const StateSequence& sequence, const DeltaState& state, float* out, int64_t out_stride) {
    int64_t before = net_.width - 1, size = net_.group() * net_.dim_k * net_.dim_v;
    float* past = state.conv + sequence.slot * net_.channels() * before;
    float* memory = state.memory + sequence.slot * net_.num_k * size + head_ * size;
    DeltaInput kept = net_.rows_of(state.kept + sequence.slot * state.longest * net_.features());
    for_segments([&](int64_t channel, int64_t count, int64_t at) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < before; ++j) inputs_[j * size_ + at + i] = past[(channel + i) * before + j];
    });
    run(kept, sequence.held, memory, nullptr, 0);
    int64_t tried = sequence.first + sequence.count - sequence.tried;
    run(in.from(sequence.first), tried - sequence.first, memory, out + sequence.first * out_stride, out_stride);
    for_segments([&](int64_t channel, int64_t count, int64_t at) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < before; ++j) past[(channel + i) * before + j] = inputs_[j * size_ + at + i];
    });
    if (sequence.tried == 0) return;
    std::copy(memory, memory + size, copy_);
    keep(in.from(tried), sequence.tried, const_cast<float*>(kept.qkvz));
    run(in.from(tried), sequence.tried, copy_, out + tried * out_stride, out_stride);
  }

 private:
  // So many tokens, one behind the other. memory: of the first value head; out: null where nobody wants it.
  void run(const DeltaInput& in, int64_t total, float* memory, float* out, int64_t out_stride) {
    for (int64_t first = 0; first < total; first += kTogether) {
      int64_t count = std::min<int64_t>(kTogether, total - first);
      DeltaInput tokens = in.from(first);
      convolve(tokens, count, std::min<int64_t>(kTogether, total - first - count));
      float* to = out == nullptr ? nullptr : out + first * out_stride;
      if (count == 1)
        rule<1>(tokens, count, memory, to, out_stride);
      else
        rule<kTogether>(tokens, count, memory, to, out_stride);
      std::copy(inputs_ + count * size_, inputs_ + (count + net_.width - 1) * size_, inputs_);
    }
  }

  // What this head is given of tokens, for a later step.
  void keep(const DeltaInput& in, int64_t count, float* kept) const {
    int64_t features = net_.features(), gates = features - 2 * net_.num_v, group = net_.group();
    for (int64_t t = 0; t < count; ++t, kept += features) {
      for_segments([&](int64_t channel, int64_t size, int64_t) {
        const float* from = in.qkvz + t * in.stride + channel;
        std::copy(from, from + size, kept + channel);
      });
      const float* ba = in.ba + t * in.ba_stride + head_ * group;
      std::copy(ba, ba + group, kept + gates + head_ * group);
      std::copy(ba + net_.num_v, ba + net_.num_v + group, kept + gates + net_.num_v + head_ * group);
    }
  }

  static int64_t row_size(const DeltaNet& net) { return 2 * whole_vectors(net.dim_k) + net.group() * whole_vectors(net.dim_v); }

  // f(first channel, number of channels, place in a row) for the query, the key and the values.
  template <class F>
  [[gnu::always_inline]] void for_segments(F&& f) const {
    int64_t keys = net_.num_k * net_.dim_k, key = whole_vectors(net_.dim_k), value = whole_vectors(net_.dim_v);
    f(head_ * net_.dim_k, net_.dim_k, 0);
    f(keys + head_ * net_.dim_k, net_.dim_k, key);
    for (int64_t g = 0; g < net_.group(); ++g) f(2 * keys + (head_ * net_.group() + g) * net_.dim_v, net_.dim_v, 2 * key + g * value);
  }

  // Queries, keys and values of `count` tokens, to rows; those of tokens that are not there become zeros. Meanwhile those of
  // the `later` tokens after them are fetched, which lie too far apart for a processor to foresee.
  void convolve(const DeltaInput& in, int64_t count, int64_t later) {
    float* now = inputs_ + (net_.width - 1) * size_;
    for (int64_t t = 0; t < count; ++t)
      for_segments([&](int64_t channel, int64_t size, int64_t at) {
        const float* from = in.qkvz + t * in.stride + channel;
        std::copy(from, from + size, now + t * size_ + at);
      });
    for (int64_t t = 0; t < count; ++t) {
      float* row = rows_.data + t * size_;
      if (t < later) fetch(in.from(count + t));
      for (int64_t i = 0; i < size_; i += kLanes) {
        Floats total{};
        for (int64_t j = 0; j < net_.width; ++j) total += load(taps_ + j * size_ + i) * load(inputs_ + (t + j) * size_ + i);
        store(row + i, gated(total, broadcast(1.0f)));
      }
      make_unit(row, 1.0f / std::sqrt(float(net_.dim_k)));
      make_unit(row + rows_.key, 1.0f);
    }
    if (count > 1) std::fill(rows_.data + count * size_, rows_.data + kTogether * size_, 0.0f);
  }

  [[gnu::always_inline]] void fetch(const DeltaInput& token) const {
    for_segments([&](int64_t channel, int64_t size, int64_t) __attribute__((always_inline)) {
      for (int64_t i = 0; i < size; i += 16) __builtin_prefetch(token.qkvz + channel + i);
    });
    const float* gates = token.qkvz + net_.channels() + head_ * net_.group() * net_.dim_v;
    for (int64_t i = 0; i < net_.group() * net_.dim_v; i += 16) __builtin_prefetch(gates + i);
  }

  void make_unit(float* x, float length) const {
    float factor = length / std::sqrt(dot(x, x, net_.dim_k) + 1e-6f);
    for (int64_t i = 0; i < rows_.key; i += kLanes) store(x + i, load(x + i) * factor);
  }

  // N tokens, of which `count` are there; memory: of the first value head.
  template <int N>
  void rule(const DeltaInput& in, int64_t count, float* memory, float* out, int64_t out_stride) {
    DeltaChunk<N> chunk;
    chunk.multiply(rows_.data, size_, rows_.key, rows_.key);
    DeltaRows rows = rows_;
    int64_t value = whole_vectors(net_.dim_v);
    for (int64_t g = 0; g < net_.group(); ++g, rows.value += value, memory += net_.dim_k * net_.dim_v) {
      int64_t head = head_ * net_.group() + g;
      float decay[N];
      for (int t = 0; t < N; ++t) {
        decay[t] = 1.0f, chunk.beta[t] = 0.0f;
        if (t >= count) continue;
        const float* b = in.ba + t * in.ba_stride + head;
        decay[t] = std::exp(-std::exp(net_.a_log[head]) * softplus(b[net_.num_v] + net_.dt_bias[head]));
        chunk.beta[t] = sigmoid(*b);
      }
      chunk.weigh(decay);
      if (value == net_.dim_v) {
        delta_rule(chunk, rows, net_.dim_k, value, memory, value, out_, value);
      } else {  // through rows of whole vectors
        copy_rows(memory, net_.dim_v, memory_, value);
        delta_rule(chunk, rows, net_.dim_k, value, memory_, value, out_, value);
        copy_rows(memory_, value, memory, net_.dim_v);
      }
      for (int64_t t = 0; t < count && out != nullptr; ++t) {
        const float* z = in.qkvz + t * in.stride + net_.channels() + head * net_.dim_v;
        write_gated_norm(out_ + t * value, z, out + t * out_stride + head * net_.dim_v);
      }
    }
  }

  void copy_rows(const float* from, int64_t from_stride, float* to, int64_t to_stride) const {
    for (int64_t k = 0; k < net_.dim_k; ++k)
      std::copy(from + k * from_stride, from + k * from_stride + net_.dim_v, to + k * to_stride);
  }

  // out = norm(x) * silu(z).
  void write_gated_norm(float* x, const float* z, float* out) {
    float factor = 1.0f / std::sqrt(dot(x, x, net_.dim_v) / float(net_.dim_v) + net_.eps);
    std::copy(z, z + net_.dim_v, gate_);
    for (int64_t i = 0; i < net_.dim_v; i += kLanes) store(x + i, gated(load(gate_ + i), load(x + i) * factor * load(norm_ + i)));
    std::copy(x, x + net_.dim_v, out);
  }

  const DeltaNet& net_;
  int64_t head_, size_;
  DeltaRows rows_;
  float *taps_, *inputs_, *out_, *gate_, *norm_, *memory_, *copy_;
};

// All tokens of the sequences → out: [tokens, num_v * dim_v] with `stride`; states are updated.
inline void gated_delta_net(Workers& workers, int thread, const DeltaNet& net, const DeltaInput& in,
                            const std::vector<StateSequence>& sequences, const DeltaState& state, float* out, int64_t stride) {
  float* room = workers.room(thread, DeltaHead::room(net));
  workers.pool.share(int64_t(sequences.size()) * net.num_k, 1, [&](int64_t item) {
    DeltaHead(net, item % net.num_k, room).run(in, sequences[item / net.num_k], state, out, stride);
  });
}

}  // namespace minisgl::cpu
