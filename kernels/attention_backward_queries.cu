// Backward of packed attention (attention_packed.cu): the gradient of the queries.
//
// attention_backward_queries_<type>_d<D>, types bf16 (and f16 for D 64), D 16, 32, 64, 96, 128, 256.
//   q, d_out, dq         [tokens, heads, D]
//   k, v                 [tokens, kv_heads, D]
//   prefix_k, prefix_v   [kv_heads, prefix, D]     `prefix_stride` elements from one KV head to the next
//   cu_seqlens           [sequences + 1]           sequence i is the rows cu_seqlens[i] .. cu_seqlens[i + 1]
//   lse                  [tokens, heads] f32       of the forward, natural logarithm
//   delta                [tokens, heads] f32       of attention_backward_delta
// Scores and their slopes P (d_out Vᵀ - delta) are computed again, tile by tile; a row's bits do not depend on
// the other rows. The gradients of keys and values are another kernel's: no sum needs an atomic addition.
// grid (ceil(longest * heads / kv_heads / 64), kv_heads, sequences), 128 threads.
// Limits: those of attention_packed; longest * (heads / kv_heads)^2 < 2^31.
#include "attention_block.cuh"

template <typename Element, int HEAD_DIM> struct QueryBlock {
    using T = Element;
    static constexpr int D = HEAD_DIM;
    static constexpr int THREADS = 128;
    static constexpr int ROWS = WARP_ROWS * THREADS / 32;
    static constexpr int KEYS = D <= 128 ? 64 : 32; // of a tile: what registers allow
    static constexpr bool KEPT = D <= 64;           // queries and d_out in registers, as operands
    // Blocks that registers let an SM hold at once; the compiler is kept to it.
    static constexpr int RESIDENT = D <= 32 ? 4 : D <= 96 ? 3 : D <= 128 ? 2 : 1;
    static constexpr int SHARED_BYTES = (2 * ROWS + 2 * KEYS) * tile_stride(D) * static_cast<int>(sizeof(T));
};

template <typename B>
__device__ __forceinline__ void backward_queries(const typename B::T *q, const typename B::T *k,
                                                 const typename B::T *v, const typename B::T *prefix_k,
                                                 const typename B::T *prefix_v, const int *cu_seqlens,
                                                 const typename B::T *d_out, const float *lse, const float *delta,
                                                 typename B::T *dq, int heads, int kv_heads, int prefix,
                                                 int64_t prefix_stride, float scale) {
    using T = typename B::T;
    constexpr int D = B::D, ROWS = B::ROWS, KEYS = B::KEYS, THREADS = B::THREADS, STRIDE = tile_stride(D);
    // The last tiles see the most keys: they begin first.
    const int tile = gridDim.x - 1 - blockIdx.x, kv_head = blockIdx.y, shared_by = heads / kv_heads;
    const int sequence = cu_seqlens[blockIdx.z], length = cu_seqlens[blockIdx.z + 1] - sequence;
    const int first_row = tile * ROWS, count = min(length * shared_by - first_row, ROWS);
    if (count <= 0) return;
    T *queries = reinterpret_cast<T *>(DYNAMIC_SHARED(B::SHARED_BYTES)), *slopes = queries + ROWS * STRIDE;
    T *keys = slopes + ROWS * STRIDE, *values = keys + KEYS * STRIDE;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const GroupRows rows(sequence, heads, kv_heads, kv_head);
    auto place = [=](int row) { return rows(first_row + row); };
    load_rows<T, D, ROWS, THREADS>(queries, [=](int row) { return q + place(row) * D; }, 0, count, threadIdx.x);
    load_rows<T, D, ROWS, THREADS>(slopes, [=](int row) { return d_out + place(row) * D; }, 0, count, threadIdx.x);
    cp_async_commit();

    float row_lse[2], row_delta[2], sum[D / 8][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp * WARP_ROWS + lane / 4 + 8 * half;
        row_lse[half] = row < count ? lse[place(row)] * LOG2_E : 0.0f;
        row_delta[half] = row < count ? delta[place(row)] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = 0.0f;
    Queries<T, D, B::KEPT> query, slope;
    query.at(queries + warp * WARP_ROWS * STRIDE);
    slope.at(slopes + warp * WARP_ROWS * STRIDE);
    cp_async_wait<0>();
    __syncthreads();
    query.keep();
    slope.keep();

    const int64_t own = (static_cast<int64_t>(sequence) * kv_heads + kv_head) * D;
    // One copy of the code for both segments.
#pragma unroll 1
    for (int segment = 0; segment < 2; ++segment) {
        const bool of_prefix = segment == 0;
        const int64_t at = of_prefix ? kv_head * prefix_stride : own;
        const int64_t stride = of_prefix ? D : static_cast<int64_t>(kv_heads) * D;
        const Strided<T> key{(of_prefix ? prefix_k : k) + at, stride};
        const Strided<T> value{(of_prefix ? prefix_v : v) + at, stride};
        const int end = of_prefix ? prefix : rows.token(first_row + count - 1) + 1;
        int limit[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = first_row + warp * WARP_ROWS + lane / 4 + 8 * half;
            limit[half] = of_prefix ? prefix : min(rows.token(row) + 1, end);
        }
        if (end > 0) load_rows<T, D, KEYS, THREADS>(values, value, 0, end, threadIdx.x);
        cp_async_commit();
        for (int first = 0; first < end; first += KEYS) {
            cp_async_wait<0>();
            __syncthreads(); // values are here; nobody reads the last keys any more
            load_rows<T, D, KEYS, THREADS>(keys, key, first, end, threadIdx.x);
            cp_async_commit();
            float ds[KEYS / 8][4], s[KEYS / 8][4];
            slope.template times_keys<KEYS>(ds, values);
            cp_async_wait<0>();
            __syncthreads(); // keys are here; nobody reads these values any more
            if (first + KEYS < end) load_rows<T, D, KEYS, THREADS>(values, value, first + KEYS, end, threadIdx.x);
            cp_async_commit();
            query.template times_keys<KEYS>(s, keys);
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const int half = j / 2;
                    const bool visible = first + 8 * n + 2 * (lane % 4) + j % 2 < limit[half];
                    const float weight = exp2_approx(s[n][j] * (scale * LOG2_E) - row_lse[half]);
                    ds[n][j] = visible ? weight * (ds[n][j] - row_delta[half]) : 0.0f;
                }
            add_products<T, KEYS, D, STRIDE>(sum, ds, keys);
        }
    }
    cp_async_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp * WARP_ROWS + lane / 4 + 8 * half;
        if (row >= count) continue;
        T *to = dq + place(row) * D + 2 * (lane % 4);
#pragma unroll
        for (int i = 0; i < D / 8; ++i) store2(to + 8 * i, scale * sum[i][2 * half], scale * sum[i][2 * half + 1]);
    }
}

#define INSTANCE(T, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(128, QueryBlock<T, D>::RESIDENT)                              \
        attention_backward_queries_##T##_d##D(                                                                 \
            const T *q, const T *k, const T *v, const T *prefix_k, const T *prefix_v, const int *cu_seqlens,   \
            const T *d_out, const float *lse, const float *delta, T *dq, int heads, int kv_heads, int prefix,  \
            int64_t prefix_stride, float scale) {                                                              \
        backward_queries<QueryBlock<T, D>>(q, k, v, prefix_k, prefix_v, cu_seqlens, d_out, lse, delta, dq,     \
                                           heads, kv_heads, prefix, prefix_stride, scale);                     \
    }                                                                                                          \
    KERNEL(attention_backward_queries_##T##_d##D, (QueryBlock<T, D>::THREADS), (QueryBlock<T, D>::SHARED_BYTES))

EVERY_HEAD_DIM(INSTANCE)
