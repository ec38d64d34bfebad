// What every step needs before its first layer, from tables that stay on the GPU: ids, KV slots and rotary angles. It
// runs inside the captured graph, so that the host sends only rows, positions and table updates.
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
  int64_t* out_slots;
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
  if (threadIdx.x == 0) args.out_ids[token] = args.token_ids[row * args.max_len + position];
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

// Negative indices fill lists of fixed size.
template <typename Index>
__global__ void __launch_bounds__(256)
scatter_kernel(int32_t* target, int64_t size, const Index* index, const int32_t* value, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  pdl_trigger();
  pdl_wait();
  if (i >= count) return;
  const int64_t at = index[i];
  if (at >= 0 && at < size) target[at] = value[i];
}

// A failed row (-1) gets some valid id, which nobody will see.
__global__ void __launch_bounds__(256) store_ids_kernel(int32_t* token_ids, int64_t max_len, const int32_t* rows,
                                                        const int64_t* positions, int64_t stride, const int32_t* ids,
                                                        int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  pdl_trigger();
  pdl_wait();
  if (i >= count) return;
  const int64_t position = positions[i * stride];
  if (position >= 0 && position < max_len) token_ids[rows[i] * max_len + position] = max(ids[i], 0);
}

void check_vector(const TensorView& t, bool is_right_type, int64_t size) {
  MINISGL_CHECK(is_right_type && t.IsContiguous() && t.numel() == size);
}

}  // namespace

// rows, positions: [n] int32; the outputs: see PrepareArgs. n tokens of any mix of prefill and decode.
void prepare(TensorView rows, TensorView positions, TensorView token_ids, TensorView page_table, int64_t page_size,
             TensorView cos_sin, TensorView out_ids, TensorView out_slots, TensorView out_cos, TensorView out_sin) {
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
  check_vector(out_slots, is_int64(out_slots), num_tokens);
  check_vector(out_cos, is_fp32(out_cos), num_tokens * head_dim);
  check_vector(out_sin, is_fp32(out_sin), num_tokens * head_dim);
  for (const TensorView& t : {cos_sin, out_cos, out_sin}) {
    MINISGL_CHECK(reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0);
  }
  const PrepareArgs args{static_cast<const int32_t*>(rows.data_ptr()),
                         static_cast<const int32_t*>(positions.data_ptr()),
                         static_cast<const int32_t*>(token_ids.data_ptr()),
                         static_cast<const int32_t*>(page_table.data_ptr()),
                         static_cast<const float*>(cos_sin.data_ptr()),
                         static_cast<int64_t*>(out_ids.data_ptr()),
                         static_cast<int64_t*>(out_slots.data_ptr()),
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
  if (count == 0) return;
  MINISGL_CHECK(is_int32(target) && target.IsContiguous());
  check_vector(index, is_int32(index) || is_int64(index), count);
  check_vector(value, is_int32(value), count);
  const LaunchConfig config{dim3((count + 255) / 256), dim3(256)};
  const auto run = [&](auto kernel, auto* indices) {
    launch(config, current_stream(target), kernel, static_cast<int32_t*>(target.data_ptr()), target.numel(), indices,
           static_cast<const int32_t*>(value.data_ptr()), count);
  };
  if (is_int32(index)) run(scatter_kernel<int32_t>, static_cast<const int32_t*>(index.data_ptr()));
  else run(scatter_kernel<int64_t>, static_cast<const int64_t*>(index.data_ptr()));
}

// token_ids[rows[i], positions[i]] = max(ids[i], 0). token_ids: [num_rows, max_len] int32; rows: [n] int32; positions:
// [n] int64, perhaps a column of records; ids: [n] int32.
void store_ids(TensorView token_ids, TensorView rows, TensorView positions, TensorView ids) {
  const int64_t count = ids.numel();
  if (count == 0) return;
  MINISGL_CHECK(is_int32(token_ids) && token_ids.ndim() == 2 && token_ids.IsContiguous());
  check_vector(rows, is_int32(rows), count);
  MINISGL_CHECK(is_int64(positions) && positions.ndim() == 1 && positions.numel() == count);
  check_vector(ids, is_int32(ids), count);
  const LaunchConfig config{dim3((count + 255) / 256), dim3(256)};
  launch(config, current_stream(token_ids), store_ids_kernel, static_cast<int32_t*>(token_ids.data_ptr()),
         token_ids.size(1), static_cast<const int32_t*>(rows.data_ptr()),
         static_cast<const int64_t*>(positions.data_ptr()), positions.stride(0),
         static_cast<const int32_t*>(ids.data_ptr()), count);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(prepare, minisgl::prepare);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(scatter, minisgl::scatter);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(store_ids, minisgl::store_ids);

}  // namespace minisgl
