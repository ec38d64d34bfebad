// The CPU kernels as functions of tensors, for Python. Handles are pointers to what was created here; their Python owners
// keep alive the tensors that these point into.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>
#include <tvm/ffi/string.h>

#include "minisgl/cpu/api.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O1")  // each call takes a microsecond as it is; optimising these takes the compiler ten seconds
#endif

namespace {

using namespace minisgl;
using namespace minisgl::cpu;
using tvm::ffi::Optional;
using tvm::ffi::TensorView;

template <class T>
T& at(int64_t handle) {
  return *reinterpret_cast<T*>(handle);
}

template <class T>
int64_t handle_of(T* object) {
  return reinterpret_cast<int64_t>(object);
}

// A tensor of numbers as wide as T, whose rows (and, but for `is_strided`, all) are contiguous.
template <class T>
T* data_of(const TensorView& t, bool is_strided = false) {
  TVM_FFI_CHECK(t.dtype().bits == 8 * sizeof(T) && t.device().device_type == kDLCPU, TypeError)
      << "a tensor of " << 8 * sizeof(T) << " bits on the CPU is wanted";
  TVM_FFI_CHECK(is_strided ? t.stride(t.ndim() - 1) == 1 : t.IsContiguous(), ValueError) << "the tensor is not contiguous";
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data_of(const Optional<TensorView>& t) {
  return t.has_value() ? data_of<T>(t.value()) : nullptr;
}

bool is_bfloat16(const TensorView& t) { return t.dtype().code == kDLBfloat; }
Type type_of(const TensorView& t) {
  return is_bfloat16(t) ? Type::kBFloat16 : t.dtype().bits == 16 ? Type::kFloat16 : Type::kFloat32;
}

template <class T>
AnyCache cache_of(CacheType type, const TensorView& k, const TensorView& v) {
  return {type, data_of<T>(k), data_of<T>(v), k.numel() * int64_t(sizeof(T))};
}

AnyCache cache_of(const TensorView& k, const TensorView& v) {
  if (is_bfloat16(k)) return cache_of<BFloat16>(CacheType::kBFloat16, k, v);
  if (k.dtype().bits == 16) return cache_of<Float16>(CacheType::kFloat16, k, v);
  if (k.dtype().bits == 8) return cache_of<int8_t>(CacheType::kInt8, k, v);
  return cache_of<float>(CacheType::kFloat32, k, v);
}

// sequences: [n, 4] int64: row of the page table, first token, number of tokens, position of the first.
std::vector<Sequence> sequences_of(const TensorView& sequences, const TensorView& pages) {
  const int64_t* table = data_of<int64_t>(sequences);
  const int32_t* rows = data_of<int32_t>(pages);
  std::vector<Sequence> result;
  for (int64_t i = 0; i < sequences.size(0); ++i, table += 4)
    result.push_back({table[1], table[2], table[3], rows + table[0] * pages.size(1), table[0]});
  return result;
}

DeltaNet net_of(const TensorView& conv, const TensorView& a_log, const TensorView& dt_bias, const TensorView& norm, double eps,
                const TensorView& memory) {
  int64_t num_v = memory.size(1), dim_k = memory.size(2), dim_v = memory.size(3), num_k = (conv.size(0) - num_v * dim_v) / (2 * dim_k);
  return {num_k, num_v, dim_k, dim_v, conv.size(1), data_of<float>(conv), data_of<float>(a_log), data_of<float>(dt_bias),
          data_of<float>(norm), float(eps)};
}

// slots: [n], offsets: [n + 1], held, tried: [n] int64.
std::vector<StateSequence> state_sequences_of(const TensorView& slots, const TensorView& offsets, const Optional<TensorView>& held,
                                              const Optional<TensorView>& tried) {
  const int64_t *slot = data_of<int64_t>(slots), *first = data_of<int64_t>(offsets);
  const int64_t *before = data_of<int64_t>(held), *last = data_of<int64_t>(tried);
  std::vector<StateSequence> result;
  for (int64_t i = 0; i < slots.size(0); ++i)
    result.push_back({slot[i], first[i], first[i + 1] - first[i], before ? before[i] : 0, last ? last[i] : 0});
  return result;
}

DeltaState state_of(const TensorView& past, const TensorView& memory, const TensorView& kept) {
  return {data_of<float>(past), data_of<float>(memory), data_of<float>(kept), kept.size(1)};
}

Linear with_bias(int64_t handle, const Optional<TensorView>& bias) {
  Linear linear = at<Linear>(handle);
  linear.bias = data_of<float>(bias);
  return linear;
}

int64_t py_create_workers(int64_t threads) { return handle_of(create_workers(int(threads))); }
void py_destroy_workers(int64_t workers) { destroy_workers(&at<Workers>(workers)); }
int64_t py_panel_size() { return panel_size(); }

void py_pack_weight(int64_t workers, TensorView weight, bool is_pair, TensorView packed, Optional<TensorView> scale) {
  Type type = type_of(weight);
  const void* plain = type == Type::kFloat32 ? static_cast<void*>(data_of<float>(weight)) : data_of<uint16_t>(weight);
  pack_weight(at<Workers>(workers), type, plain, weight.size(0), weight.size(1), is_pair, packed.data_ptr(), data_of<float>(scale));
}

int64_t py_create_linear(TensorView packed, Optional<TensorView> scale, int64_t out, int64_t in, bool is_pair) {
  Type type = scale.has_value() ? Type::kInt8 : type_of(packed);
  return handle_of(new Linear{type, is_pair, out, in, packed.data_ptr(), data_of<float>(scale), nullptr});
}

// A weight of few bits, whose parts are then added from its first row on.
int64_t py_create_packed(int64_t out, int64_t in, bool is_pair, Optional<TensorView> columns) {
  auto linear = new Linear{Type::kPacked, is_pair, out, in};
  linear->columns = data_of<int64_t>(columns);
  return handle_of(linear);
}

// How much memory rows take; -1 where there is no kernel for them.
int64_t py_packed_bytes(tvm::ffi::String name, int64_t out, int64_t in, int64_t group, bool has_zeros) {
  Format format = format_of(name, in, group, has_zeros, false);
  return format.bits == 0 ? -1 : packed_bytes(format, out, in);
}

void add_part(Linear& linear, const Format& format, int64_t out, char* data) {
  int64_t first = linear.parts.empty() ? 0 : linear.parts.back().first + linear.parts.back().out;
  linear.parts.push_back({format, first, out, data});
}

// rows: [out, bytes of a row] uint8; grid: [codes, values of a code] uint8.
void py_add_blocks(int64_t workers, int64_t weight, tvm::ffi::String name, TensorView rows, Optional<TensorView> grid,
                   TensorView packed) {
  Linear& linear = at<Linear>(weight);
  add_part(linear, format_of(name, linear.in, 0, false, false), rows.size(0), data_of<char>(packed));
  pack_blocks(at<Workers>(workers), name, data_of<uint8_t>(rows, true), rows.stride(0), rows.size(0), linear.in,
              data_of<uint8_t>(grid), data_of<char>(packed));
}

// codes: [out, in * bits / 8] uint8; scales: [out, in / group] of 16 bits; zeros: uint8.
void py_add_grouped(int64_t workers, int64_t weight, tvm::ffi::String name, TensorView codes, TensorView scales,
                    Optional<TensorView> zeros, TensorView packed) {
  Linear& linear = at<Linear>(weight);
  Format format = format_of(name, linear.in, linear.in / scales.size(1), zeros.has_value(), is_bfloat16(scales));
  add_part(linear, format, codes.size(0), data_of<char>(packed));
  pack_grouped(at<Workers>(workers), format, data_of<uint8_t>(codes), data_of<uint16_t>(scales), data_of<uint8_t>(zeros), codes.size(0),
               linear.in, data_of<char>(packed));
}

// weight: [out, in] float32 or bfloat16; importance: [in] float32.
bool py_make_narrow(int64_t workers, TensorView weight, Optional<TensorView> importance, TensorView codes, TensorView scales,
                    Optional<TensorView> zeros) {
  const void* plain = is_bfloat16(weight) ? data_of<BFloat16>(weight) : static_cast<void*>(data_of<float>(weight));
  int bits = int(codes.size(1) * 8 / weight.size(1));
  return make_narrow(at<Workers>(workers), is_bfloat16(weight), plain, data_of<float>(importance), weight.size(0), weight.size(1), bits,
                     data_of<uint8_t>(codes), data_of<uint16_t>(scales), data_of<uint8_t>(zeros));
}

void py_destroy_linear(int64_t linear) { delete &at<Linear>(linear); }

void py_linear_rows(int64_t workers, int64_t weight, TensorView x, Optional<TensorView> norm, double eps, Optional<TensorView> bias,
                    int64_t into, TensorView out) {
  linear_rows(at<Workers>(workers), with_bias(weight, bias), data_of<float>(x, true), x.size(0), x.stride(0), data_of<float>(norm),
              float(eps), Into(into), data_of<float>(out, true), out.stride(0));
}

void py_embed_ids(int64_t workers, int64_t table, TensorView ids, int64_t first, TensorView out) {
  embed_ids(at<Workers>(workers), at<Linear>(table), data_of<int64_t>(ids), ids.size(0), first, data_of<float>(out));
}

// qkv: [tokens, num_q + 2 * num_kv, dim] float32, in place; k, v: [slots, num_kv, dim] floats,
// or [slots, num_kv, dim + 4] int8.
void py_rope_store(int64_t workers, TensorView qkv, Optional<TensorView> norm, double eps, TensorView cosines, TensorView sines,
                   TensorView slots, TensorView k, TensorView v) {
  Heads heads{qkv.size(1) - 2 * k.size(1), k.size(1), qkv.size(2), 1};
  Rotation rotation{data_of<float>(cosines), data_of<float>(sines)};
  rope_store(at<Workers>(workers), data_of<float>(qkv), qkv.size(0), {data_of<float>(norm), false}, float(eps), rotation, nullptr,
             data_of<int64_t>(slots), heads, cache_of(k, v));
}

// q: [tokens, num_q, dim] float32, perhaps with another stride between tokens; out: [tokens, num_q, dim]. cap: 0: none; sinks:
// [num_q] float32.
void py_attend(int64_t workers, TensorView q, TensorView k, TensorView v, TensorView sequences, TensorView pages, int64_t page_size,
               int64_t window, double cap, Optional<TensorView> sinks, TensorView out) {
  Heads heads{q.size(1), k.size(1), q.size(2), page_size};
  attend(at<Workers>(workers), data_of<float>(q, true), q.stride(0), sequences_of(sequences, pages), heads, window,
         {float(cap), data_of<float>(sinks)}, cache_of(k, v), data_of<float>(out));
}

// qkvz: [tokens, 2 * num_k * dim_k + 2 * num_v * dim_v], ba: [tokens, 2 * num_v], both float32, perhaps with other strides
// between tokens; past: [slots, channels, width - 1]; memory: [slots, num_v, dim_k, dim_v]; slots: [n], offsets: [n + 1] int64;
// out: [tokens, num_v * dim_v].
void py_delta_net(int64_t workers, TensorView qkvz, TensorView ba, TensorView conv, TensorView a_log, TensorView dt_bias, TensorView norm,
                  double eps, TensorView past, TensorView memory, TensorView kept, TensorView slots, TensorView offsets,
                  Optional<TensorView> held, Optional<TensorView> tried, TensorView out) {
  DeltaNet net = net_of(conv, a_log, dt_bias, norm, eps, memory);
  DeltaInput in{data_of<float>(qkvz, true), qkvz.stride(0), data_of<float>(ba, true), ba.stride(0)};
  delta_net(at<Workers>(workers), net, in, state_sequences_of(slots, offsets, held, tried), state_of(past, memory, kept),
            data_of<float>(out));
}

// logits: [n, vocab] float32; params: n records, as numbers of 32 bits; the rest as in `LogitRules` → out: [n] int32.
void py_sample(int64_t workers, TensorView logits, TensorView params, TensorView out, Optional<TensorView> token_ids,
               Optional<TensorView> rows, Optional<TensorView> bounds, Optional<TensorView> ids, Optional<TensorView> values,
               Optional<TensorView> masks, Optional<TensorView> mask_of) {
  TVM_FFI_CHECK(size_t(params.numel()) * 4 == size_t(logits.size(0)) * sizeof(SamplingParams), ValueError) << "not these records";
  LogitRules rules{data_of<int32_t>(token_ids), token_ids.has_value() ? token_ids.value().size(1) : 0, data_of<int64_t>(rows),
                   data_of<int64_t>(bounds), data_of<int32_t>(ids), data_of<float>(values), data_of<uint32_t>(masks),
                   masks.has_value() ? masks.value().size(1) : 0, data_of<int32_t>(mask_of)};
  TVM_FFI_CHECK(rules.masks == nullptr || rules.words * 32 >= logits.size(1), ValueError) << "the masks are too short";
  sample_rows(at<Workers>(workers), data_of<float>(logits, true), logits.size(0), logits.size(1), logits.stride(0),
              reinterpret_cast<const SamplingParams*>(data_of<int32_t>(params)), rules, data_of<int32_t>(out));
}

// logits: [m, vocab] float32; rows: [n] int64; tokens: [n] int32; words: [n, 1 + 2k] int32.
void py_log_probabilities(int64_t workers, TensorView logits, TensorView rows, TensorView tokens, TensorView words) {
  log_probabilities(at<Workers>(workers), data_of<float>(logits, true), logits.size(1), logits.stride(0), data_of<int64_t>(rows),
                    data_of<int32_t>(tokens), rows.numel(), words.size(1) / 2, data_of<int32_t>(words));
}

int64_t py_create_model(int64_t workers, double eps, double scale, int64_t embedding, int64_t head, TensorView norm) {
  return handle_of(create_model(at<Workers>(workers), float(eps), float(scale), at<Linear>(embedding), at<Linear>(head), data_of<float>(norm)));
}
void py_destroy_model(int64_t model) { destroy_model(&at<Model>(model)); }

// cosines, sines: [positions, 1, dim].
void py_set_rotation(int64_t model, int64_t index, TensorView cosines, TensorView sines) {
  set_rotation(at<Model>(model), index, {data_of<float>(cosines), data_of<float>(sines)});
}

void py_add_attention(int64_t model, int64_t qkv, Optional<TensorView> qkv_bias, int64_t o, Optional<TensorView> o_bias,
                      Optional<TensorView> before, Optional<TensorView> after, Optional<TensorView> norm, bool is_wide,
                      int64_t window, int64_t rotation, double cap, Optional<TensorView> sinks, bool has_gates, TensorView k, TensorView v) {
  int64_t dim = k.size(2) - (k.dtype().bits == 8 ? int64_t(sizeof(float)) : 0);
  Heads heads{at<Linear>(o).in / dim, k.size(1), dim, 1};
  add_block(at<Model>(model), AttentionBlock{with_bias(qkv, qkv_bias), with_bias(o, o_bias), data_of<float>(before), data_of<float>(after),
                                             {data_of<float>(norm), is_wide}, heads, cache_of(k, v), window, rotation,
                                             {float(cap), data_of<float>(sinks)}, has_gates});
}

void py_add_delta_net(int64_t model, int64_t qkvz, Optional<TensorView> qkvz_bias, int64_t ba, Optional<TensorView> ba_bias, int64_t o,
                      Optional<TensorView> o_bias, Optional<TensorView> before, Optional<TensorView> after, TensorView conv,
                      TensorView a_log, TensorView dt_bias, TensorView norm, double eps, TensorView past, TensorView memory, TensorView kept) {
  add_block(at<Model>(model), DeltaBlock{with_bias(qkvz, qkvz_bias), with_bias(ba, ba_bias), with_bias(o, o_bias), data_of<float>(before),
                                         data_of<float>(after), net_of(conv, a_log, dt_bias, norm, eps, memory),
                                         state_of(past, memory, kept)});
}

void py_add_short_conv(int64_t model, int64_t in, Optional<TensorView> in_bias, int64_t o, Optional<TensorView> o_bias,
                       Optional<TensorView> before, Optional<TensorView> after, TensorView weight, Optional<TensorView> bias,
                       TensorView past, TensorView kept) {
  ShortConv net{weight.size(0), weight.size(1), data_of<float>(weight), data_of<float>(bias), data_of<float>(past), data_of<float>(kept),
                kept.size(1)};
  add_block(at<Model>(model), ConvBlock{with_bias(in, in_bias), with_bias(o, o_bias), data_of<float>(before), data_of<float>(after), net});
}

void py_add_mlp(int64_t model, int64_t gate_up, Optional<TensorView> gate_up_bias, int64_t down, Optional<TensorView> down_bias,
                Optional<TensorView> before, Optional<TensorView> after, tvm::ffi::String activation) {
  add_block(at<Model>(model), MlpBlock{with_bias(gate_up, gate_up_bias), with_bias(down, down_bias), data_of<float>(before),
                                       data_of<float>(after), activation == "silu" ? Into::kSilu : Into::kGelu});
}

void py_forward(int64_t model, TensorView ids, TensorView positions, TensorView slots, TensorView window_slots, TensorView sequences,
                TensorView pages, TensorView window_pages, int64_t page_size, Optional<TensorView> logit_tokens, TensorView logits,
                TensorView drafted, Optional<TensorView> words, Optional<TensorView> states, Optional<TensorView> samples) {
  Step step{};
  step.num_tokens = ids.size(0);
  step.ids = data_of<int64_t>(ids);
  step.positions = data_of<int64_t>(positions);
  step.all = {data_of<int64_t>(slots), sequences_of(sequences, pages)};
  step.windowed = {data_of<int64_t>(window_slots), sequences_of(sequences, window_pages)};
  step.page_size = page_size;
  step.logit_tokens = data_of<int64_t>(logit_tokens);
  step.num_logits = logits.size(0);
  step.logits = data_of<float>(logits);
  step.held = data_of<int64_t>(drafted), step.tried = step.held + drafted.numel() / 2;
  if (words.has_value())
    step.masks = {words.value().size(0), words.value().size(1), data_of<uint32_t>(words), data_of<int32_t>(states), data_of<int64_t>(samples)};
  forward(at<Model>(model), step);
}

void py_more_logits(int64_t model, TensorView tokens, TensorView logits) {
  more_logits(at<Model>(model), data_of<int64_t>(tokens), tokens.size(0), data_of<float>(logits));
}

void py_hidden_rows(int64_t model, TensorView tokens, TensorView out) {
  hidden_rows(at<Model>(model), data_of<int64_t>(tokens), tokens.size(0), data_of<float>(out));
}

int64_t py_add_draft_head(int64_t model, int64_t both, int64_t head, TensorView embedding, TensorView hidden, TensorView last) {
  DraftWeights weights{at<Linear>(both), at<Linear>(head), data_of<float>(embedding), data_of<float>(hidden), data_of<float>(last)};
  return handle_of(add_draft_head(at<Model>(model), weights));
}

// After a step. token_ids: [rows, stride] int32; input_ids: [tokens] int64, of the step, drafts included; logit_tokens: [n] int64, ascending: the
// tokens after which `ids`, [n] int32, were sampled; counts: [sequences] int64: tokens that are to be told after the last one that
// is kept, each one before which the draft was right; out: [sequences, most] int32.
void py_draft(int64_t model, TensorView token_ids, TensorView input_ids, TensorView logit_tokens, TensorView ids, TensorView counts,
              TensorView out) {
  const std::vector<Sequence>& all = last_sequences(at<Model>(model));
  const int64_t *inputs = data_of<int64_t>(input_ids), *samples = data_of<int64_t>(logit_tokens), *count = data_of<int64_t>(counts);
  const int64_t* samples_end = samples + ids.size(0);
  std::vector<WantedDraft> drafts;
  for (size_t i = 0; i < all.size(); ++i) {
    int64_t last_token = all[i].first + all[i].count - 1;
    const int64_t* sample = std::lower_bound(samples, samples_end, all[i].first);
    if (count[i] <= 0 || sample == samples_end) continue;
    const int32_t* sampled = data_of<int32_t>(ids) + (sample - samples);
    int64_t token = *sample;
    while (token < last_token && *sampled == inputs[token + 1]) ++token, ++sampled;
    drafts.push_back({int64_t(i), token - all[i].first + 1, count[i]});
  }
  TokenTable tokens{data_of<int32_t>(token_ids), token_ids.size(1)};
  draft(at<Model>(model), tokens, drafts, out.size(1), data_of<int32_t>(out));
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_workers, py_create_workers);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(destroy_workers, py_destroy_workers);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(panel_size, py_panel_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_weight, py_pack_weight);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_linear, py_create_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_packed, py_create_packed);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(packed_bytes, py_packed_bytes);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_blocks, py_add_blocks);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_grouped, py_add_grouped);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(make_narrow, py_make_narrow);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(destroy_linear, py_destroy_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_rows, py_linear_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(embed_ids, py_embed_ids);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_store, py_rope_store);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attend, py_attend);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(delta_net, py_delta_net);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, py_sample);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(log_probabilities, py_log_probabilities);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_model, py_create_model);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(destroy_model, py_destroy_model);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(set_rotation, py_set_rotation);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_attention, py_add_attention);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_delta_net, py_add_delta_net);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_short_conv, py_add_short_conv);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_mlp, py_add_mlp);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward, py_forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(more_logits, py_more_logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(hidden_rows, py_hidden_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_draft_head, py_add_draft_head);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(draft, py_draft);
