// Drafts by a head for multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2; models/heads.py): a decoder layer
// that is fed with the model's result of each token and the embedding of the one after it, and says which comes next. With its
// own result and the token that it has said, it goes on.
#pragma once

#include "logits.h"
#include "model.h"

namespace minisgl::cpu {

class DraftHead {
 public:
  DraftHead(const Model& model, const DraftWeights& weights)
      : workers_(model.workers()),
        model_(model),
        own_(model, weights.head, weights.last),
        weights_(weights) {}

  Model& own() { return own_; }  // of the head's layer and last norm, with the model's embedding

  // tokens: [rows, stride], of requests, the step's samples included; out: [sequences of the model's last step, most].
  void operator()(const TokenTable& tokens, const std::vector<WantedDraft>& wanted, int64_t most, int32_t* out) {
    int64_t page_size = model_.page_size();
    own_.set_rotations(model_);
    begin(tokens, model_.sequences(), page_size, wanted);
    compute(model_.rows(), model_.norm());
    for (int64_t i = 0; !going_.empty(); ++i) {
      for (size_t r = 0; r < going_.size(); ++r) {
        int64_t vocab = own_.vocab(), token = arg_max(AllTokens{logits_.get() + r * vocab}, vocab);
        out[going_[r].index * most + i] = int32_t(std::max<int64_t>(token, 0));
      }
      go_on(i, page_size, most, out);
      if (!going_.empty()) compute(own_.rows(), own_.norm());
    }
  }

 private:
  struct Going {
    int64_t index, left;
    Sequence sequence;  // of its next token
  };

  void begin(const TokenTable& tokens, const std::vector<Sequence>& sequences, int64_t page_size, const std::vector<WantedDraft>& wanted) {
    clear();
    step_.all.sequences = sequences;
    for (auto& s : sequences)
      for (int64_t i = 0; i < s.count; ++i) add(tokens.ids[s.slot * tokens.stride + s.start + i + 1], s.start + i, s.pages, page_size, s.first + i);
    for (const WantedDraft& want : wanted) {
      const Sequence& s = sequences[want.sequence];
      going_.push_back({want.sequence, want.count, {0, 1, s.start + want.end, s.pages, s.slot}});
      last_.push_back(s.first + want.end - 1);
    }
  }

  // Those that want more go on, from where they were among the rows.
  void go_on(int64_t done, int64_t page_size, int64_t most, const int32_t* out) {
    std::vector<Going> before = std::move(going_);
    std::vector<int64_t> rows = std::move(last_);
    clear();
    for (size_t r = 0; r < before.size(); ++r) {
      Going next = before[r];
      if (--next.left <= 0) continue;
      next.sequence.first = int64_t(going_.size());
      add(out[next.index * most + done], next.sequence.start, next.sequence.pages, page_size, rows[r]);
      step_.all.sequences.push_back(next.sequence);
      last_.push_back(next.sequence.first);
      ++next.sequence.start;
      going_.push_back(next);
    }
  }

  void clear() {
    for (auto* numbers : {&ids_, &positions_, &slots_, &from_, &last_}) numbers->clear();
    step_.all.sequences.clear();
    going_.clear();
  }

  // One token of the head's next step. from: which row its hidden state is.
  void add(int64_t id, int64_t position, const int32_t* pages, int64_t page_size, int64_t from) {
    ids_.push_back(id), positions_.push_back(position), from_.push_back(from);
    slots_.push_back(pages[position / page_size] * page_size + position % page_size);
    step_.page_size = page_size;
  }

  // hidden: rows that are to be normalised, as a model's before its head.
  void compute(const float* hidden, const float* norm) {
    int64_t count = int64_t(ids_.size()), width = own_.width(), stride = padded_stride(2 * width);
    float* both = both_.reserve(count * stride);
    step_.num_tokens = count, step_.ids = ids_.data(), step_.positions = positions_.data(), step_.all.slots = slots_.data();
    step_.num_logits = int64_t(last_.size()), step_.logit_tokens = last_.data();
    step_.logits = logits_.reserve(step_.num_logits * own_.vocab());
    workers_.reserve_rows(count, 2 * width);
    own_.forward(step_, [&](int thread) {
      own_.embed_rows(ids_.data(), count, both, stride);
      workers_.pool.share(count, 8, [&](int64_t t) {
        float *row = both + t * stride, *second = row + width;
        rms_norm(row, weights_.embedding, own_.eps(), width, row);
        rms_norm(hidden + from_[t] * own_.hidden_stride(), norm, own_.eps(), width, second);
        rms_norm(second, weights_.hidden, own_.eps(), width, second);
      });
      linear(workers_, thread, weights_.both, {both, count, 2 * width, stride, nullptr, 0}, Into::kStore, own_.rows(), own_.hidden_stride());
    });
  }

  Workers& workers_;
  const Model& model_;
  Model own_;
  DraftWeights weights_;
  Step step_{};
  std::vector<Going> going_;
  std::vector<int64_t> ids_, positions_, slots_, from_, last_;
  Buffer<float> both_, logits_;
};

}  // namespace minisgl::cpu
