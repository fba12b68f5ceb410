// Packed attention: whole sequences laid end to end, each causal within itself and seeing all of one prefix.
// The forward of training, and of prefilling without a cache. Rows of the product are (token, query head of
// the KV head).
//
// attention_packed_<type>_d<D>, types bf16 (and f16 for D 64), D 16, 32, 64, 96, 128, 256.
//   q                    [tokens, heads, D]
//   k, v                 [tokens, kv_heads, D]
//   prefix_k, prefix_v   [kv_heads, prefix, D]     `prefix_stride` elements from one KV head to the next
//   cu_seqlens           [sequences + 1]           sequence i is the rows cu_seqlens[i] .. cu_seqlens[i + 1]
//   out                  [tokens, heads, D]
//   lse                  [tokens, heads] f32       natural logarithm, for the backward
// grid (ceil(longest * heads / kv_heads / 64), kv_heads, sequences), 128 threads.
// Limits: base addresses, and strides times 2 bytes, are multiples of 16; 65,535 sequences; a value that is
// not finite spoils the earlier rows of its tile too (zero times infinity).
#include "attention_block.cuh"

template <typename B>
__device__ __forceinline__ void attention_packed(const typename B::T *q, const typename B::T *k,
                                                 const typename B::T *v, const typename B::T *prefix_k,
                                                 const typename B::T *prefix_v, const int *cu_seqlens,
                                                 typename B::T *out, float *lse, int heads, int kv_heads,
                                                 int prefix, int64_t prefix_stride, float scale) {
    using T = typename B::T;
    constexpr int D = B::D;
    // The last tiles see the most keys: they begin first.
    const int tile = gridDim.x - 1 - blockIdx.x, kv_head = blockIdx.y, shared_by = heads / kv_heads;
    const int sequence = cu_seqlens[blockIdx.z], length = cu_seqlens[blockIdx.z + 1] - sequence;
    const int first = tile * B::ROWS, count = min(length * shared_by - first, B::ROWS);
    if (count <= 0) return;
    B block(DYNAMIC_SHARED(B::SHARED_BYTES));
    const int64_t first_row = static_cast<int64_t>(sequence) * heads + kv_head * shared_by;
    // Where row i of the tile stands in `[tokens * heads]`.
    auto place = [=](int row) {
        return first_row + static_cast<int64_t>((first + row) / shared_by) * heads + (first + row) % shared_by;
    };
    block.load_queries([=](int row) { return q + place(row) * D; }, count);
    const int64_t own = (static_cast<int64_t>(sequence) * kv_heads + kv_head) * D;
    const int end = (first + count - 1) / shared_by + 1;
    // One copy of the code for both segments.
#pragma unroll 1
    for (int segment = 0; segment < 2; ++segment) {
        const bool of_prefix = segment == 0;
        const int64_t at = of_prefix ? kv_head * prefix_stride : own;
        const int64_t stride = of_prefix ? D : static_cast<int64_t>(kv_heads) * D;
        const Strided<T> keys{(of_prefix ? prefix_k : k) + at, stride};
        const Strided<T> values{(of_prefix ? prefix_v : v) + at, stride};
        int limit[2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            limit[half] = of_prefix ? prefix : (first + B::row(half)) / shared_by + 1;
        block.attend(keys, values, nullptr, 0, of_prefix ? prefix : end, limit, scale * LOG2_E);
    }
    block.running.finish();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = B::row(half);
        if (row < count) store_row(block.running, half, out + place(row) * D, lse + place(row));
    }
}

#define INSTANCE(T, D)                                                                                 \
    extern "C" __global__ void __launch_bounds__(128, Block<T, D>::RESIDENT)                           \
        attention_packed_##T##_d##D(                                                                   \
            const T *q, const T *k, const T *v, const T *prefix_k, const T *prefix_v,                  \
            const int *cu_seqlens, T *out, float *lse, int heads, int kv_heads, int prefix,            \
            int64_t prefix_stride, float scale) {                                                      \
        attention_packed<Block<T, D>>(                                                                 \
            q, k, v, prefix_k, prefix_v, cu_seqlens, out, lse, heads, kv_heads, prefix, prefix_stride, \
            scale);                                                                                    \
    }                                                                                                  \
    KERNEL(attention_packed_##T##_d##D, (Block<T, D>::THREADS), (Block<T, D>::SHARED_BYTES))

EVERY_HEAD_DIM(INSTANCE)
