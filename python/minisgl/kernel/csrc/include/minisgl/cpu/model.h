// A whole step of a decoder in one call: all blocks, and the logits of the tokens that sample.
#pragma once

#include <memory>

#include "conv.h"
#include "delta.h"
#include "ops.h"
#include "wanted.h"

namespace minisgl::cpu {

class Model {
 public:
  Model(Workers& workers, float eps, float scale, const Linear& embedding, const Linear& head, const float* norm)
      : workers_(workers), eps_(eps), scale_(scale), embedding_(embedding), head_(head), norm_(norm) {}
  // One without blocks or rotations, beside another: of its embedding.
  Model(const Model& other, const Linear& head, const float* norm)
      : Model(other.workers_, other.eps_, 1.0f, other.embedding_, head, norm) {}

  void set_rotations(const Model& other) { rotations_ = other.rotations_; }
  std::shared_ptr<DraftHead> drafter;  // if there is one (draft.h)
  void set_rotation(int64_t index, const Rotation& rotation) {
    rotations_.resize(std::max<size_t>(rotations_.size(), index + 1));
    rotations_[index] = rotation;
  }

  void add(const AnyBlock& block) {
    blocks_.push_back(block);
    std::visit([this](const auto& one) { widen_rooms(one); }, block);
  }

  void forward(const Step& step) {
    sequences_ = step.all.sequences, page_size_ = step.page_size;
    forward(step, [&](int) { embed_tokens(step); });
  }

  // begin(thread): fills `rows`.
  template <class F>
  void forward(const Step& step, F&& begin) {
    reserve(step);
    workers_.pool.run([&](int thread) {
      if (step.num_tokens > 0) {
        begin(thread);
        for (const AnyBlock& block : blocks_) std::visit([&](const auto& one) { run(thread, step, one); }, block);
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
      const float* from = rows() + tokens[r] * hidden_stride();
      std::copy(from, from + width(), out + r * width());
    }
  }

  float* rows() const { return x_.get(); }  // the residual stream: [tokens of the step, stride]
  int64_t hidden_stride() const { return padded_stride(width()); }
  int64_t width() const { return embedding_.in; }
  int64_t vocab() const { return head_.out; }
  const float* norm() const { return norm_; }
  // Of the last step.
  const std::vector<Sequence>& sequences() const { return sequences_; }
  int64_t page_size() const { return page_size_; }
  float eps() const { return eps_; }
  Workers& workers() const { return workers_; }
  void embed_rows(const int64_t* ids, int64_t count, float* out, int64_t out_stride) {
    embed(workers_, embedding_, ids, count, 0, out, out_stride);
  }

 private:
  struct Plan {
    Heads heads;
    int64_t window;
    AttentionPlan pieces;

    bool fits(const AttentionBlock& w) const {
      return window == w.window && heads.num_q == w.heads.num_q && heads.num_kv == w.heads.num_kv && heads.dim == w.heads.dim;
    }
  };

  // The widest rows: of what is multiplied first, of what comes of it, and of a delta net's gates.
  void widen_rooms(const AttentionBlock& w) { widen_rooms(w.qkv.out, w.o.in, 0); }
  void widen_rooms(const DeltaBlock& w) { widen_rooms(w.qkvz.out, w.o.in, w.ba.out); }
  void widen_rooms(const ConvBlock& w) { widen_rooms(w.in.out, w.o.in, 0); }
  void widen_rooms(const MlpBlock& w) { widen_rooms(0, w.down.in, 0); }
  void widen_rooms(int64_t mixed, int64_t inner, int64_t gates) {
    mixed_stride_ = std::max(mixed_stride_, padded_stride(mixed));
    inner_stride_ = std::max(inner_stride_, padded_stride(inner));
    gate_stride_ = std::max(gate_stride_, padded_stride(gates));
    widest_ = std::max({widest_, inner, embedding_.in});
  }

  void reserve(const Step& step) {
    int64_t tokens = step.num_tokens;
    if (tokens > 0) {
      x_.reserve(tokens * hidden_stride());
      added_.reserve(tokens * hidden_stride());
      mixed_.reserve(tokens * mixed_stride_);
      inner_.reserve(tokens * inner_stride_);
      gates_.reserve(tokens * gate_stride_);
      workers_.reserve_rows(tokens, widest_);
      plan(step);
    }
    last_.reserve(step.num_logits * hidden_stride());
    if (step.masks.count > 0) wanted_.reserve(step.masks, step.num_logits, head_);
    workers_.reserve_rows(step.num_logits, embedding_.in);
  }

  void plan(const Step& step) {
    plans_.clear();
    states_.clear();
    for (auto& s : step.all.sequences) {
      size_t i = states_.size();
      states_.push_back({s.slot, s.first, s.count, step.held ? step.held[i] : 0, step.tried ? step.tried[i] : 0});
    }
    for (auto& block : blocks_) {
      auto w = std::get_if<AttentionBlock>(&block);
      if (w == nullptr || plan_of(*w) != nullptr) continue;
      plans_.push_back({w->heads, w->window, {}});
      Plan& plan = plans_.back();
      plan.heads.page_size = step.page_size;
      plan_attention(places(step, *w).sequences, plan.heads, plan.window, workers_.pool.size(), plan.pieces);
      partial_.reserve(plan.pieces, plan.heads);
    }
  }

  static const Places& places(const Step& step, const AttentionBlock& w) { return w.window ? step.windowed : step.all; }

  const Plan* plan_of(const AttentionBlock& w) const {
    for (auto& plan : plans_)
      if (plan.fits(w)) return &plan;
    return nullptr;
  }

  void embed_tokens(const Step& step) {
    embed_rows(step.ids, step.num_tokens, x_.get(), hidden_stride());
    if (scale_ == 1.0f) return;
    workers_.pool.share(step.num_tokens, 8, [&](int64_t t) {
      float* row = x_.get() + t * hidden_stride();
      for (int64_t i = 0; i < embedding_.in; ++i) row[i] *= scale_;
    });
  }

  void run(int thread, const Step& step, const AttentionBlock& w) {
    int64_t tokens = step.num_tokens, gates = w.has_gates ? w.heads.num_q * w.heads.dim : 0;
    const Plan& plan = *plan_of(w);
    const Places& at = places(step, w);
    float* qkv = mixed_.get() + gates;
    project(thread, tokens, w.before, w.qkv, Into::kStore, mixed_.get(), mixed_stride_);
    with_type(w.cache, [&](auto cache) {
      norm_rope_store(workers_, qkv, tokens, mixed_stride_, w.norm, eps_, rotations_[w.rotation], step.positions, at.slots, plan.heads, cache);
      attention(workers_, thread, qkv, mixed_stride_, at.sequences, plan.pieces, plan.heads, w.window, w.scores, cache, partial_,
                inner_.get(), inner_stride_);
    });
    if (w.has_gates) close_gates(tokens, gates);
    add(thread, tokens, w.o, w.after);
  }

  void run(int thread, const Step& step, const DeltaBlock& w) {
    int64_t tokens = step.num_tokens;
    project(thread, tokens, w.before, w.ba, Into::kStore, gates_.get(), gate_stride_);
    project(thread, tokens, w.before, w.qkvz, Into::kStore, mixed_.get(), mixed_stride_);
    DeltaInput in{mixed_.get(), mixed_stride_, gates_.get(), gate_stride_};
    gated_delta_net(workers_, thread, w.net, in, states_, w.state, inner_.get(), inner_stride_);
    add(thread, tokens, w.o, w.after);
  }

  void run(int thread, const Step& step, const ConvBlock& w) {
    project(thread, step.num_tokens, w.before, w.in, Into::kStore, mixed_.get(), mixed_stride_);
    short_conv(workers_, thread, w.net, mixed_.get(), mixed_stride_, states_, inner_.get(), inner_stride_);
    add(thread, step.num_tokens, w.o, w.after);
  }

  void run(int thread, const Step& step, const MlpBlock& w) {
    project(thread, step.num_tokens, w.before, w.gate_up, w.activation, inner_.get(), inner_stride_);
    add(thread, step.num_tokens, w.down, w.after);
  }

  // out = the residual stream, normalised where there is a norm, times wᵀ.
  void project(int thread, int64_t tokens, const float* norm, const Linear& w, Into into, float* out, int64_t stride) {
    linear(workers_, thread, w, {x_.get(), tokens, w.in, hidden_stride(), norm, eps_}, into, out, stride);
  }

  // What attention has left is multiplied with sigmoids of gates, the first features of `mixed_`.
  void close_gates(int64_t tokens, int64_t count) {
    workers_.pool.share(tokens, 4, [&](int64_t t) {
      const float* gates = mixed_.get() + t * mixed_stride_;
      float* row = inner_.get() + t * inner_stride_;
      int64_t i = 0;
      for (; i + kLanes <= count; i += kLanes) store(row + i, load(row + i) / (1.0f + exponential(-load(gates + i))));
      for (; i < count; ++i) row[i] *= sigmoid(gates[i]);
    });
  }

  // The residual stream += what the block has come to times wᵀ, normalised where there is a norm.
  void add(int thread, int64_t tokens, const Linear& w, const float* after) {
    Input in{inner_.get(), tokens, w.in, inner_stride_, nullptr, eps_};
    if (after == nullptr) return linear(workers_, thread, w, in, Into::kAdd, x_.get(), hidden_stride());
    linear(workers_, thread, w, in, Into::kStore, added_.get(), hidden_stride());
    workers_.pool.share(tokens, 4, [&](int64_t t) {
      float *row = added_.get() + t * hidden_stride(), *x = x_.get() + t * hidden_stride();
      rms_norm(row, after, eps_, w.out, row);
      for (int64_t i = 0; i < w.out; ++i) x[i] += row[i];
    });
  }

  void logits(int thread, const Step& step) {
    int64_t count = step.num_logits;
    if (count == 0) return;
    bool has_masks = step.masks.count > 0;
    if (has_masks) workers_.pool.share(1, 1, [&](int64_t) { wanted_.choose(step.masks, count, head_); });
    PanelRows chosen = has_masks ? wanted_.rows() : PanelRows{};
    workers_.pool.share(count, 16, [&](int64_t i) {
      int64_t r = has_masks ? chosen.places[i] : i;
      const float* from = x_.get() + (step.logit_tokens == nullptr ? r : step.logit_tokens[r]) * hidden_stride();
      std::copy(from, from + embedding_.in, last_.get() + i * hidden_stride());
    });
    Input in{last_.get(), count, head_.in, hidden_stride(), norm_, eps_};
    linear(workers_, thread, head_, in, Into::kStore, step.logits, head_.out, chosen);
  }

  Workers& workers_;
  float eps_, scale_;
  Linear embedding_, head_;
  const float* norm_;
  std::vector<AnyBlock> blocks_;
  std::vector<Rotation> rotations_;
  int64_t mixed_stride_ = 0, inner_stride_ = 0, gate_stride_ = 0, widest_ = 0;
  Buffer<float> x_, added_, mixed_, inner_, gates_, last_;
  std::vector<Plan> plans_;
  std::vector<Sequence> sequences_;
  int64_t page_size_ = 0;
  std::vector<StateSequence> states_;
  PartialRoom partial_;
  WantedLogits wanted_;
};

}  // namespace minisgl::cpu
