// Paged prefill attention: new rows of each sequence over the sequence's own blocks, causal; the rows' own keys
// are in the blocks already. What prompts, and chunks of prompts, need besides their cartridges.
//
// attention_prefill_<type>_d<D>, types bf16 (and f16 for D 64), D 16, 32, 64, 96, 128, 256.
//   q            [rows, heads, D]
//   k, v         [blocks, kv_heads, 16, D]   the paged cache of a layer
//   tables       [sequences, table_stride]   block numbers of each sequence, in order
//   cu_seqlens   [sequences + 1]             sequence i is the rows cu_seqlens[i] .. cu_seqlens[i + 1]
//   before       [sequences]                 own tokens before the first row: row j sees before + j + 1
//   slots        [rows]                      where row r goes; null: r
//   out          [slots, heads, D] f32       normalised
//   lse          [slots, heads] f32          natural logarithm
// grid (ceil(longest * heads / kv_heads / 64), kv_heads, sequences), 128 threads.
// Limits: base addresses are multiples of 16 bytes; 65,535 sequences. Slots of a block behind the last key are
// not used, whatever they hold; a value before that is not finite spoils the earlier rows of its tile too.
#include "attention_block.cuh"

template <typename B>
__device__ __forceinline__ void attention_prefill(const typename B::T *q, const typename B::T *k,
                                                  const typename B::T *v, const int *tables, const int *cu_seqlens,
                                                  const int *before, const int *slots, float *out, float *lse,
                                                  int heads, int kv_heads, int table_stride, float scale) {
    using T = typename B::T;
    constexpr int D = B::D;
    const int tile = gridDim.x - 1 - blockIdx.x, kv_head = blockIdx.y, shared_by = heads / kv_heads;
    const int sequence = cu_seqlens[blockIdx.z], length = cu_seqlens[blockIdx.z + 1] - sequence;
    const int first = tile * B::ROWS, count = min(length * shared_by - first, B::ROWS);
    if (count <= 0) return;
    B block(DYNAMIC_SHARED(B::SHARED_BYTES));
    auto query = [=](int row) {
        const int head = kv_head * shared_by + (first + row) % shared_by;
        return q + (static_cast<int64_t>(sequence + (first + row) / shared_by) * heads + head) * D;
    };
    block.load_queries(query, count);
    const int *table = tables + static_cast<int64_t>(blockIdx.z) * table_stride;
    const int64_t block_stride = static_cast<int64_t>(kv_heads) * BLOCK_TOKENS * D;
    const int64_t head_at = static_cast<int64_t>(kv_head) * BLOCK_TOKENS * D;
    const Paged<T, D> keys{k + head_at, table, block_stride}, values{v + head_at, table, block_stride};
    const int seen = before[blockIdx.z] + 1;
    const int limit[2] = {seen + (first + B::row(0)) / shared_by, seen + (first + B::row(1)) / shared_by};
    block.attend(keys, values, nullptr, 0, seen + (first + count - 1) / shared_by, limit, scale * LOG2_E);
    block.running.finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = B::row(half);
        if (row >= count) continue;
        const int r = sequence + (first + row) / shared_by, head = kv_head * shared_by + (first + row) % shared_by;
        const int64_t to = static_cast<int64_t>(slots ? slots[r] : r) * heads + head;
        store_row(block.running, half, out + to * D, lse + to);
    }
}

#define INSTANCE(T, D)                                                                                   \
    extern "C" __global__ void __launch_bounds__(128, Block<T, D>::RESIDENT)                             \
        attention_prefill_##T##_d##D(                                                                    \
            const T *q, const T *k, const T *v, const int *tables, const int *cu_seqlens,                \
            const int *before, const int *slots, float *out, float *lse, int heads, int kv_heads,        \
            int table_stride, float scale) {                                                             \
        attention_prefill<Block<T, D>>(                                                                  \
            q, k, v, tables, cu_seqlens, before, slots, out, lse, heads, kv_heads, table_stride, scale); \
    }                                                                                                    \
    KERNEL(attention_prefill_##T##_d##D, (Block<T, D>::THREADS), (Block<T, D>::SHARED_BYTES))

EVERY_HEAD_DIM(INSTANCE)
