// The CPU kernels as functions of tensors. Handles are pointers to what was created here; their Python owners keep alive
// the tensors that these point into.
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "minisgl/cpu/model.h"

namespace minisgl::cpu {
namespace {

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

template <class T>
T* data_of(const TensorView& t, int bits) {
  TVM_FFI_CHECK(t.dtype().bits == bits && t.device().device_type == kDLCPU, TypeError) << "a tensor of " << bits << " bits on the CPU is wanted";
  TVM_FFI_CHECK(t.IsContiguous(), ValueError) << "the tensor is not contiguous";
  return static_cast<T*>(t.data_ptr());
}

template <class T>
T* data_of(const Optional<TensorView>& t, int bits) {
  return t.has_value() ? data_of<T>(t.value(), bits) : nullptr;
}

bool is_bfloat16(const TensorView& t) { return t.dtype().code == kDLBfloat && t.dtype().bits == 16; }

int64_t create_workers(int64_t threads) { return handle_of(new Workers(int(threads))); }
void destroy_workers(int64_t workers) { delete &at<Workers>(workers); }
int64_t panel_size() { return kPanel; }

void pack_weight(int64_t workers, TensorView weight, bool gated, TensorView packed, Optional<TensorView> scale) {
  bool to_int8 = scale.has_value();
  float* scales = data_of<float>(scale, 32);
  void* data = packed.data_ptr();
  if (is_bfloat16(weight))
    pack(at<Workers>(workers), data_of<BFloat16>(weight, 16), weight.size(0), weight.size(1), gated, to_int8, data, scales);
  else
    pack(at<Workers>(workers), data_of<float>(weight, 32), weight.size(0), weight.size(1), gated, to_int8, data, scales);
}

int64_t create_linear(TensorView packed, Optional<TensorView> scale, int64_t out, int64_t in, bool is_pair) {
  Type type = scale.has_value() ? Type::kInt8 : is_bfloat16(packed) ? Type::kBFloat16 : Type::kFloat32;
  return handle_of(new Linear{type, is_pair, out, in, packed.data_ptr(), data_of<float>(scale, 32), nullptr});
}
void destroy_linear(int64_t linear) { delete &at<Linear>(linear); }

Linear with_bias(int64_t handle, const Optional<TensorView>& bias) {
  Linear linear = at<Linear>(handle);
  linear.bias = data_of<float>(bias, 32);
  return linear;
}

// out (+)= norm(x) * wᵀ + bias, or silu(gate) * up. x, out: [tokens, …] float32 with contiguous rows.
void linear_rows(int64_t workers, int64_t weight, TensorView x, Optional<TensorView> norm, double eps, Optional<TensorView> bias,
                 int64_t into, TensorView out) {
  Workers& w = at<Workers>(workers);
  const Linear matrix = with_bias(weight, bias);
  static thread_local InputRoom room;
  InputRoom& own = room;
  own.reserve(x.size(0), matrix.in);
  Input input{static_cast<const float*>(x.data_ptr()), x.size(0), matrix.in, x.stride(0), data_of<float>(norm, 32), float(eps)};
  w.pool.run([&](int thread) {
    Rows rows = own.prepare(w, input, matrix.type);
    linear(w, thread, matrix, rows, Into(into), static_cast<float*>(out.data_ptr()), out.stride(0));
  });
}

void embed_ids(int64_t workers, int64_t table, TensorView ids, int64_t first, TensorView out) {
  Workers& w = at<Workers>(workers);
  w.pool.run([&](int) { embed(w, at<Linear>(table), data_of<int64_t>(ids, 64), ids.size(0), first, data_of<float>(out, 32), out.size(1)); });
}

// qkv: [tokens, num_q + 2 * num_kv, dim] float32, in place; k, v: [slots, num_kv, dim] float32 or bfloat16.
void rope_store(int64_t workers, TensorView qkv, Optional<TensorView> norm, double eps, TensorView angles, TensorView positions,
                TensorView slots, TensorView k, TensorView v) {
  Workers& w = at<Workers>(workers);
  Heads heads{qkv.size(1) - 2 * k.size(1), k.size(1), k.size(2), 1};
  auto call = [&]<class T>(Cache<T> cache) {
    w.pool.run([&](int) {
      norm_rope_store(w, data_of<float>(qkv, 32), qkv.size(0), qkv.size(1) * heads.dim, data_of<float>(norm, 32), float(eps),
                      data_of<float>(angles, 32), data_of<int64_t>(positions, 64), data_of<int64_t>(slots, 64), heads, cache);
    });
  };
  if (is_bfloat16(k))
    call(Cache<BFloat16>{data_of<BFloat16>(k, 16), data_of<BFloat16>(v, 16)});
  else
    call(Cache<float>{data_of<float>(k, 32), data_of<float>(v, 32)});
}

// sequences: [n, 4] int64: row of the page table, first token, number of tokens, position of the first.
std::vector<Sequence> sequences_of(TensorView sequences, TensorView pages) {
  const int64_t* table = data_of<int64_t>(sequences, 64);
  const int32_t* rows = data_of<int32_t>(pages, 32);
  std::vector<Sequence> result;
  for (int64_t i = 0; i < sequences.size(0); ++i, table += 4)
    result.push_back({table[1], table[2], table[3], rows + table[0] * pages.size(1)});
  return result;
}

// q: [tokens, num_q, dim] float32, perhaps with another stride between tokens; out: [tokens, num_q, dim].
void attend(int64_t workers, TensorView q, TensorView k, TensorView v, TensorView sequences, TensorView pages, int64_t page_size,
            int64_t window, TensorView out) {
  Workers& w = at<Workers>(workers);
  Heads heads{q.size(1), k.size(1), k.size(2), page_size};
  std::vector<Sequence> all = sequences_of(sequences, pages);
  AttentionPlan plan;
  PartialRoom partial;
  plan_attention(all, heads, window, w.pool.size(), plan);
  partial.partials.reserve(plan.num_partials);
  partial.results.reserve(plan.num_partials * heads.dim);
  auto call = [&]<class T>(Cache<T> cache) {
    w.pool.run([&](int thread) {
      attention(w, thread, static_cast<const float*>(q.data_ptr()), q.stride(0), all, plan, heads, window, cache, partial,
                data_of<float>(out, 32), heads.num_q * heads.dim);
    });
  };
  if (is_bfloat16(k))
    call(Cache<BFloat16>{data_of<BFloat16>(k, 16), data_of<BFloat16>(v, 16)});
  else
    call(Cache<float>{data_of<float>(k, 32), data_of<float>(v, 32)});
}

Sampling sampling_of(TensorView temperature, TensorView top_k, TensorView top_p, TensorView min_p, TensorView seed, TensorView position) {
  return {data_of<float>(temperature, 32), data_of<int64_t>(top_k, 64), data_of<float>(top_p, 32),
          data_of<float>(min_p, 32), data_of<uint64_t>(seed, 64), data_of<int64_t>(position, 64)};
}

// logits: [n, vocab] float32 with contiguous rows → out: [n] int64.
void sample(int64_t workers, TensorView logits, TensorView temperature, TensorView top_k, TensorView top_p, TensorView min_p,
            TensorView seed, TensorView position, TensorView out) {
  Workers& w = at<Workers>(workers);
  Sampling params = sampling_of(temperature, top_k, top_p, min_p, seed, position);
  std::vector<Sampler> samplers(w.pool.size());
  int64_t* ids = data_of<int64_t>(out, 64);
  w.pool.run([&](int thread) {
    w.pool.share(logits.size(0), 1, [&](int64_t r) {
      ids[r] = samplers[thread](static_cast<const float*>(logits.data_ptr()) + r * logits.stride(0), logits.size(1), params, r);
    });
  });
}

// k, v: [layers, slots, num_kv, dim].
int64_t create_model(int64_t workers, int64_t num_q, double eps, int64_t embedding, int64_t head, TensorView norm, TensorView k,
                     TensorView v) {
  auto model = new Model(at<Workers>(workers), Heads{num_q, k.size(2), k.size(3), 1}, float(eps), is_bfloat16(k));
  model->embedding = at<Linear>(embedding);
  model->head = at<Linear>(head);
  model->norm = data_of<float>(norm, 32);
  model->k_cache = k.data_ptr();
  model->v_cache = v.data_ptr();
  model->num_slots = k.size(1);
  return handle_of(model);
}
void destroy_model(int64_t model) { delete &at<Model>(model); }

void add_layer(int64_t model, int64_t qkv, Optional<TensorView> qkv_bias, int64_t o, Optional<TensorView> o_bias, int64_t gate_up,
               Optional<TensorView> gate_up_bias, int64_t down, Optional<TensorView> down_bias, TensorView input_norm,
               TensorView post_norm, Optional<TensorView> qk_norm, int64_t window) {
  at<Model>(model).layers.push_back({with_bias(qkv, qkv_bias), with_bias(o, o_bias), with_bias(gate_up, gate_up_bias),
                                     with_bias(down, down_bias),
                                     data_of<float>(input_norm, 32), data_of<float>(post_norm, 32), data_of<float>(qk_norm, 32), window});
}

void forward(int64_t model, TensorView ids, TensorView positions, TensorView slots, TensorView sequences, TensorView pages,
             int64_t page_size, TensorView angles, Optional<TensorView> logit_tokens, TensorView logits) {
  Step step{};
  step.num_tokens = ids.size(0);
  step.ids = data_of<int64_t>(ids, 64);
  step.positions = data_of<int64_t>(positions, 64);
  step.slots = data_of<int64_t>(slots, 64);
  step.sequences = sequences_of(sequences, pages);
  step.page_size = page_size;
  step.angles = data_of<float>(angles, 32);
  step.logit_tokens = data_of<int64_t>(logit_tokens, 64);
  step.num_logits = logits.size(0);
  step.logits = data_of<float>(logits, 32);
  at<Model>(model).forward(step);
}

void more_logits(int64_t model, TensorView tokens, TensorView logits) {
  at<Model>(model).more_logits(data_of<int64_t>(tokens, 64), tokens.size(0), data_of<float>(logits, 32));
}

}  // namespace
}  // namespace minisgl::cpu

TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_workers, minisgl::cpu::create_workers);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(destroy_workers, minisgl::cpu::destroy_workers);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(panel_size, minisgl::cpu::panel_size);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(pack_weight, minisgl::cpu::pack_weight);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_linear, minisgl::cpu::create_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(destroy_linear, minisgl::cpu::destroy_linear);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(linear_rows, minisgl::cpu::linear_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(embed_ids, minisgl::cpu::embed_ids);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_store, minisgl::cpu::rope_store);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(attend, minisgl::cpu::attend);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, minisgl::cpu::sample);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(create_model, minisgl::cpu::create_model);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(destroy_model, minisgl::cpu::destroy_model);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(add_layer, minisgl::cpu::add_layer);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(forward, minisgl::cpu::forward);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(more_logits, minisgl::cpu::more_logits);
