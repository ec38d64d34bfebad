// What every step needs before its first layer, from tables that stay on the GPU: ids, positions, KV slots, lengths and
// rotary angles. It runs inside the captured graph, so that the host sends only rows, positions and table updates.
#include <minisgl/common.cuh>

#include <algorithm>

namespace minisgl {

namespace {

struct PrepareArgs {
  const int32_t* rows;        // [n] row of both tables
  const int32_t* positions;   // [n] of the token to compute
  const int32_t* token_ids;   // [num_rows, max_len]
  const int32_t* page_table;  // [num_rows, max_pages]
  const float* cos_sin;       // [max_positions, 2 * head_dim]
  int64_t* out_ids;           // [n], and so on
  int64_t* out_positions;
  int64_t* out_slots;
  int32_t* out_seq_lens;      // or null
  float* out_cos;             // [n, head_dim]
  float* out_sin;
  int64_t max_len, max_pages, page_size;
  int head_dim;
};

// One block per token.
__global__ void __launch_bounds__(128) prepare_kernel(const PrepareArgs args) {
  const int64_t token = blockIdx.x;
  pdl_trigger();
  pdl_wait();
  const int64_t row = args.rows[token], position = args.positions[token];
  if (threadIdx.x == 0) {
    args.out_ids[token] = args.token_ids[row * args.max_len + position];
    args.out_positions[token] = position;
    if (args.out_seq_lens != nullptr) args.out_seq_lens[token] = static_cast<int32_t>(position) + 1;
  }
  if (threadIdx.x == 32 % blockDim.x) {
    const int64_t page = args.page_table[row * args.max_pages + position / args.page_size];
    args.out_slots[token] = page * args.page_size + position % args.page_size;
  }
  using Float4 = Vec<float, 4>;
  const int num_vecs = args.head_dim / 4;
  const Float4* source = reinterpret_cast<const Float4*>(args.cos_sin + position * 2 * args.head_dim);
  Float4* cos = reinterpret_cast<Float4*>(args.out_cos + token * args.head_dim);
  Float4* sin = reinterpret_cast<Float4*>(args.out_sin + token * args.head_dim);
  for (int v = threadIdx.x; v < 2 * num_vecs; v += blockDim.x) {
    (v < num_vecs ? cos[v] : sin[v - num_vecs]) = source[v];
  }
}

struct Updates {
  int32_t* target;
  const void* index;
  const int32_t* value;
  int64_t count;  // of (index, value) pairs
  int64_t limit;  // elements of `target`
};

template <typename Index>
__device__ __forceinline__ void update_one(const Updates& updates, int64_t i) {
  const int64_t index = static_cast<const Index*>(updates.index)[i];
  if (index >= 0 && index < updates.limit) updates.target[index] = updates.value[i];  // -1 fills a fixed-size list
}

template <typename Index>
__global__ void __launch_bounds__(256) scatter_kernel(const Updates first, const Updates second) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  pdl_trigger();
  pdl_wait();
  if (i < first.count) update_one<Index>(first, i);
  else if (i - first.count < second.count) update_one<Index>(second, i - first.count);
}

template <typename Index>
void launch_scatter(const Updates& first, const Updates& second, cudaStream_t stream) {
  const int64_t total = first.count + second.count;
  if (total == 0) return;
  launch(LaunchConfig{dim3((total + 255) / 256), dim3(256)}, stream, scatter_kernel<Index>, first, second);
}

void check_vector(const TensorView& t, bool is_right_type, int64_t size) {
  MINISGL_CHECK(is_right_type && t.IsContiguous() && t.numel() == size);
}

}  // namespace

// rows, positions: [n] int32; the outputs: see PrepareArgs. n tokens of any mix of prefill and decode; seq_lens, the
// length of each token's sequence up to and with it, is that of the step's sequences only where all of them decode.
void prepare(TensorView rows, TensorView positions, TensorView token_ids, TensorView page_table, int64_t page_size,
             TensorView cos_sin, TensorView out_ids, TensorView out_positions, TensorView out_slots,
             tvm::ffi::Optional<TensorView> out_seq_lens, TensorView out_cos, TensorView out_sin) {
  const int64_t num_tokens = rows.numel();
  if (num_tokens == 0) return;
  MINISGL_CHECK(page_size > 0 && cos_sin.ndim() == 2 && cos_sin.size(1) % 8 == 0);
  const int64_t head_dim = cos_sin.size(1) / 2;
  check_vector(rows, is_int32(rows), num_tokens);
  check_vector(positions, is_int32(positions), num_tokens);
  MINISGL_CHECK(is_int32(token_ids) && token_ids.ndim() == 2 && token_ids.IsContiguous());
  MINISGL_CHECK(is_int32(page_table) && page_table.ndim() == 2 && page_table.IsContiguous());
  MINISGL_CHECK(is_fp32(cos_sin) && cos_sin.IsContiguous());
  check_vector(out_ids, is_int64(out_ids), num_tokens);
  check_vector(out_positions, is_int64(out_positions), num_tokens);
  check_vector(out_slots, is_int64(out_slots), num_tokens);
  check_vector(out_cos, is_fp32(out_cos), num_tokens * head_dim);
  check_vector(out_sin, is_fp32(out_sin), num_tokens * head_dim);
  int32_t* seq_lens = nullptr;
  if (out_seq_lens.has_value()) {
    const TensorView lens = out_seq_lens.value();
    check_vector(lens, is_int32(lens), num_tokens);
    seq_lens = static_cast<int32_t*>(lens.data_ptr());
  }
  for (const TensorView& t : {cos_sin, out_cos, out_sin}) {
    MINISGL_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0);
  }
  const PrepareArgs args{static_cast<const int32_t*>(rows.data_ptr()),
                         static_cast<const int32_t*>(positions.data_ptr()),
                         static_cast<const int32_t*>(token_ids.data_ptr()),
                         static_cast<const int32_t*>(page_table.data_ptr()),
                         static_cast<const float*>(cos_sin.data_ptr()),
                         static_cast<int64_t*>(out_ids.data_ptr()),
                         static_cast<int64_t*>(out_positions.data_ptr()),
                         static_cast<int64_t*>(out_slots.data_ptr()),
                         seq_lens,
                         static_cast<float*>(out_cos.data_ptr()),
                         static_cast<float*>(out_sin.data_ptr()),
                         token_ids.size(1),
                         page_table.size(1),
                         page_size,
                         static_cast<int>(head_dim)};
  launch(LaunchConfig{dim3(num_tokens), dim3(64)}, current_stream(rows), prepare_kernel, args);
}

// target.flatten()[index[i]] = value[i]; negative indices are skipped, duplicates leave either value.
// target: int32, contiguous; index: [m] int32 or int64; value: [m] int32.
void scatter(TensorView target, TensorView index, TensorView value) {
  const int64_t count = index.numel();
  MINISGL_CHECK(is_int32(target) && target.IsContiguous());
  MINISGL_CHECK((is_int32(index) || is_int64(index)) && index.IsContiguous());
  check_vector(value, is_int32(value), count);
  const Updates updates{static_cast<int32_t*>(target.data_ptr()), index.data_ptr(),
                        static_cast<const int32_t*>(value.data_ptr()), count, target.numel()};
  if (is_int32(index)) launch_scatter<int32_t>(updates, Updates{}, current_stream(target));
  else launch_scatter<int64_t>(updates, Updates{}, current_stream(target));
}

// Both tables of the engine from one staging buffer. buffer: int32, at least 2 * (num_pages + num_tokens) long: indices
// into page_table, their values, indices into token_ids, their values; indices are flat, negative ones are skipped.
void apply_updates(TensorView page_table, TensorView token_ids, TensorView buffer, int64_t num_pages,
                   int64_t num_tokens) {
  MINISGL_CHECK(is_int32(page_table) && page_table.IsContiguous() && is_int32(token_ids) && token_ids.IsContiguous());
  MINISGL_CHECK(is_int32(buffer) && buffer.IsContiguous() && num_pages >= 0 && num_tokens >= 0);
  MINISGL_CHECK(buffer.numel() >= 2 * (num_pages + num_tokens));
  const int32_t* pages = static_cast<const int32_t*>(buffer.data_ptr());
  const int32_t* tokens = pages + 2 * num_pages;
  launch_scatter<int32_t>(
      Updates{static_cast<int32_t*>(page_table.data_ptr()), pages, pages + num_pages, num_pages, page_table.numel()},
      Updates{static_cast<int32_t*>(token_ids.data_ptr()), tokens, tokens + num_tokens, num_tokens, token_ids.numel()},
      current_stream(page_table));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, minisgl::prepare);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scatter, minisgl::scatter);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(apply_updates, minisgl::apply_updates);

}  // namespace minisgl
