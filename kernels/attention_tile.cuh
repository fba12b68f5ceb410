// What the attention kernels share: one warp's 16 query rows against a tile of keys, on tensor cores, with a
// running softmax (FlashAttention's scheme). Scores are kept in powers of two; log-sum-exps leave as natural
// logarithms. Rows of tiles in shared memory are padded by 16 bytes, so that ldmatrix meets no bank twice.
#pragma once

#include "simt.cuh"

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;
constexpr int WARP_ROWS = 16;
constexpr int BLOCK_TOKENS = 16; // slots of a block of the paged cache

// The types and head dimensions there are kernels for.
#define EVERY_HEAD_DIM(INSTANCE)                                                                              \
    INSTANCE(bf16, 16)                                                                                        \
    INSTANCE(bf16, 32)                                                                                        \
    INSTANCE(bf16, 64)                                                                                        \
    INSTANCE(bf16, 96)                                                                                        \
    INSTANCE(bf16, 128)                                                                                       \
    INSTANCE(bf16, 256)                                                                                       \
    INSTANCE(f16, 64)

// Elements from one row of a tile in shared memory to the next.
__host__ __device__ constexpr int tile_stride(int head_dim) { return head_dim + 8; }

// A warp's out[16, COLUMNS] += weights[16, KEYS] values[KEYS, COLUMNS], whose rows are STRIDE elements apart.
// Weights are as times_keys() leaves them; they are rounded to T.
template <typename T, int KEYS, int COLUMNS, int STRIDE>
__device__ __forceinline__ void add_products(float (&out)[COLUMNS / 8][4], const float (&w)[KEYS / 8][4],
                                             const T *values) {
    const int lane = threadIdx.x % 32;
    // Lanes 0-7, 8-15 name keys 0-7, 8-15 of the first 8 columns, the others those of the next 8.
    const T *row = values + (lane % 16) * STRIDE + (lane / 16) * 8;
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k) {
        const uint32_t a[4] = {pack2<T>(w[2 * k][0], w[2 * k][1]), pack2<T>(w[2 * k][2], w[2 * k][3]),
                               pack2<T>(w[2 * k + 1][0], w[2 * k + 1][1]),
                               pack2<T>(w[2 * k + 1][2], w[2 * k + 1][3])};
#pragma unroll
        for (int d = 0; d < COLUMNS / 16; ++d) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, row + k * 16 * STRIDE + d * 16);
            mma_16816<T>(out[2 * d], a, b[0], b[1]);
            mma_16816<T>(out[2 * d + 1], a, b[2], b[3]);
        }
    }
}

// Of one warp. Each lane holds rows r = lane / 4 and r + 8, columns 8 i + 2 (lane % 4) and the next.
template <int D> struct Running {
    float out[D / 8][4];
    float max[2];
    float sum[2]; // of this lane's keys only, until finish()

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < D / 8; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) out[i][j] = 0.0f;
        max[0] = max[1] = NEG_INF;
        sum[0] = sum[1] = 0.0f;
    }

    // Weights of the keys in place of their scores; what was summed before is scaled to the new maximum.
    template <int KEYS> __device__ __forceinline__ void add_scores(float (&s)[KEYS / 8][4]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float most = max[half];
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n) most = fmaxf(most, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            most = fmaxf(most, __shfl_xor_sync(FULL_MASK, most, 1));
            most = fmaxf(most, __shfl_xor_sync(FULL_MASK, most, 2));
            // While no key was visible, any finite base will do: the weights are 2^-inf = 0.
            float base = most == NEG_INF ? 0.0f : most;
            float scale = exp2_approx(max[half] - base);
            float total = 0.0f;
#pragma unroll
            for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
                for (int j = 2 * half; j < 2 * half + 2; ++j) {
                    s[n][j] = exp2_approx(s[n][j] - base);
                    total += s[n][j];
                }
            max[half] = most;
            sum[half] = sum[half] * scale + total;
#pragma unroll
            for (int i = 0; i < D / 8; ++i) {
                out[i][2 * half] *= scale;
                out[i][2 * half + 1] *= scale;
            }
        }
    }

    // out += weights[16, KEYS] values[KEYS, D].
    template <typename T, int KEYS>
    __device__ __forceinline__ void add_values(const float (&w)[KEYS / 8][4], const T *values) {
        add_products<T, KEYS, D, tile_stride(D)>(out, w, values);
    }

    // The sum over all keys of a row, in each of its lanes.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] += __shfl_xor_sync(FULL_MASK, sum[half], 1);
            sum[half] += __shfl_xor_sync(FULL_MASK, sum[half], 2);
        }
    }
};

// Natural logarithm of the sum of exponentials; minus infinity where no key was visible, as max then is.
__device__ __forceinline__ float log_sum_exp(float max, float sum) { return (max + log2f(sum)) * LN_2; }

// A warp's queries as the left operand: in registers, or read again each time where those do not suffice.
template <typename T, int D, bool KEEP = (D <= 128)> struct Queries {
    static constexpr bool KEPT = KEEP;
    const T *row;
    uint32_t kept[KEPT ? D / 16 : 1][4];

    // `tile`: this warp's 16 rows.
    __device__ __forceinline__ void at(const T *tile) {
        const int lane = threadIdx.x % 32;
        row = tile + (lane % 16) * tile_stride(D) + (lane / 16) * 8;
    }
    // Once the rows have arrived.
    __device__ __forceinline__ void keep() {
        if constexpr (KEPT) {
#pragma unroll
            for (int d = 0; d < D / 16; ++d) ldmatrix_x4(kept[d], row + d * 16);
        }
    }

    // s[16, KEYS] = queries keysᵀ.
    template <int KEYS> __device__ __forceinline__ void times_keys(float (&s)[KEYS / 8][4], const T *keys) {
        const int lane = threadIdx.x % 32;
        // Lanes 0-7 name keys 0-7 of the first 8 columns, 8-15 of the next, the others keys 8-15.
        const T *key = keys + (lane / 16 * 8 + lane % 8) * tile_stride(D) + (lane / 8 % 2) * 8;
#pragma unroll
        for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) s[n][j] = 0.0f;
#pragma unroll
        for (int d = 0; d < D / 16; ++d) {
            uint32_t again[4];
            if constexpr (!KEPT) ldmatrix_x4(again, row + d * 16);
            const uint32_t(&a)[4] = *(KEPT ? &kept[KEPT ? d : 0] : &again);
#pragma unroll
            for (int n = 0; n < KEYS / 16; ++n) {
                uint32_t b[4];
                ldmatrix_x4(b, key + n * 16 * tile_stride(D) + d * 16);
                mma_16816<T>(s[2 * n], a, b[0], b[1]);
                mma_16816<T>(s[2 * n + 1], a, b[2], b[3]);
            }
        }
    }
};

// Scores to powers of two: scaled, with the bias of each key, and minus infinity from a row's limit on.
// `limit`: visible keys of rows r and r + 8, counted from the tile's first key, as `present` is: keys there
// are, behind which nothing may be read. `bias` is null or starts at the tile's first key.
template <int KEYS>
__device__ __forceinline__ void finish_scores(float (&s)[KEYS / 8][4], float scale_log2, const float *bias,
                                              int present, const int (&limit)[2]) {
    const int column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int key = 8 * n + column + j % 2;
            float score = s[n][j] * scale_log2;
            if (bias && key < present) score = fmaf(bias[key], LOG2_E, score);
            s[n][j] = key < limit[j / 2] ? score : NEG_INF;
        }
}

// Rows `first ..` of a matrix into a tile of ROWS, by all THREADS; zeroes for rows from `end` on.
// `address(i)` is where row i begins; it is asked for no row from `end` on, and `first < end`.
template <typename T, int D, int ROWS, int THREADS, typename Address>
__device__ __forceinline__ void load_rows(T *tile, const Address &address, int first, int end, int thread) {
    constexpr int CHUNKS = D / 8;
#pragma unroll 4
    for (int i = thread; i < ROWS * CHUNKS; i += THREADS) {
        const int row = i / CHUNKS, chunk = i % CHUNKS;
        const bool present = first + row < end;
        const T *from = address(present ? first + row : first) + chunk * 8;
        cp_async16(tile + row * tile_stride(D) + chunk * 8, from, present);
    }
}

// Rows one after the other.
template <typename T> struct Strided {
    const T *base;
    int64_t stride;
    __device__ __forceinline__ const T *operator()(int row) const { return base + row * stride; }
};

// Rows in the blocks that a table names; of one KV head.
template <typename T, int D> struct Paged {
    const T *base;
    const int *table;
    int64_t block_stride;
    __device__ __forceinline__ const T *operator()(int row) const {
        return base + table[row / BLOCK_TOKENS] * block_stride + row % BLOCK_TOKENS * D;
    }
};

// Where rows of a product, (token, query head of one KV head), stand in `[tokens, heads]`. Division by the group
// is a multiplication: tiles are loaded often. Exact while row * group < 2^32.
struct GroupRows {
    int64_t first;
    uint32_t inverse; // 2^32 / group, rounded up; of a group of one: 0
    int others;       // heads outside of the group

    __device__ __forceinline__ GroupRows(int64_t first_token, int heads, int kv_heads, int kv_head) {
        const int group = heads / kv_heads;
        first = first_token * heads + kv_head * group;
        inverse = group == 1 ? 0 : 0xffffffffu / group + 1;
        others = heads - group;
    }
    __device__ __forceinline__ int token(int row) const {
        return inverse == 0 ? row : static_cast<int>(__umulhi(static_cast<uint32_t>(row), inverse));
    }
    __device__ __forceinline__ int64_t operator()(int row) const {
        return first + row + static_cast<int64_t>(token(row)) * others;
    }
};
