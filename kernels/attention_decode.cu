// Paged decode attention: one query row per sequence over the sequence's own blocks. The query heads of a KV
// head are the rows of the product. Each of a block's four warps takes every fourth block of the cache, with
// its own running softmax and two stages of copies; the four are merged at the end.
//
// attention_decode_<type>_d<D>, types bf16 (and f16 for D 64), D 16, 32, 64, 96, 128, 256.
//   q             [any, heads, D]             `row_ids[i]` is the row of sequence i; null: i
//   k, v          [blocks, kv_heads, 16, D]   the paged cache of a layer
//   tables        [sequences, table_stride]   block numbers of each sequence, in order
//   lengths       [sequences]                 keys a sequence sees, its newest token's included
//   slots         [sequences]                 part s goes to slot `slots[i] + s`; null: i * parts + s
//   out           [slots, heads, D] f32       normalised over the part's keys
//   lse           [slots, heads] f32          natural logarithm; minus infinity, zeroes in `out`, without a key
// Part s is the keys `s * part_tokens ..`; parts without a key write nothing, except part 0. A row's bits do
// not depend on the other sequences. Slots of a block behind the length are not used, whatever they hold.
// grid (parts, sequences, kv_heads * ceil(heads / kv_heads / 16)), 128 threads.
// Limits: base addresses are multiples of 16 bytes; part_tokens a multiple of 16, at most 2^30; 65,535 sequences.
#include "attention_block.cuh"

template <typename Element, int HEAD_DIM> struct Decode {
    using T = Element;
    static constexpr int D = HEAD_DIM;
    static constexpr int WARPS = 4;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int TILE = BLOCK_TOKENS * tile_stride(D);
    static constexpr int STAGES = 2;
    // Blocks that registers and shared memory let an SM hold at once; the compiler is kept to it.
    static constexpr int RESIDENT = D <= 64 ? 4 : D <= 128 ? 2 : 1;
    // Queries, then keys and values of every warp and stage; in the end the warps' results lie there.
    static constexpr int SHARED_BYTES = (1 + WARPS * STAGES * 2) * TILE * static_cast<int>(sizeof(T));
    static_assert(WARPS * WARP_ROWS * (D + 2) * 4 <= SHARED_BYTES);
};

template <typename C>
__device__ __forceinline__ void attention_decode(const typename C::T *q, const typename C::T *k,
                                                 const typename C::T *v, const int *tables, const int *lengths,
                                                 const int *row_ids, const int *slots, float *out, float *lse,
                                                 int heads, int kv_heads, int table_stride, int part_tokens,
                                                 float scale) {
    using T = typename C::T;
    constexpr int D = C::D;
    unsigned char *shared = DYNAMIC_SHARED(C::SHARED_BYTES);
    const int part = blockIdx.x, sequence = blockIdx.y, kv_head = blockIdx.z % kv_heads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int begin = part * part_tokens, end = min(begin + part_tokens, lengths[sequence]);
    if (part > 0 && begin >= end) return;
    const int shared_by = heads / kv_heads, head_in_group = blockIdx.z / kv_heads * WARP_ROWS;
    const int head = kv_head * shared_by + head_in_group, rows = min(shared_by - head_in_group, WARP_ROWS);

    T *queries = reinterpret_cast<T *>(shared);
    T *tiles = queries + C::TILE * (1 + warp * C::STAGES * 2);
    const int64_t query = static_cast<int64_t>(row_ids ? row_ids[sequence] : sequence) * heads + head;
    load_rows<T, D, WARP_ROWS, C::THREADS>(queries, Strided<T>{q + query * D, D}, 0, rows, threadIdx.x);
    cp_async_commit();

    const int *table = tables + static_cast<int64_t>(sequence) * table_stride;
    auto load_block = [=](int number, int stage) {
        const int64_t at = (static_cast<int64_t>(table[number]) * kv_heads + kv_head) * BLOCK_TOKENS * D;
        const int present = end - number * BLOCK_TOKENS;
        T *to = tiles + stage * 2 * C::TILE;
        load_rows<T, D, BLOCK_TOKENS, 32>(to, Strided<T>{k + at, D}, 0, present, lane);
        load_rows<T, D, BLOCK_TOKENS, 32>(to + C::TILE, Strided<T>{v + at, D}, 0, present, lane);
    };
    const int last = (end + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    int number = begin / BLOCK_TOKENS + warp, stage = 0;
    if (number < last) load_block(number, stage);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads(); // queries are here
    Queries<T, D> q_rows;
    q_rows.at(queries);
    q_rows.keep();
    Running<D> running;
    running.clear();
    for (; number < last; number += C::WARPS, stage ^= 1) {
        if (number + C::WARPS < last) load_block(number + C::WARPS, stage ^ 1);
        cp_async_commit();
        cp_async_wait<1>();
        __syncwarp(); // what the other lanes copied is here too
        const T *keys = tiles + stage * 2 * C::TILE;
        const int present = end - number * BLOCK_TOKENS, limit[2] = {present, present};
        float s[BLOCK_TOKENS / 8][4];
        q_rows.template times_keys<BLOCK_TOKENS>(s, keys);
        finish_scores<BLOCK_TOKENS>(s, scale * LOG2_E, nullptr, present, limit);
        running.template add_scores<BLOCK_TOKENS>(s);
        running.template add_values<T, BLOCK_TOKENS>(s, keys + C::TILE);
        __syncwarp(); // nobody reads this stage any more
    }
    running.finish();

    // The four warps' sums side by side in shared memory, `[warps, 16, D]`, then their maxima and denominators.
    __syncthreads();
    float *sums = reinterpret_cast<float *>(shared);
    float *maxima = sums + C::WARPS * WARP_ROWS * D, *denominators = maxima + C::WARPS * WARP_ROWS;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = warp * WARP_ROWS + lane / 4 + 8 * half;
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
            store2(sums + row * D + 8 * i + 2 * (lane % 4), running.out[i][2 * half], running.out[i][2 * half + 1]);
        if (lane % 4 == 0) {
            maxima[row] = running.max[half];
            denominators[row] = running.sum[half];
        }
    }
    __syncthreads();
    const int64_t slot = slots ? slots[sequence] + part : static_cast<int64_t>(sequence) * gridDim.x + part;
    for (int i = threadIdx.x; i < rows * D / 2; i += C::THREADS) {
        const int row = i / (D / 2), column = i % (D / 2) * 2;
        float most = NEG_INF, total = 0.0f, a = 0.0f, b = 0.0f;
        for (int w = 0; w < C::WARPS; ++w) most = fmaxf(most, maxima[w * WARP_ROWS + row]);
        const float base = most == NEG_INF ? 0.0f : most;
        for (int w = 0; w < C::WARPS; ++w) {
            const int from = w * WARP_ROWS + row;
            const float weight = exp2_approx(maxima[from] - base);
            total += weight * denominators[from];
            a += weight * sums[from * D + column];
            b += weight * sums[from * D + column + 1];
        }
        const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
        const int64_t to = slot * heads + head + row;
        store2(out + to * D + column, a * inverse, b * inverse);
        if (column == 0) lse[to] = log_sum_exp(most, total);
    }
}

#define INSTANCE(T, D)                                                                             \
    extern "C" __global__ void __launch_bounds__(128, Decode<T, D>::RESIDENT)                      \
        attention_decode_##T##_d##D(                                                               \
            const T *q, const T *k, const T *v, const int *tables, const int *lengths,             \
            const int *row_ids, const int *slots, float *out, float *lse, int heads, int kv_heads, \
            int table_stride, int part_tokens, float scale) {                                      \
        attention_decode<Decode<T, D>>(                                                            \
            q, k, v, tables, lengths, row_ids, slots, out, lse, heads, kv_heads, table_stride,     \
            part_tokens, scale);                                                                   \
    }                                                                                              \
    KERNEL(attention_decode_##T##_d##D, (Decode<T, D>::THREADS), (Decode<T, D>::SHARED_BYTES))

EVERY_HEAD_DIM(INSTANCE)
