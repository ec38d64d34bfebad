// A whole step of a dense decoder in one call: all layers, and the logits of the tokens that sample.
#pragma once

#include "ops.h"

namespace minisgl::cpu {

class Model {
 public:
  Model(Workers& workers, const Heads& heads, float eps, const Linear& embedding, const Linear& head, const float* norm)
      : workers_(workers), heads_(heads), eps_(eps), embedding_(embedding), head_(head), norm_(norm) {}

  std::vector<Layer> layers;

  void forward(const Step& step) {
    reserve(step);
    workers_.pool.run([&](int thread) {
      if (step.num_tokens > 0) {
        embed(workers_, embedding_, step.ids, step.num_tokens, 0, x_.get(), hidden_stride());
        for (const Layer& one : layers) with_type(one.cache, [&](auto cache) { layer(thread, step, one, cache); });
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

  // The residual stream behind the last layer, of tokens of the last step. out: [count, hidden].
  void hidden_rows(const int64_t* tokens, int64_t count, float* out) const {
    for (int64_t r = 0; r < count; ++r) {
      const float* from = x_.get() + tokens[r] * hidden_stride();
      std::copy(from, from + embedding_.in, out + r * embedding_.in);
    }
  }

 private:
  int64_t hidden_stride() const { return padded_stride(embedding_.in); }
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
      int64_t inner = layers[0].gate_up.part(), widest = std::max({embedding_.in, heads_.num_q * heads_.dim, inner});
      workers_.reserve_rows(tokens, widest);
      plans_.clear();
      for (auto& one : layers) {
        if (plan_of(one.window) != nullptr) continue;
        plans_.emplace_back(one.window, AttentionPlan{});
        plan_attention(step.sequences, heads_, one.window, int(threads), plans_.back().second);
        partial_.reserve(plans_.back().second, heads_);
      }
    }
    last_.reserve(step.num_logits * hidden_stride());
    workers_.reserve_rows(step.num_logits, embedding_.in);
  }

  const AttentionPlan* plan_of(int64_t window) const {
    for (auto& [key, plan] : plans_)
      if (key == window) return &plan;
    return nullptr;
  }

  // What is multiplied with w. x: [count, stride].
  Input input(const float* x, int64_t count, int64_t stride, const float* norm, const Linear& w) const {
    return {x, count, w.in, stride, norm, eps_};
  }

  template <class T>
  void layer(int thread, const Step& step, const Layer& w, Cache<T> cache) {
    int64_t tokens = step.num_tokens;
    Input in = input(x_.get(), tokens, hidden_stride(), w.input_norm, w.qkv);
    linear(workers_, thread, w.qkv, in, Into::kStore, qkv_.get(), qkv_stride());
    norm_rope_store(workers_, qkv_.get(), tokens, qkv_stride(), w.qk_norm, eps_, step.rotation, step.positions, step.slots, heads_, cache);
    attention(workers_, thread, qkv_.get(), qkv_stride(), step.sequences, *plan_of(w.window), heads_, w.window, {}, cache,
              partial_, attended_.get(), attended_stride());
    in = input(attended_.get(), tokens, attended_stride(), nullptr, w.o);
    linear(workers_, thread, w.o, in, Into::kAdd, x_.get(), hidden_stride());
    in = input(x_.get(), tokens, hidden_stride(), w.post_norm, w.gate_up);
    linear(workers_, thread, w.gate_up, in, Into::kGated, inner_.get(), inner_stride());
    in = input(inner_.get(), tokens, inner_stride(), nullptr, w.down);
    linear(workers_, thread, w.down, in, Into::kAdd, x_.get(), hidden_stride());
  }

  void logits(int thread, const Step& step) {
    int64_t count = step.num_logits;
    if (count == 0) return;
    workers_.pool.share(count, 16, [&](int64_t r) {
      const float* from = x_.get() + (step.logit_tokens == nullptr ? r : step.logit_tokens[r]) * hidden_stride();
      std::copy(from, from + embedding_.in, last_.get() + r * hidden_stride());
    });
    Input in = input(last_.get(), count, hidden_stride(), norm_, head_);
    linear(workers_, thread, head_, in, Into::kStore, step.logits, head_.out);
  }

  Workers& workers_;
  Heads heads_;
  float eps_;
  Linear embedding_, head_;
  const float* norm_;
  Buffer<float> x_, qkv_, attended_, inner_, last_;
  std::vector<std::pair<int64_t, AttentionPlan>> plans_;
  PartialRoom partial_;
};

}  // namespace minisgl::cpu
