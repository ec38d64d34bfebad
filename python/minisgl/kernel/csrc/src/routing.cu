// Which experts tokens go through (minisgl/routing.cuh), where a kernel that sorts them, or that multiplies, is next.
#include "minisgl/routing.cuh"

#include <tvm/ffi/optional.h>

namespace minisgl {
namespace {

using tvm::ffi::Optional;

constexpr int kMost = 1024;
constexpr int kThreads = 128;

struct Args {
  float* weights;  // [tokens, top_k]
  int* experts;    // [tokens, top_k]
  int* order;      // [tokens * top_k], or null
  int* blocks;     // [tokens * top_k, 4], or null
  int64_t stride;  // of logits
  int tokens, num_experts, top_k;
  bool renormalize;
};

// A warp for each token.
template <typename L>
__global__ void __launch_bounds__(kThreads) route_kernel(const L* logits, const __grid_constant__ Args args) {
  int token = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  pdl_wait();
  pdl_trigger();
  if (token >= args.tokens) return;
  Choice choice = choose_experts<kMost>(logits + token * args.stride, args.num_experts, args.top_k, args.renormalize);
  if (lane >= args.top_k) return;
  int pair = token * args.top_k + lane;
  args.weights[pair] = choice.weight, args.experts[pair] = choice.expert;
  if (args.order == nullptr) return;
  args.order[pair] = pair;
  reinterpret_cast<int4*>(args.blocks)[pair] = make_int4(choice.expert, pair, pair + 1, 0);
}

template <typename L>
void run(const TensorView& logits, const Args& args) {
  LaunchConfig config;
  config.grid = dim3(static_cast<unsigned>((args.tokens + kThreads / 32 - 1) / (kThreads / 32)));
  config.block = dim3(kThreads);
  launch(config, current_stream(logits), route_kernel<L>, static_cast<const L*>(logits.data_ptr()), args);
}

template <typename E>
E* place_of(const TensorView& t, int64_t size, bool is_right) {
  MINISGL_CHECK(is_right && t.IsContiguous() && t.numel() == size);
  return static_cast<E*>(t.data_ptr());
}

// logits: [tokens, num_experts], of up to 1,024 experts. Where there are `order` and `blocks`, each pair is a block, in order.
void route(TensorView logits, bool renormalize, TensorView weights, TensorView experts, Optional<TensorView> order,
           Optional<TensorView> blocks) {
  MINISGL_CHECK(logits.ndim() == 2 && logits.stride(1) == 1 && weights.ndim() == 2 && weights.size(0) == logits.size(0));
  int64_t tokens = logits.size(0), num_experts = logits.size(1), top_k = weights.size(1), pairs = tokens * top_k;
  MINISGL_CHECK(0 < top_k && top_k <= 32 && top_k <= num_experts && num_experts <= kMost && pairs < (1 << 30));
  MINISGL_CHECK(order.has_value() == blocks.has_value());
  if (tokens == 0) return;
  Args args{place_of<float>(weights, pairs, is_fp32(weights)),
            place_of<int>(experts, pairs, is_int32(experts)),
            order.has_value() ? place_of<int>(*order, pairs, is_int32(*order)) : nullptr,
            blocks.has_value() ? place_of<int>(*blocks, pairs * 4, is_int32(*blocks)) : nullptr,
            logits.stride(0),
            static_cast<int>(tokens),
            static_cast<int>(num_experts),
            static_cast<int>(top_k),
            renormalize};
  if (is_bf16(logits)) return run<__nv_bfloat16>(logits, args);
  if (is_fp16(logits)) return run<__half>(logits, args);
  MINISGL_CHECK(is_fp32(logits)) << "expected bfloat16, float16 or float32";
  run<float>(logits, args);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(route, minisgl::route);

}  // namespace minisgl
