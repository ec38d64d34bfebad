// Drives the CPU kernels over odd shapes on several threads, for sanitizers (`make sanitize`): every buffer is exactly as
// long as it has to be. Results must not depend on the number of threads, and products are right to 4e-6 of the largest.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "minisgl/cpu/api.h"

using namespace minisgl::cpu;

namespace {

std::mt19937 generator(1);

std::vector<float> random(int64_t count, float scale = 1.0f) {
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (auto& value : values) value = normal(generator);
  return values;
}

void check(bool is_right, const char* what) {
  if (is_right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

void near(const std::vector<float>& a, const std::vector<float>& b, const char* what) {
  check(a.size() == b.size(), what);
  for (size_t i = 0; i < a.size(); ++i) check(std::fabs(a[i] - b[i]) <= 1e-3f * (1.0f + std::fabs(b[i])), what);
}

struct Weight {
  std::vector<char> data;
  std::vector<float> scales;
  Linear linear;

  Weight(Workers& workers, Type type, const std::vector<float>& plain, int64_t out, int64_t in, bool is_pair = false) {
    int64_t panel = panel_size(), part = is_pair ? out / 2 : out, panels = (part + panel - 1) / panel * (is_pair ? 2 : 1);
    int64_t depth = type == Type::kInt8 ? 4 : type == Type::kBFloat16 ? 2 : 1;
    data.resize(panels * ((in + depth - 1) / depth) * panel * 4);
    if (type == Type::kInt8) scales.resize(panels * panel);
    std::vector<BFloat16> narrow(plain.size());
    for (size_t i = 0; i < plain.size(); ++i) narrow[i].bits = uint16_t(std::bit_cast<uint32_t>(plain[i]) >> 16);
    const void* from = type == Type::kBFloat16 ? static_cast<const void*>(narrow.data()) : plain.data();
    pack_weight(workers, type == Type::kBFloat16 ? type : Type::kFloat32, from, out, in, is_pair, data.data(), scales.empty() ? nullptr : scales.data());
    linear = {type, is_pair, out, in, data.data(), scales.empty() ? nullptr : scales.data(), nullptr};
  }
};

struct Free {
  void operator()(Workers* workers) const { destroy_workers(workers); }
  void operator()(Model* model) const { destroy_model(model); }
};

void products(Type type, int threads) {
  std::unique_ptr<Workers, Free> workers(create_workers(threads)), alone(create_workers(1));
  for (auto [out, in] : {std::pair<int64_t, int64_t>{1, 1}, {7, 33}, {40, 515}, {97, 64}}) {
    Weight weight(*workers, type, random(out * in, 0.1f), out, in);
    std::vector<float> norm = random(in);
    for (int64_t rows : {1, 2, 3, 4, 6, 7, 13, 16, 65, 300}) {
      std::vector<float> x = random(rows * in), results[2];
      for (int i = 0; i < 2; ++i) {
        results[i].resize(rows * out);
        Workers& used = i == 0 ? *workers : *alone;
        linear_rows(used, weight.linear, x.data(), rows, in, rows % 2 ? norm.data() : nullptr, 1e-6f, Into::kStore, results[i].data(), out);
      }
      near(results[0], results[1], "product");
    }
  }
}

// Rows of any bits, of which only the 16-bit scales are small numbers: two formats in one weight, or in a pair.
struct PackedWeight {
  std::vector<std::vector<uint8_t>> rows;
  std::vector<std::unique_ptr<char[]>> data;
  Linear linear;

  PackedWeight(Workers& workers, std::vector<std::pair<const char*, int64_t>> kinds, int64_t out, int64_t in, bool is_pair)
      : linear{Type::kPacked, is_pair, int64_t(kinds.size()) * out, in} {
    for (auto [name, bytes] : kinds) {
      Format format = format_of(name, in, 0, false, false);
      int64_t size = in / (format.span * 32) * bytes, first = int64_t(rows.size()) * out;
      rows.emplace_back(out * size);
      for (auto& byte : rows.back()) byte = uint8_t(generator() % 60);
      data.emplace_back(new char[packed_bytes(format, out, in)]);
      pack_blocks(workers, name, rows.back().data(), size, out, in, nullptr, data.back().get());
      linear.parts.push_back({format, first, out, data.back().get()});
    }
  }
};

void packed_products(int threads) {
  std::unique_ptr<Workers, Free> workers(create_workers(threads)), alone(create_workers(1));
  std::vector<std::vector<std::pair<const char*, int64_t>>> weights = {
      {{"Q4_0", 18}, {"Q4_1", 20}}, {{"Q5_0", 22}, {"Q5_1", 24}}, {{"Q8_0", 34}, {"IQ4_NL", 18}}, {{"Q2_K", 84}, {"Q3_K", 110}},
      {{"Q4_K", 144}, {"Q6_K", 210}}, {{"Q5_K", 176}, {"IQ4_XS", 136}}, {{"MXFP4", 17}, {"Q8_0", 34}}};
  for (auto& kinds : weights)
    for (bool is_pair : {false, true}) {
      const int64_t out = 37, in = 768, width = is_pair ? out : 2 * out;
      PackedWeight weight(*workers, kinds, out, in, is_pair);
      for (int64_t rows : {1, 2, 13, 65}) {
        std::vector<float> x = random(rows * in), results[2], row(in), norm = random(in);
        for (int i = 0; i < 2; ++i) {
          results[i].resize(rows * width);
          linear_rows(i == 0 ? *workers : *alone, weight.linear, x.data(), rows, in, rows % 2 ? norm.data() : nullptr, 1e-6f,
                      is_pair ? Into::kSilu : Into::kStore, results[i].data(), width);
        }
        near(results[0], results[1], "product of packed weights");
        int64_t id = 2 * out - 1;
        embed_ids(*workers, weight.linear, &id, 1, 0, row.data());
      }
    }
}

// What is left of a weight in memory.
std::vector<double> as_stored(Type type, const std::vector<float>& plain, int64_t in) {
  std::vector<double> stored(plain.begin(), plain.end());
  for (size_t i = 0; i < plain.size(); ++i) {
    if (type == Type::kBFloat16) stored[i] = std::bit_cast<float>(std::bit_cast<uint32_t>(plain[i]) & 0xffff0000u);
    if (type != Type::kInt8) continue;
    auto row = plain.begin() + int64_t(i) / in * in;
    float most = std::fabs(*std::max_element(row, row + in, [](float a, float b) { return std::fabs(a) < std::fabs(b); }));
    stored[i] = double(std::lrintf(plain[i] * (127.0f / most))) * (most / 127.0f);
  }
  return stored;
}

// Rows of whole numbers are exact in 16 bits too: what is left are the roundings of sums.
void precision(Type type) {
  std::unique_ptr<Workers, Free> workers(create_workers(2));
  double worst = 0;
  for (auto [out, in] : {std::pair<int64_t, int64_t>{40, 515}, {97, 64}, {66, 1056}, {32, 4096}}) {
    std::vector<float> plain = random(out * in, 0.1f);
    std::vector<double> stored = as_stored(type, plain, in);
    Weight weight(*workers, type, plain, out, in);
    for (int64_t rows : {7, 8, 15, 16, 17, 31, 32, 33, 64, 100, 300}) {
      std::vector<float> x = random(rows * in, 8000.0f), result(rows * out);
      for (auto& value : x) value = type == Type::kInt8 ? std::clamp(std::round(value), -32767.0f, 32767.0f) : value;
      for (int64_t r = 0; r < rows; ++r) x[r * in] = 32767.0f;
      linear_rows(*workers, weight.linear, x.data(), rows, in, nullptr, 0, Into::kStore, result.data(), out);
      double most = 0, error = 0;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < out; ++j) {
          double expected = 0;
          for (int64_t i = 0; i < in; ++i) expected += double(x[r * in + i]) * stored[j * in + i];
          most = std::max(most, std::fabs(expected));
          error = std::max(error, std::fabs(result[r * out + j] - expected));
        }
      worst = std::max(worst, error / most);
      check(error < 4e-6 * most, "precision of a product");
    }
  }
  std::printf("products of type %d: off by no more than %.1e of the largest\n", int(type), worst);
}

// Gated delta nets of odd sizes: sequences of several lengths that go on.
std::vector<float> delta_nets(int threads) {
  generator.seed(3);
  std::unique_ptr<Workers, Free> workers(create_workers(threads));
  std::vector<float> all;
  for (auto [num_k, num_v, dim_k, dim_v] : {std::array<int64_t, 4>{2, 4, 32, 64}, {1, 3, 33, 17}, {3, 3, 3, 1}}) {
    DeltaNet net{num_k, num_v, dim_k, dim_v, 4, nullptr, nullptr, nullptr, nullptr, 1e-6f};
    const int64_t values = num_v * dim_v, features = net.channels() + values, num_slots = 4;
    std::vector<float> conv = random(net.channels() * net.width), a_log = random(num_v), dt_bias = random(num_v), norm = random(dim_v);
    net.conv = conv.data(), net.a_log = a_log.data(), net.dt_bias = dt_bias.data(), net.norm = norm.data();
    std::vector<float> past = random(num_slots * net.channels() * (net.width - 1)), memory = random(num_slots * values * dim_k, 0.1f);
    for (auto& counts : {std::vector<int64_t>{65, 1, 9}, {1, 1, 1}, {2, 8, 1}}) {
      std::vector<StateSequence> sequences;
      int64_t tokens = 0;
      for (int64_t count : counts) sequences.push_back({num_slots - 1 - int64_t(sequences.size()), tokens, count}), tokens += count;
      std::vector<float> qkvz = random(tokens * features), ba = random(tokens * 2 * num_v), out(tokens * values);
      delta_net(*workers, net, {qkvz.data(), features, ba.data(), 2 * num_v}, sequences, {past.data(), memory.data()}, out.data());
      all.insert(all.end(), out.begin(), out.end());
    }
    all.insert(all.end(), memory.begin(), memory.end());
  }
  return all;
}

constexpr int64_t kQueries = 6, kKeys = 2, kDim = 24, kHidden = 44, kInner = 52, kWords = 77, kPage = 4, kPages = 200;

// Attention with what it may have beside it, and gated delta nets, each with an MLP; and their caches.
struct TinyModel {
  std::unique_ptr<Workers, Free> workers;
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<float> norm = std::vector<float>(kHidden, 1.0f), head_norm = std::vector<float>((kQueries + kKeys) * kDim, 1.0f);
  std::vector<float> cosines = random(256 * kDim), sines = random(256 * kDim), sinks = random(kQueries), vectors = random(97 * 4);
  std::vector<std::vector<char>> caches;
  std::vector<float> past = std::vector<float>(3 * 97 * 3), memory = std::vector<float>(3 * 3 * 9 * 17);
  std::unique_ptr<Model, Free> model;
  Type type;

  TinyModel(Type kind, bool is_narrow_cache, int threads) : workers(create_workers(threads)), type(kind) {
    Linear table = weight(kWords, kHidden);
    model.reset(create_model(*workers, 1e-6f, 1.5f, table, table, norm.data()));
    set_rotation(*model, 0, {cosines.data(), sines.data()});
    set_rotation(*model, 1, {sines.data(), cosines.data()});
    add_attention({head_norm.data(), false}, is_narrow_cache, nullptr, 0, false);
    DeltaNet net{1, 3, 9, 17, 4, vectors.data(), sinks.data(), sinks.data() + 3, vectors.data(), 1e-6f};
    Linear qkvz = weight(2 * 9 + 6 * 17, kHidden), ba = weight(6, kHidden), out = weight(kHidden, 3 * 17);
    add_block(*model, DeltaBlock{qkvz, ba, out, norm.data(), nullptr, net, {past.data(), memory.data()}});
    add_mlp(norm.data(), Into::kSilu);
    add_attention({head_norm.data(), true}, is_narrow_cache, norm.data(), 9, true);
    add_mlp(nullptr, Into::kGelu);
  }

  Linear weight(int64_t out, int64_t in, bool is_pair = false) {
    std::vector<float> values = random(out * in, 1.0f / std::sqrt(float(in)));
    weights.push_back(std::make_unique<Weight>(*workers, type, values, out, in, is_pair));
    return weights.back()->linear;
  }

  void add_attention(HeadNorm heads, bool is_narrow_cache, const float* after, int64_t window, bool has_gates) {
    int64_t queries = kQueries * kDim, bytes = kPages * kPage * kKeys * kDim * (is_narrow_cache ? 2 : 4);
    Linear qkv = weight(queries * (1 + has_gates) + 2 * kKeys * kDim, kHidden), o = weight(kHidden, queries);
    for (int i = 0; i < 2; ++i) caches.emplace_back(bytes);
    CacheType kind = is_narrow_cache ? CacheType::kBFloat16 : CacheType::kFloat32;
    AnyCache cache{kind, caches[caches.size() - 2].data(), caches.back().data(), bytes};
    Scores scores{window == 0 ? 0.0f : 20.0f, window == 0 ? nullptr : sinks.data()};
    add_block(*model, AttentionBlock{qkv, o, norm.data(), after, heads, {kQueries, kKeys, kDim, 1}, cache, window, window != 0, scores, has_gates});
  }

  void add_mlp(const float* after, Into activation) {
    Linear gate_up = weight(2 * kInner, kHidden, true), down = weight(kHidden, kInner);
    add_block(*model, MlpBlock{gate_up, down, norm.data(), after, activation});
  }
};

// Sequences that start, go on and end at different times. Of every second row's logits the first and the last few, which masks
// allow, if these are told: `uses_masks`.
std::vector<float> steps(Type type, bool is_narrow_cache, int threads, bool uses_masks) {
  generator.seed(2);
  TinyModel tiny(type, is_narrow_cache, threads);
  std::vector<float> all;
  std::vector<std::vector<int32_t>> pages(3);
  for (int32_t s = 0; s < 3; ++s)
    for (int32_t p = 0; p < 60; ++p) pages[s].push_back(s + 3 * p);
  std::vector<int64_t> lengths(3, 0);
  for (auto counts : {std::vector<int64_t>{5, 0, 0}, {1, 130, 0}, {1, 1, 3}, {1, 1, 1}, {1, 1, 1}, {0, 1, 1}}) {
    std::vector<int64_t> ids, positions, slots, last;
    Step step{};
    for (int s = 0; s < 3; ++s) {
      if (counts[s] == 0) continue;
      step.all.sequences.push_back({int64_t(ids.size()), counts[s], lengths[s], pages[s].data(), s});
      for (int64_t i = 0; i < counts[s]; ++i, ++lengths[s]) {
        ids.push_back((7 * lengths[s] + s) % kWords);
        positions.push_back(lengths[s]);
        slots.push_back(pages[s][lengths[s] / kPage] * kPage + lengths[s] % kPage);
      }
      last.push_back(int64_t(ids.size()) - 1);
    }
    std::vector<float> logits(last.size() * kWords);
    step.num_tokens = int64_t(ids.size()), step.num_logits = int64_t(last.size());
    step.ids = ids.data(), step.positions = positions.data(), step.all.slots = slots.data(), step.logit_tokens = last.data();
    step.windowed = step.all;
    step.page_size = kPage, step.logits = logits.data();
    int64_t num_masks = (step.num_logits + 1) / 2;
    std::vector<uint32_t> words;
    std::vector<int32_t> states(num_masks, kMaskReady);
    std::vector<int64_t> samples;
    for (int64_t i = 0; i < num_masks; ++i) words.insert(words.end(), {5, 0, 1u << (kWords % 32 - 1)}), samples.push_back(2 * i);
    if (uses_masks) step.masks = {num_masks, 3, words.data(), states.data(), samples.data()};
    forward(*tiny.model, step);
    for (int64_t r = 0; r < step.num_logits; r += 2)
      for (int64_t i = 0; i < kWords; ++i)
        if (i != 0 && i != 2 && i != kWords - 1) logits[r * kWords + i] = 0;
    all.insert(all.end(), logits.begin(), logits.end());
    std::vector<minisgl::SamplingParams> params(last.size(), {11, 3, 0.7f, 0.9f, 0.01f, 30});
    std::vector<int32_t> sampled(last.size());
    sample_rows(*tiny.workers, logits.data(), int64_t(last.size()), kWords, kWords, params.data(), {}, sampled.data());
    for (int64_t id : sampled) check(id >= 0 && id < kWords, "a sampled id");
  }
  return all;
}

}  // namespace

int main() {
  for (int threads : {2, 5}) packed_products(threads);
  std::vector<float> nets = delta_nets(1);
  for (int threads : {2, 5}) near(delta_nets(threads), nets, "gated delta net");
  for (Type type : {Type::kFloat32, Type::kBFloat16, Type::kInt8}) {
    for (int threads : {2, 5}) products(type, threads);
    precision(type);
    for (bool is_narrow : {false, true}) {
      std::vector<float> alone = steps(type, is_narrow, 1, false);
      for (int threads : {2, 5})
        for (int turn = 0; turn < 3; ++turn) near(steps(type, is_narrow, threads, turn > 0), alone, "logits of a step");
    }
  }
  std::puts("CPU kernels: clean");
}
