// A whole step of a dense decoder in one call: all layers, the logits of the tokens that sample, and their ids.
#pragma once

#include "ops.h"
#include "sample.h"

namespace minisgl::cpu {

struct Layer {
  Linear qkv, o, gate_up, down;
  const float *input_norm, *post_norm, *qk_norm;  // qk_norm: [num_q + num_kv, dim] or null
  int64_t window;                                 // 0: none
};

struct Step {
  int64_t num_tokens;
  const int64_t *ids, *positions, *slots;  // [num_tokens]
  std::vector<Sequence> sequences;
  int64_t page_size;
  const float* angles;          // [positions, 2, dim]
  const int64_t* logit_tokens;  // [num_logits], or null: all tokens
  int64_t num_logits;
  float* logits;  // [num_logits, vocab]
  const Sampling* sampling;  // of the logits' rows, or null
  int64_t* sampled;          // [num_logits]
};

class Model {
 public:
  Model(Workers& workers, Heads heads, float eps, bool bfloat16_cache) : workers_(workers), heads_(heads), eps_(eps), bfloat16_cache_(bfloat16_cache) {}

  std::vector<Layer> layers;
  Linear embedding{}, head{};
  const float* norm = nullptr;
  void *k_cache = nullptr, *v_cache = nullptr;  // [layers, slots, num_kv, dim]
  int64_t num_slots = 0;

  void forward(const Step& step) {
    reserve(step);
    workers_.pool.run([&](int thread) {
      if (step.num_tokens > 0) {
        embed(workers_, embedding, step.ids, step.num_tokens, 0, x_.get(), hidden_stride());
        for (size_t i = 0; i < layers.size(); ++i) {
          if (bfloat16_cache_)
            layer<BFloat16>(thread, step, i);
          else
            layer<float>(thread, step, i);
        }
      }
      logits(thread, step);
    });
  }

  // Logits of tokens of the last step, without another step.
  void more_logits(const int64_t* tokens, int64_t count, float* out) {
    Step step{};
    step.logit_tokens = tokens, step.num_logits = count, step.logits = out;
    reserve(step);
    workers_.pool.run([&](int thread) { logits(thread, step); });
  }

 private:
  int64_t hidden_stride() const { return padded_stride(embedding.in); }
  int64_t qkv_stride() const { return padded_stride((heads_.num_q + 2 * heads_.num_kv) * heads_.dim); }
  int64_t attended_stride() const { return padded_stride(heads_.num_q * heads_.dim); }
  int64_t inner_stride() const { return padded_stride(layers[0].gate_up.part()); }

  void reserve(const Step& step) {
    int64_t tokens = step.num_tokens, threads = workers_.pool.size();
    if (tokens > 0) {
      heads_.page_size = step.page_size;
      x_.reserve(tokens * hidden_stride());
      qkv_.reserve(tokens * qkv_stride());
      attended_.reserve(tokens * attended_stride());
      inner_.reserve(tokens * inner_stride());
      int64_t inner = layers[0].gate_up.part(), widest = std::max({embedding.in, heads_.num_q * heads_.dim, inner});
      input_.reserve(tokens, widest);
      plans_.clear();
      for (auto& one : layers) {
        if (plan_of(one.window) != nullptr) continue;
        plans_.emplace_back(one.window, AttentionPlan{});
        plan_attention(step.sequences, heads_, one.window, int(threads), plans_.back().second);
        int64_t partials = plans_.back().second.num_partials;
        partial_.partials.reserve(partials);
        partial_.results.reserve(partials * heads_.dim);
      }
    }
    last_.reserve(step.num_logits * hidden_stride());
    last_input_.reserve(step.num_logits, embedding.in);
    samplers_.resize(threads);
  }

  const AttentionPlan* plan_of(int64_t window) const {
    for (auto& [key, plan] : plans_)
      if (key == window) return &plan;
    return nullptr;
  }

  template <class T>
  void layer(int thread, const Step& step, size_t index) {
    const Layer& w = layers[index];
    int64_t tokens = step.num_tokens, size = num_slots * heads_.num_kv * heads_.dim;
    Cache<T> cache{static_cast<T*>(k_cache) + index * size, static_cast<T*>(v_cache) + index * size};
    Rows rows = input_.prepare(workers_, {x_.get(), tokens, embedding.in, hidden_stride(), w.input_norm, eps_}, w.qkv.type);
    linear(workers_, thread, w.qkv, rows, Into::kStore, qkv_.get(), qkv_stride());
    norm_rope_store(workers_, qkv_.get(), tokens, qkv_stride(), w.qk_norm, eps_, step.angles, step.positions, step.slots, heads_, cache);
    attention(workers_, thread, qkv_.get(), qkv_stride(), step.sequences, *plan_of(w.window), heads_, w.window, cache, partial_,
              attended_.get(), attended_stride());
    rows = input_.prepare(workers_, {attended_.get(), tokens, w.o.in, attended_stride(), nullptr, 0}, w.o.type);
    linear(workers_, thread, w.o, rows, Into::kAdd, x_.get(), hidden_stride());
    rows = input_.prepare(workers_, {x_.get(), tokens, embedding.in, hidden_stride(), w.post_norm, eps_}, w.gate_up.type);
    linear(workers_, thread, w.gate_up, rows, Into::kGated, inner_.get(), inner_stride());
    rows = input_.prepare(workers_, {inner_.get(), tokens, w.down.in, inner_stride(), nullptr, 0}, w.down.type);
    linear(workers_, thread, w.down, rows, Into::kAdd, x_.get(), hidden_stride());
  }

  void logits(int thread, const Step& step) {
    int64_t count = step.num_logits;
    if (count == 0) return;
    workers_.pool.share(count, 16, [&](int64_t r) {
      const float* from = x_.get() + (step.logit_tokens == nullptr ? r : step.logit_tokens[r]) * hidden_stride();
      std::copy(from, from + embedding.in, last_.get() + r * hidden_stride());
    });
    Rows rows = last_input_.prepare(workers_, {last_.get(), count, embedding.in, hidden_stride(), norm, eps_}, head.type);
    linear(workers_, thread, head, rows, Into::kStore, step.logits, head.out);
    if (step.sampling == nullptr) return;
    workers_.pool.share(count, 1, [&](int64_t r) {
      step.sampled[r] = samplers_[thread](step.logits + r * head.out, head.out, *step.sampling, r);
    });
  }

  Workers& workers_;
  Heads heads_;
  float eps_;
  bool bfloat16_cache_;
  Buffer<float> x_, qkv_, attended_, inner_, last_;
  InputRoom input_, last_input_;
  std::vector<std::pair<int64_t, AttentionPlan>> plans_;
  PartialRoom partial_;
  std::vector<Sampler> samplers_;
};

}  // namespace minisgl::cpu
