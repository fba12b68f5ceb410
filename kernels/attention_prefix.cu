// Prefix attention: the queries of all sequences that share a cartridge, over its contiguous keys and values.
// Read once for all of them: the rows of the product are (query row, query head of the KV head).
//
// attention_prefix_<type>_d<D>, types bf16 (and f16 for D 64), D 16, 32, 64, 96, 128, 256.
//   q        [any, heads, D]          `row_ids[i]` is the row of the group's i-th query; null: i
//   k, v     [kv_heads, tokens, D]    `head_stride` elements from one KV head to the next
//   bias     [kv_heads, tokens] f32   added to the scaled scores; null: none
//   slots    [rows]                   the i-th query's part s goes to slot `slots[i] + s`; null: i * parts + s
//   out      [slots, heads, D] f32    normalised over the part's keys
//   lse      [slots, heads] f32       natural logarithm; minus infinity, and zeroes in `out`, without a key
// Part s is the keys `s * part_tokens ..` up to as many. A row's bits do not depend on the other rows.
// grid (parts, ceil(rows * heads / kv_heads / 64), kv_heads), 128 threads.
// Limits: base addresses, and strides times 2 bytes, are multiples of 16; rows * heads / kv_heads and
// tokens + part_tokens below 2^31.
#include "attention_block.cuh"

template <typename B>
__device__ __forceinline__ void attention_prefix(const typename B::T *q, const typename B::T *k,
                                                 const typename B::T *v, const float *bias, const int *row_ids,
                                                 const int *slots, float *out, float *lse, int rows, int heads,
                                                 int kv_heads, int tokens, int64_t head_stride, int part_tokens,
                                                 float scale) {
    using T = typename B::T;
    constexpr int D = B::D;
    B block(DYNAMIC_SHARED(B::SHARED_BYTES));
    const int part = blockIdx.x, kv_head = blockIdx.z, shared_by = heads / kv_heads;
    const int first = blockIdx.y * B::ROWS, count = min(rows * shared_by - first, B::ROWS);
    const int begin = min(part * part_tokens, tokens), end = min(begin + part_tokens, tokens);
    auto query = [=](int row) {
        const int i = (first + row) / shared_by, head = kv_head * shared_by + (first + row) % shared_by;
        return q + (static_cast<int64_t>(row_ids ? row_ids[i] : i) * heads + head) * D;
    };
    if (begin < end) block.load_queries(query, count);
    const Strided<T> keys{k + kv_head * head_stride, D}, values{v + kv_head * head_stride, D};
    const int limit[2] = {end, end};
    const float *head_bias = bias ? bias + static_cast<int64_t>(kv_head) * tokens : nullptr;
    block.attend(keys, values, head_bias, begin, end, limit, scale * LOG2_E);
    block.running.finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = B::row(half);
        if (row >= count) continue;
        const int i = (first + row) / shared_by, head = kv_head * shared_by + (first + row) % shared_by;
        const int64_t slot = slots ? slots[i] + part : static_cast<int64_t>(i) * gridDim.x + part;
        store_row(block.running, half, out + (slot * heads + head) * D, lse + slot * heads + head);
    }
}

#define INSTANCE(T, D)                                                                               \
    extern "C" __global__ void __launch_bounds__(128, Block<T, D>::RESIDENT)                         \
        attention_prefix_##T##_d##D(                                                                 \
            const T *q, const T *k, const T *v, const float *bias, const int *row_ids,               \
            const int *slots, float *out, float *lse, int rows, int heads, int kv_heads, int tokens, \
            int64_t head_stride, int part_tokens, float scale) {                                     \
        attention_prefix<Block<T, D>>(                                                               \
            q, k, v, bias, row_ids, slots, out, lse, rows, heads, kv_heads, tokens, head_stride,     \
            part_tokens, scale);                                                                     \
    }                                                                                                \
    KERNEL(attention_prefix_##T##_d##D, (Block<T, D>::THREADS), (Block<T, D>::SHARED_BYTES))

EVERY_HEAD_DIM(INSTANCE)
