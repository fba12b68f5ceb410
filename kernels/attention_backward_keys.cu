// Backward of packed attention (attention_packed.cu): the gradients of keys and values.
//
// A block owns 64 keys of one KV head and passes over the rows that see them, (token, query head of the KV
// head), in order: here keys take the place that queries have in the forward, so that weights leave the tensor
// cores as the operand of the next product. Every sum is made by one warp in one order: the bits depend on
// the shapes and `part_rows` only.
//
// Types bf16 (and f16 for D 64), D 16, 32, 64, 96, 128, 256; 128 threads.
//   q, d_out    [tokens, heads, D]
//   lse, delta  [tokens, heads] f32   log-sum-exp of the forward; of attention_backward_delta
//   SPLIT = 1, and 2 for D 256: a block sums D / SPLIT columns, what registers allow, and computes all scores
//
// attention_backward_own_<type>_d<D>: the sequences' own keys. grid (ceil(longest / 64) * SPLIT, kv_heads, sequences)
//   k, v, dk, dv          [tokens, kv_heads, D]
//   cu_seqlens            [sequences + 1]
// attention_backward_prefix_<type>_d<D>: the prefix's. grid (ceil(prefix / 64) * SPLIT, kv_heads, parts)
//   prefix_k, prefix_v    [kv_heads, prefix, D]             `prefix_stride` elements between KV heads
//   dk, dv                [parts, kv_heads, prefix, D] f32  part s: of rows s * part_rows .. of tokens * group
//   attention_backward_sum adds the parts; with one part these are the gradients.
//
// Limits: base addresses, and strides times 2 bytes, are multiples of 16; 65,535 sequences and parts;
// tokens * (heads / kv_heads)^2 < 2^31; prefix > 0 for its kernel. A q or d_out that is not finite spoils the
// gradients of all keys of its tile.
#include "attention_block.cuh"

template <typename Element, int HEAD_DIM> struct KeyBlock {
    using T = Element;
    static constexpr int D = HEAD_DIM;
    static constexpr int SPLIT = D <= 128 ? 1 : 2;
    static constexpr int COLUMNS = D / SPLIT;
    static constexpr int THREADS = 128;
    static constexpr int KEYS = WARP_ROWS * THREADS / 32;
    static constexpr int ROWS = D <= 64 ? 64 : 32; // of a tile: what registers allow
    static constexpr bool KEPT = D <= 64;          // keys and values in registers, as operands
    // Blocks that registers let an SM hold at once; the compiler is kept to it.
    static constexpr int RESIDENT = D <= 16 ? 3 : D <= 128 ? 2 : 1;
    static constexpr int STRIDE = tile_stride(D);
    static constexpr int SHARED_BYTES =
        (2 * KEYS + 2 * ROWS) * STRIDE * static_cast<int>(sizeof(T)) + 2 * ROWS * static_cast<int>(sizeof(float));

    T *keys, *values, *queries, *slopes; // slopes: of the output, d_out
    float *statistics;                   // lse in powers of two, then delta, of the tile's rows
    int column;                          // the first that this block sums
    float dk[COLUMNS / 8][4], dv[COLUMNS / 8][4];

    __device__ __forceinline__ explicit KeyBlock(unsigned char *shared) {
        keys = reinterpret_cast<T *>(shared);
        values = keys + KEYS * STRIDE;
        queries = values + KEYS * STRIDE;
        slopes = queries + ROWS * STRIDE;
        statistics = reinterpret_cast<float *>(slopes + ROWS * STRIDE);
        column = blockIdx.x % SPLIT * COLUMNS;
#pragma unroll
        for (int i = 0; i < COLUMNS / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) dk[i][j] = dv[i][j] = 0.0f;
    }

    // The key of the block that half 0 or 1 of this thread's numbers belongs to.
    static __device__ __forceinline__ int key(int half) {
        return threadIdx.x / 32 * WARP_ROWS + threadIdx.x % 32 / 4 + 8 * half;
    }

    // Keys and values `first ..` below `present`, then the rows begin .. end; those from `visible_from` on see
    // this thread's keys.
    __device__ __forceinline__ void pass(const Strided<T> &key, const Strided<T> &value, int first_key, int present,
                                         const T *q, const T *d_out, const float *lse, const float *delta,
                                         const GroupRows &place, int begin, int end, const int (&visible_from)[2],
                                         float scale_log2) {
        if (begin >= end) return;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        auto query = [=](int row) { return q + place(row) * D; };
        auto slope = [=](int row) { return d_out + place(row) * D; };
        // Rows that are not there have zeroes in all: weights of one, for slopes of zero.
        auto statistic = [=](int first) {
            const int i = threadIdx.x, row = first + i % ROWS;
            if (i >= 2 * ROWS || row >= end) return 0.0f;
            return i < ROWS ? lse[place(row)] * LOG2_E : delta[place(row)];
        };
        load_rows<T, D, KEYS, THREADS>(keys, key, first_key, present, threadIdx.x);
        load_rows<T, D, KEYS, THREADS>(values, value, first_key, present, threadIdx.x);
        load_rows<T, D, ROWS, THREADS>(slopes, slope, begin, end, threadIdx.x);
        cp_async_commit();
        float next = statistic(begin);
        if (threadIdx.x < 2 * ROWS) statistics[threadIdx.x] = next;
        Queries<T, D, KEPT> own_keys, own_values;
        own_keys.at(keys + warp * WARP_ROWS * STRIDE);
        own_values.at(values + warp * WARP_ROWS * STRIDE);
        if constexpr (KEPT) {
            cp_async_wait<0>();
            __syncthreads();
            own_keys.keep();
            own_values.keep();
        }
        for (int first = begin; first < end; first += ROWS) {
            cp_async_wait<0>();
            __syncthreads(); // slopes are here; nobody reads the last queries any more
            load_rows<T, D, ROWS, THREADS>(queries, query, first, end, threadIdx.x);
            cp_async_commit();
            float ds[ROWS / 8][4], p[ROWS / 8][4];
            own_values.template times_keys<ROWS>(ds, slopes);
            cp_async_wait<0>();
            __syncthreads(); // queries are here
            own_keys.template times_keys<ROWS>(p, queries);
#pragma unroll
            for (int n = 0; n < ROWS / 8; ++n) {
                const int row = 8 * n + 2 * (lane % 4);
                const float2 row_lse = *reinterpret_cast<const float2 *>(statistics + row);
                const float2 row_delta = *reinterpret_cast<const float2 *>(statistics + ROWS + row);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float minus = j % 2 == 0 ? row_lse.x : row_lse.y;
                    const float mean = j % 2 == 0 ? row_delta.x : row_delta.y;
                    const bool visible = first + row + j % 2 >= visible_from[j / 2];
                    p[n][j] = visible ? exp2_approx(p[n][j] * scale_log2 - minus) : 0.0f;
                    ds[n][j] = visible ? p[n][j] * (ds[n][j] - mean) : 0.0f;
                }
            }
            next = statistic(first + ROWS); // arrives during the product
            add_products<T, ROWS, COLUMNS, STRIDE>(dv, p, slopes + column);
            __syncthreads(); // nobody reads slopes and statistics any more
            if (first + ROWS < end) load_rows<T, D, ROWS, THREADS>(slopes, slope, first + ROWS, end, threadIdx.x);
            cp_async_commit();
            if (threadIdx.x < 2 * ROWS) statistics[threadIdx.x] = next;
            add_products<T, ROWS, COLUMNS, STRIDE>(dk, ds, queries + column);
        }
        cp_async_wait<0>();
    }

    // `to_dk(i)`, `to_dv(i)`: where the gradients of the block's key i < count go.
    template <typename Place>
    __device__ __forceinline__ void store(const Place &to_dk, const Place &to_dv, int count, float scale) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (key(half) >= count) continue;
            auto *k = to_dk(key(half)) + column + 2 * (threadIdx.x % 4);
            auto *v = to_dv(key(half)) + column + 2 * (threadIdx.x % 4);
#pragma unroll
            for (int i = 0; i < COLUMNS / 8; ++i) {
                store2(k + 8 * i, scale * dk[i][2 * half], scale * dk[i][2 * half + 1]);
                store2(v + 8 * i, dv[i][2 * half], dv[i][2 * half + 1]);
            }
        }
    }
};

template <typename B>
__device__ __forceinline__ void backward_own(const typename B::T *q, const typename B::T *k, const typename B::T *v,
                                             const int *cu_seqlens, const typename B::T *d_out, const float *lse,
                                             const float *delta, typename B::T *dk, typename B::T *dv, int heads,
                                             int kv_heads, float scale) {
    using T = typename B::T;
    const int kv_head = blockIdx.y, shared_by = heads / kv_heads;
    const int sequence = cu_seqlens[blockIdx.z], length = cu_seqlens[blockIdx.z + 1] - sequence;
    const int first = blockIdx.x / B::SPLIT * B::KEYS;
    if (first >= length) return;
    B block(DYNAMIC_SHARED(B::SHARED_BYTES));
    const int64_t at = (static_cast<int64_t>(sequence) * kv_heads + kv_head) * B::D;
    const int64_t stride = static_cast<int64_t>(kv_heads) * B::D;
    const GroupRows place(sequence, heads, kv_heads, kv_head);
    // A token's rows see its own key and those before it.
    const int visible_from[2] = {(first + B::key(0)) * shared_by, (first + B::key(1)) * shared_by};
    block.pass(Strided<T>{k + at, stride}, Strided<T>{v + at, stride}, first, length, q, d_out, lse, delta, place,
               first * shared_by, length * shared_by, visible_from, scale * LOG2_E);
    auto row = [=](T *base) { return [=](int i) { return base + at + (first + i) * stride; }; };
    block.store(row(dk), row(dv), length - first, scale);
}

template <typename B>
__device__ __forceinline__ void backward_prefix(const typename B::T *q, const typename B::T *prefix_k,
                                                const typename B::T *prefix_v, const typename B::T *d_out,
                                                const float *lse, const float *delta, float *dk, float *dv,
                                                int tokens, int heads, int kv_heads, int prefix,
                                                int64_t prefix_stride, int part_rows, float scale) {
    using T = typename B::T;
    const int kv_head = blockIdx.y, part = blockIdx.z, shared_by = heads / kv_heads;
    const int first = blockIdx.x / B::SPLIT * B::KEYS, rows = tokens * shared_by;
    const int64_t begin = static_cast<int64_t>(part) * part_rows;
    const int64_t end = min(begin + part_rows, static_cast<int64_t>(rows));
    B block(DYNAMIC_SHARED(B::SHARED_BYTES));
    const GroupRows place(0, heads, kv_heads, kv_head);
    const int visible_from[2] = {0, 0}; // every row of every sequence sees all of the prefix
    const int64_t head = kv_head * prefix_stride;
    block.pass(Strided<T>{prefix_k + head, B::D}, Strided<T>{prefix_v + head, B::D}, first, prefix, q, d_out, lse,
               delta, place, static_cast<int>(min(begin, end)), static_cast<int>(end), visible_from, scale * LOG2_E);
    const int64_t to = ((static_cast<int64_t>(part) * kv_heads + kv_head) * prefix + first) * B::D;
    auto row = [=](float *base) { return [=](int i) { return base + to + static_cast<int64_t>(i) * B::D; }; };
    block.store(row(dk), row(dv), prefix - first, scale);
}

#define INSTANCE(T, D)                                                                                          \
    extern "C" __global__ void __launch_bounds__(128, KeyBlock<T, D>::RESIDENT) attention_backward_own_##T##_d##D( \
        const T *q, const T *k, const T *v, const int *cu_seqlens, const T *d_out, const float *lse,            \
        const float *delta, T *dk, T *dv, int heads, int kv_heads, float scale) {                               \
        backward_own<KeyBlock<T, D>>(q, k, v, cu_seqlens, d_out, lse, delta, dk, dv, heads, kv_heads, scale);   \
    }                                                                                                           \
    KERNEL(attention_backward_own_##T##_d##D, (KeyBlock<T, D>::THREADS), (KeyBlock<T, D>::SHARED_BYTES))        \
    extern "C" __global__ void __launch_bounds__(128, KeyBlock<T, D>::RESIDENT)                                 \
        attention_backward_prefix_##T##_d##D(                                                                   \
            const T *q, const T *prefix_k, const T *prefix_v, const T *d_out, const float *lse,                 \
            const float *delta, float *dk, float *dv, int tokens, int heads, int kv_heads, int prefix,          \
            int64_t prefix_stride, int part_rows, float scale) {                                                \
        backward_prefix<KeyBlock<T, D>>(q, prefix_k, prefix_v, d_out, lse, delta, dk, dv, tokens, heads,        \
                                        kv_heads, prefix, prefix_stride, part_rows, scale);                     \
    }                                                                                                           \
    KERNEL(attention_backward_prefix_##T##_d##D, (KeyBlock<T, D>::THREADS), (KeyBlock<T, D>::SHARED_BYTES))

EVERY_HEAD_DIM(INSTANCE)
