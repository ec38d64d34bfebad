// What the kernels are called with, and the functions that call them: all that the bindings see, so that these compile
// beside the kernels and not with them.
#pragma once

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

#include "minisgl/sampling_params.h"

namespace minisgl::cpu {

// Numbers of 16 bits as they lie in memory.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {  // IEEE 754 binary16
  uint16_t bits;
};

enum class Type : int64_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kPacked = 3, kFloat16 = 4 };

// What a group of weights has beside its scale: nothing; a number that is subtracted; a code that stands for zero; or small
// integers, which times a number are subtracted.
enum class Least : int32_t { kNone, kValue, kZero, kSteps };

// How weights of few bits are held (packed.h): scale * (code - offset), less what `least` says.
struct Format {
  int bits;              // of a code: 2, 3, 4, 5, 6 or 8
  int subs;              // scales of 32 inputs: 1 or 2
  Least least;
  bool has_steps;        // whether these scales are integers of 8 bits, and what they are multiplied with a number of 16 bits
  int offset;
  int64_t span;          // how many times 32 inputs there are to a number of 16 bits
  bool is_bfloat16;      // such a number; else it has IEEE 754's format of 16 bits
  const int8_t* values;  // [16], that 4-bit codes stand for; or null: codes are values
  float factor = 1.0f;   // with which numbers that are multiplied with integers are multiplied, too
};

// Rows [first, first + out) of a weight, in panels of one format.
struct Part {
  Format format;
  int64_t first, out;
  const char* data;
};

// weight: [out, in]. data: [panels, in, kPanel] float, [panels, ceil(in / 2), kPanel, 2] of 16 bits, or [panels,
// ceil(in / 4), kPanel, 4] int8. Where two matrices lie one below the other in a weight, as gate and up do, their panels
// take turns. Packed weights have parts instead; those of two matrices have two.
struct Linear {
  Type type;
  bool is_pair;
  int64_t out, in;
  const void* data;
  const float* scale;  // [panels * kPanel], of int8
  const float* bias;   // [out] or null
  std::vector<Part> parts = {};
  const int64_t* columns = nullptr;  // [in], which of the inputs each column of packed weights multiplies; null: its own

  int64_t part() const { return is_pair ? out / 2 : out; }
};

// One layer's cache: [slots, num_kv] rows (cache.h).
template <class T>
struct Cache {
  T* k;
  T* v;
};

// A sequence of the step: tokens [first, first + count) of the batch stand at positions start, start + 1, …. slot: of its
// states.
struct Sequence {
  int64_t first, count, start;
  const int32_t* pages;
  int64_t slot = 0;
};

struct Heads {
  int64_t num_q, num_kv, dim;
  int64_t page_size;

  int64_t group() const { return num_q / num_kv; }
  int64_t slot(const int32_t* pages, int64_t position) const {
    return pages[position / page_size] * page_size + position % page_size;
  }
};

// What becomes of scores beside their scale. cap: they become cap * tanh(score / cap); 0: none. sinks: [num_q], scores of no
// token, which only the softmax's sum counts; or null.
struct Scores {
  float cap = 0.0f;
  const float* sinks = nullptr;
};

// Cosines and sines of positions, [positions, dim] each; the first half of the sines is negated.
struct Rotation {
  const float *cosines, *sines;
};

// Tokens' features: queries, keys, values, gates; and of each value head b, then a. [tokens, …] with the strides.
struct DeltaInput {
  const float* qkvz;
  int64_t stride;
  const float* ba;
  int64_t ba_stride;

  DeltaInput from(int64_t token) const { return {qkvz + token * stride, stride, ba + token * ba_stride, ba_stride}; }
};

// A gated delta net (delta.h): key heads and value heads, of which each key head has a group, and features of each.
struct DeltaNet {
  int64_t num_k, num_v, dim_k, dim_v;
  int64_t width;       // tokens that the convolution sees
  const float* conv;   // [channels, width]: of queries, keys and values
  const float *a_log, *dt_bias, *norm;  // [num_v], [num_v], [dim_v]
  float eps;           // of the norm

  int64_t group() const { return num_v / num_k; }
  int64_t channels() const { return 2 * num_k * dim_k + num_v * dim_v; }
  int64_t features() const { return channels() + num_v * (dim_v + 2); }  // of a token that is kept
  DeltaInput rows_of(const float* kept) const { return {kept, features(), kept + features() - 2 * num_v, features()}; }
};

// conv: [slots, channels, width - 1], the last inputs of the convolution; memory: [slots, num_v, dim_k, dim_v]; kept: [slots,
// longest, features], the inputs of tokens that were tried, qkvz and then ba.
struct DeltaState {
  float *conv, *memory, *kept;
  int64_t longest;
};

// A convolution of each channel over `width` tokens, between two gates (conv.h). weight: [channels, width]; bias: [channels] or
// null; past: [slots, channels, width - 1], its last inputs; kept: [slots, longest, 3 * channels], what it was given of tokens that
// were tried.
struct ShortConv {
  int64_t channels, width;
  const float *weight, *bias;
  float *past, *kept;
  int64_t longest;
};

// Tokens [first, first + count) of the batch, which go on from the state of a slot. The last `tried` of them the state does not
// take in: the slot keeps them. Before the first come the first `held` of those that it has kept.
struct StateSequence {
  int64_t slot, first, count, held = 0, tried = 0;
};

enum class Into : int64_t { kStore = 0, kAdd = 1, kSilu = 2, kGelu = 3 };  // the last ones: of a pair, activation(gate) * up

enum class CacheType { kFloat32, kBFloat16, kFloat16, kInt8 };

// A layer's cache in any type. bytes: of its keys, and of its values.
struct AnyCache {
  CacheType type;
  void *k, *v;
  int64_t bytes;
};

// Weights of norms of heads: of each query and key head, or of all queries' features at once, and of all keys'. [num_q +
// num_kv, dim], or null.
struct HeadNorm {
  const float* weight;
  bool is_wide;
};

// What adds to the residual stream. before, after: norms of what goes in and of what comes out, [hidden] or null.
struct AttentionBlock {
  Linear qkv, o;
  const float *before, *after;
  HeadNorm norm;
  Heads heads;
  AnyCache cache;
  int64_t window;    // 0: none
  int64_t rotation;  // which of the model's
  Scores scores;
  bool has_gates;    // qkv's first rows are gates of o's inputs, by whose sigmoid these are multiplied
};

struct DeltaBlock {
  Linear qkvz, ba, o;
  const float *before, *after;
  DeltaNet net;
  DeltaState state;
};

struct ConvBlock {
  Linear in, o;
  const float *before, *after;
  ShortConv net;
};

struct MlpBlock {
  Linear gate_up, down;
  const float *before, *after;
  Into activation;
};

using AnyBlock = std::variant<AttentionBlock, DeltaBlock, ConvBlock, MlpBlock>;

// Where tokens lie in the caches of some layers. slots: [num_tokens].
struct Places {
  const int64_t* slots;
  std::vector<Sequence> sequences;
};

// Masks of some logits' rows, as `core.Masks` says; who computes them may do so until the head is reached. samples: [count], of
// each mask whose logits need no other tokens' numbers than those that it allows; negative: all are wanted.
struct LogitMasks {
  int64_t count, num_words;
  const uint32_t* words;   // [count, num_words]
  const int32_t* states;   // [count]
  const int64_t* samples;
};
constexpr int32_t kMaskReady = 1;

struct Step {
  int64_t num_tokens;
  const int64_t *ids, *positions;  // [num_tokens]
  Places all, windowed;  // for layers that see all, and for those whose windows slide
  int64_t page_size;
  const int64_t* logit_tokens;  // [num_logits], or null: all tokens
  int64_t num_logits;
  float* logits;  // [num_logits, vocab]
  const int64_t *held, *tried;  // of each sequence, as in `StateSequence`; or null
  LogitMasks masks;             // what they do not allow is left as it was
};

// What a head for multi-token prediction begins with (draft.h): both: [hidden, 2 * hidden], of the next token's embedding and
// the hidden state, which have norms.
struct DraftWeights {
  Linear both, head;  // the latter: the LM head
  const float *embedding, *hidden, *last;  // norms; the last one is of what the LM head is given
};

// [rows, stride]: the tokens of requests.
struct TokenTable {
  const int32_t* ids;
  int64_t stride;
};

// So many tokens after the first `end` that a sequence of the step computes.
struct WantedDraft {
  int64_t sequence, end, count;
};

// What changes the logits of n rows that sample, beside their records, and where their tokens stand. Any of it may be null.
struct LogitRules {
  int32_t* token_ids;      // [rows, stride]: the tokens of requests, to which those sampled are added
  int64_t stride;
  const int64_t* rows;     // [n], of that table
  const int64_t* bounds;   // [rows + 1]: row i has the entries [bounds[i], bounds[i + 1]) of `ids` and `values`
  const int32_t* ids;
  const float* values;     // added to the logits of `ids`; -inf: only where the output must not end yet
  const uint32_t* masks;   // [k, words]: a bit for each token, whether it may be sampled
  int64_t words;
  const int32_t* mask_of;  // [n]: a row's mask, or one of these
};
constexpr int32_t kNoMask = -1, kNotReady = -2;

class Workers;
class Model;
class DraftHead;

Workers* create_workers(int threads);
void destroy_workers(Workers* workers);
int panel_size();

// Plain weights to panels of the same type, or of int8 where there is room for scales.
void pack_weight(Workers& workers, Type type, const void* weight, int64_t out, int64_t in, bool is_pair, void* data,
                 float* scales);
// Weights of few bits. name: ggml's of a type of blocks, or "grouped" and the number of bits; group: inputs of one scale, of
// grouped weights. A format of no bits where there is none for `in` inputs.
Format format_of(const std::string& name, int64_t in, int64_t group, bool has_zeros, bool is_bfloat16);
int64_t packed_bytes(const Format& format, int64_t out, int64_t in);
// Rows of blocks, `stride` bytes apart, to panels. grid: of types whose codes name several values at a time, these: of each,
// which of the type's magnitudes it is; else null.
void pack_blocks(Workers& workers, const std::string& name, const uint8_t* rows, int64_t stride, int64_t out, int64_t in,
                 const uint8_t* grid, char* data);
// codes: [out, in * bits / 8], the even columns' first; scales: [out, in / group], and zeros, which may be null.
void pack_grouped(Workers& workers, const Format& format, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros,
                  int64_t out, int64_t in, char* data);
// Plain weights to groups of 32 inputs as `pack_grouped` takes them: the best scales and zeros of a few, by squared errors, each
// times the importance of its input (which may be null). Whether all are finite: else nothing is of use.
bool make_narrow(Workers& workers, bool is_bfloat16, const void* weight, const float* importance, int64_t out, int64_t in, int bits,
                 uint8_t* codes, uint16_t* scales, uint8_t* zeros);
// out (+)= norm(x) * wᵀ + bias, or activation(gate) * up. x: [rows, stride], out: [rows, out_stride].
void linear_rows(Workers& workers, const Linear& w, const float* x, int64_t rows, int64_t stride, const float* norm, float eps,
                 Into into, float* out, int64_t out_stride);
void embed_ids(Workers& workers, const Linear& table, const int64_t* ids, int64_t count, int64_t first, float* out);
void rope_store(Workers& workers, float* qkv, int64_t tokens, const HeadNorm& norm, float eps, const Rotation& rotation,
                const int64_t* positions, const int64_t* slots, const Heads& heads, AnyCache cache);
void attend(Workers& workers, const float* q, int64_t stride, const std::vector<Sequence>& sequences, const Heads& heads,
            int64_t window, const Scores& kind, AnyCache cache, float* out);
void delta_net(Workers& workers, const DeltaNet& net, const DeltaInput& in, const std::vector<StateSequence>& sequences,
               const DeltaState& state, float* out);
// Logits are as before when it is done.
void sample_rows(Workers& workers, float* logits, int64_t rows, int64_t vocab, int64_t stride, const SamplingParams* params,
                 const LogitRules& rules, int32_t* ids);
// Of tokens, [n], where negative ones count as 0, and of the `num_top` largest, from rows of logits. words: [n, 1 + 2 * num_top],
// of each row its token's log-probability, and then id and log-probability of the largest, by turns.
void log_probabilities(Workers& workers, const float* logits, int64_t vocab, int64_t stride, const int64_t* rows, const int32_t* tokens,
                       int64_t n, int64_t num_top, int32_t* words);

// The whole model, to which rotations are given and blocks added. scale: of embeddings.
Model* create_model(Workers& workers, float eps, float scale, const Linear& embedding, const Linear& head, const float* norm);
void destroy_model(Model* model);
void set_rotation(Model& model, int64_t index, const Rotation& rotation);
void add_block(Model& model, const AnyBlock& block);
void forward(Model& model, const Step& step);
void more_logits(Model& model, const int64_t* tokens, int64_t count, float* logits);
void hidden_rows(const Model& model, const int64_t* tokens, int64_t count, float* out);

// Gives the model a head that drafts. The head's layer, as a model to which blocks are added.
Model* add_draft_head(Model& model, const DraftWeights& weights);
const std::vector<Sequence>& last_sequences(const Model& model);  // of its last step, all of whose tokens `draft` reads
void draft(Model& model, const TokenTable& tokens, const std::vector<WantedDraft>& wanted, int64_t most, int32_t* out);

}  // namespace minisgl::cpu
