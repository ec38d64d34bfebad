// The CPU kernels, compiled once for the processor at hand.
#include "minisgl/cpu/draft.h"
#include "minisgl/cpu/packing.h"
#include "minisgl/cpu/sample.h"
#include "minisgl/cpu/search.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace minisgl::cpu {

namespace {

// Large memory, before it is touched: first touches and look-ups of small pages take time that shows. The pages at both ends
// may be shared with others of its kind.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  if (bytes < 65536) return;
  uintptr_t begin = reinterpret_cast<uintptr_t>(data) / kHuge * kHuge;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes + kHuge - 1) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace

Workers* create_workers(int threads) { return new Workers(threads); }
void destroy_workers(Workers* workers) { delete workers; }
int panel_size() { return kPanel; }

void pack_weight(Workers& workers, Type type, const void* weight, int64_t out, int64_t in, bool is_pair, void* data, float* scales) {
  Linear w{scales != nullptr ? Type::kInt8 : type, is_pair, out, in};
  prefer_huge_pages(data, num_panels(w) * panel_bytes(w));
  if (type == Type::kBFloat16)
    pack(workers, static_cast<const BFloat16*>(weight), w, data, scales);
  else if (type == Type::kFloat16)
    pack(workers, static_cast<const Float16*>(weight), w, data, scales);
  else
    pack(workers, static_cast<const float*>(weight), w, data, scales);
}

Format format_of(const std::string& name, int64_t in, int64_t group, bool has_zeros, bool is_bfloat16) {
  return find_format(name, in, group, has_zeros, is_bfloat16);
}
int64_t packed_bytes(const Format& format, int64_t out, int64_t in) { return panels_of(out) * panel_bytes(format, in); }

void pack_blocks(Workers& workers, const std::string& name, const uint8_t* rows, int64_t stride, int64_t out, int64_t in,
                 const uint8_t* grid, char* data) {
  const BlockType& type = *block_type(name);
  prefer_huge_pages(data, packed_bytes(type.format, out, in));
  pack_part(workers, type, rows, stride, out, in, grid, data);
}

void pack_grouped(Workers& workers, const Format& format, const uint8_t* codes, const uint16_t* scales, const uint8_t* zeros, int64_t out,
                  int64_t in, char* data) {
  prefer_huge_pages(data, packed_bytes(format, out, in));
  pack_part(workers, format, codes, scales, zeros, out, in, data);
}

bool make_narrow(Workers& workers, bool is_bfloat16, const void* weight, const float* importance, int64_t out, int64_t in, int bits,
                 uint8_t* codes, uint16_t* scales, uint8_t* zeros) {
  Narrow to{bits, codes, scales, zeros};
  if (is_bfloat16) return narrow_weight(workers, static_cast<const BFloat16*>(weight), importance, out, in, to);
  return narrow_weight(workers, static_cast<const float*>(weight), importance, out, in, to);
}

void linear_rows(Workers& workers, const Linear& w, const float* x, int64_t rows, int64_t stride, const float* norm, float eps,
                 Into into, float* out, int64_t out_stride) {
  workers.reserve_rows(rows, w.in);
  workers.pool.run([&](int thread) { linear(workers, thread, w, {x, rows, w.in, stride, norm, eps}, into, out, out_stride); });
}

void embed_ids(Workers& workers, const Linear& table, const int64_t* ids, int64_t count, int64_t first, float* out) {
  workers.pool.run([&](int) { embed(workers, table, ids, count, first, out, table.in); });
}

void rope_store(Workers& workers, float* qkv, int64_t tokens, const HeadNorm& norm, float eps, const Rotation& rotation,
                const int64_t* positions, const int64_t* slots, const Heads& heads, AnyCache cache) {
  with_type(cache, [&](auto typed) {
    int64_t stride = (heads.num_q + 2 * heads.num_kv) * heads.dim;
    workers.pool.run([&](int) {
      norm_rope_store(workers, qkv, tokens, stride, norm, eps, rotation, positions, slots, heads, typed);
    });
  });
}

void attend(Workers& workers, const float* q, int64_t stride, const std::vector<Sequence>& sequences, const Heads& heads,
            int64_t window, const Scores& kind, AnyCache cache, float* out) {
  AttentionPlan plan;
  PartialRoom partial;
  plan_attention(sequences, heads, window, workers.pool.size(), plan);
  partial.reserve(plan, heads);
  with_type(cache, [&](auto typed) {
    workers.pool.run([&](int thread) {
      attention(workers, thread, q, stride, sequences, plan, heads, window, kind, typed, partial, out, heads.num_q * heads.dim);
    });
  });
}

void delta_net(Workers& workers, const DeltaNet& net, const DeltaInput& in, const std::vector<StateSequence>& sequences,
               const DeltaState& state, float* out) {
  workers.pool.run([&](int thread) { gated_delta_net(workers, thread, net, in, sequences, state, out, net.num_v * net.dim_v); });
}

// f(i) of rows 0 … n - 1, which share threads. One alone is not worth waking them.
template <class F>
void for_rows(Workers& workers, int64_t n, F&& f) {
  if (n == 1) return f(0);
  workers.pool.run([&](int) { workers.pool.share(n, 1, f); });
}

void sample_rows(Workers& workers, float* logits, int64_t rows, int64_t vocab, int64_t stride, const SamplingParams* params,
                 const LogitRules& rules, int32_t* ids) {
  for_rows(workers, rows, [&](int64_t r) {
    thread_local Sampler sampler;
    thread_local LogitChanges changes;
    float* row = logits + r * stride;
    int32_t mask = rules.mask_of == nullptr ? kNoMask : rules.mask_of[r];
    if (mask == kNotReady) {
      ids[r] = kNotReady;
      return;
    }
    if (rules.token_ids != nullptr) changes.penalize(row, vocab, params[r], rules.token_ids + rules.rows[r] * rules.stride);
    if (rules.bounds != nullptr) {
      int64_t begin = rules.bounds[rules.rows[r]], size = rules.bounds[rules.rows[r] + 1] - begin;
      changes.add(row, vocab, params[r], rules.ids + begin, rules.values + begin, size);
    }
    AllowedTokens allowed{row, mask == kNoMask ? nullptr : rules.masks + mask * rules.words};
    int64_t only = mask == kNoMask ? -1 : allowed.only(vocab);
    if (only >= 0)
      ids[r] = std::isfinite(row[only]) ? int32_t(only) : -1;
    else
      ids[r] = int32_t(mask == kNoMask ? sampler(AllTokens{row}, vocab, params[r]) : sampler(allowed, vocab, params[r]));
    changes.undo(row);
  });
  // Not before: several rows may share a history, in which there are tokens that only might come.
  for (int64_t r = 0; rules.token_ids != nullptr && r < rows; ++r)
    rules.token_ids[rules.rows[r] * rules.stride + params[r].position] = std::max(ids[r], 0);
}

void log_probabilities(Workers& workers, const float* logits, int64_t vocab, int64_t stride, const int64_t* rows, const int32_t* tokens,
                       int64_t n, int64_t num_top, int32_t* words) {
  for_rows(workers, n, [&](int64_t i) {
    thread_local LogProbabilities of_row;
    const float* row = logits + rows[i] * stride;
    of_row(row, vocab, std::max(tokens[i], 0), num_top, words + i * (1 + 2 * num_top));
  });
}

Model* create_model(Workers& workers, float eps, float scale, const Linear& embedding, const Linear& head, const float* norm) {
  return new Model(workers, eps, scale, embedding, head, norm);
}
void destroy_model(Model* model) { delete model; }
void set_rotation(Model& model, int64_t index, const Rotation& rotation) { model.set_rotation(index, rotation); }
void add_block(Model& model, const AnyBlock& block) {
  if (auto attention = std::get_if<AttentionBlock>(&block))
    for (void* rows : {attention->cache.k, attention->cache.v}) prefer_huge_pages(rows, attention->cache.bytes);
  model.add(block);
}
void forward(Model& model, const Step& step) { model.forward(step); }
void more_logits(Model& model, const int64_t* tokens, int64_t count, float* logits) { model.more_logits(tokens, count, logits); }
void hidden_rows(const Model& model, const int64_t* tokens, int64_t count, float* out) { model.hidden_rows(tokens, count, out); }

Model* add_draft_head(Model& model, const DraftWeights& weights) {
  model.drafter = std::make_shared<DraftHead>(model, weights);
  return &model.drafter->own();
}
const std::vector<Sequence>& last_sequences(const Model& model) { return model.sequences(); }
void draft(Model& model, const TokenTable& tokens, const std::vector<WantedDraft>& wanted, int64_t most, int32_t* out) {
  (*model.drafter)(tokens, wanted, most, out);
}

}  // namespace minisgl::cpu
