// Convolutions over a few tokens, each channel by itself, between two gates.
#pragma once

#include "ops.h"

namespace minisgl::cpu {

constexpr int64_t kChannels = 64;  // of a sequence, that a thread takes at a time

// What a thread has of one sequence: taps and last inputs of some channels, a row of kChannels for each token.
class ConvChannels {
 public:
  // Floats of its room.
  static int64_t room(const ShortConv& net) { return (2 * net.width + 1) * kChannels; }

  ConvChannels(const ShortConv& net, int64_t first, float* room)
      : net_(net), first_(first), count_(std::min(kChannels, net.channels - first)), taps_(room), inputs_(taps_ + net.width * kChannels),
        totals_(inputs_ + net.width * kChannels) {
    for (int64_t j = 0; j < net.width; ++j)
      for (int64_t c = 0; c < count_; ++c) taps_[j * kChannels + c] = net.weight[(first + c) * net.width + j];
  }

  // in: gates before, gates behind, and what is mixed, [channels] each.
  void run(const float* in, int64_t stride, const StateSequence& sequence, float* out, int64_t out_stride) {
    int64_t before = net_.width - 1, held = sequence.held, end = held + sequence.count, sure = end - sequence.tried;
    float* past = net_.past + (sequence.slot * net_.channels + first_) * before;
    float* kept = net_.kept + sequence.slot * net_.longest * 3 * net_.channels + first_;
    for (int64_t j = 0; j < before; ++j)
      for (int64_t c = 0; c < count_; ++c) row(j - before)[c] = past[c * before + j];
    for (int64_t t = 0; t < end; ++t) {
      int64_t at = sequence.first + t - held;
      const float* token = t < held ? kept + t * 3 * net_.channels : in + at * stride + first_;
      if (t == sure) save(past, t);
      for (int64_t part = 0; t >= sure && part < 3; ++part)
        std::copy(token + part * net_.channels, token + part * net_.channels + count_, kept + ((t - sure) * 3 + part) * net_.channels);
      step(t, token, token + net_.channels, token + 2 * net_.channels, t < held ? nullptr : out + at * out_stride + first_);
    }
    if (sure == end) save(past, end);
  }

 private:
  // What comes before token t, counted as in `row`.
  void save(float* past, int64_t t) {
    for (int64_t j = 0; j < net_.width - 1; ++j)
      for (int64_t c = 0; c < count_; ++c) past[c * (net_.width - 1) + j] = row(t - net_.width + 1 + j)[c];
  }

  // Of token t, counted from the first one of now: a ring of as many rows as the convolution sees.
  float* row(int64_t t) { return inputs_ + (t + net_.width) % net_.width * kChannels; }

  void step(int64_t t, const float* gate, const float* behind, const float* value, float* out) {
    float* now = row(t);
    const float* last = taps_ + (net_.width - 1) * kChannels;
    for (int64_t c = 0; c < count_; ++c) {
      now[c] = gate[c] * value[c];
      totals_[c] = (net_.bias == nullptr ? 0.0f : net_.bias[first_ + c]) + last[c] * now[c];
    }
    for (int64_t j = 0; j < net_.width - 1; ++j) {
      const float *then = row(t + 1 + j - net_.width), *taps = taps_ + j * kChannels;
      for (int64_t c = 0; c < count_; ++c) totals_[c] += taps[c] * then[c];
    }
    for (int64_t c = 0; c < count_ && out != nullptr; ++c) out[c] = behind[c] * totals_[c];
  }

  const ShortConv& net_;
  int64_t first_, count_;
  float *taps_, *inputs_, *totals_;
};

// All tokens of the sequences: in, [tokens, 3 * channels] → out, [tokens, channels], with their strides; `past` is updated.
inline void short_conv(Workers& workers, int thread, const ShortConv& net, const float* in, int64_t stride,
                       const std::vector<StateSequence>& sequences, float* out, int64_t out_stride) {
  float* room = workers.room(thread, ConvChannels::room(net));
  int64_t blocks = (net.channels + kChannels - 1) / kChannels;
  workers.pool.share(int64_t(sequences.size()) * blocks, 4, [&](int64_t item) {
    ConvChannels(net, item % blocks * kChannels, room).run(in, stride, sequences[item / blocks], out, out_stride);
  });
}

}  // namespace minisgl::cpu
