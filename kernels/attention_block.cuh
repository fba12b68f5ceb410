// A block of four warps, 16 query rows each, that passes over keys together: prefix attention and packed
// attention. The next keys are fetched while values are used, the next values while keys are.
#pragma once

#include "attention_tile.cuh"

template <typename Element, int HEAD_DIM> struct Block {
    using T = Element;
    static constexpr int D = HEAD_DIM;
    static constexpr int WARPS = 4;
    static constexpr int THREADS = 32 * WARPS;
    static constexpr int ROWS = WARP_ROWS * WARPS;
    static constexpr int KEYS = D <= 128 ? 64 : 32; // of a tile: what registers allow
    // Blocks that registers let an SM hold at once; the compiler is kept to it.
    static constexpr int RESIDENT = D <= 32 ? 4 : D <= 96 ? 3 : 2;
    static constexpr int SHARED_BYTES = (ROWS + 2 * KEYS) * tile_stride(D) * static_cast<int>(sizeof(T));

    T *queries, *keys, *values;
    Queries<T, D> q;
    Running<D> running;
    bool loaded;

    __device__ __forceinline__ explicit Block(unsigned char *shared) {
        queries = reinterpret_cast<T *>(shared);
        keys = queries + ROWS * tile_stride(D);
        values = keys + KEYS * tile_stride(D);
        q.at(queries + threadIdx.x / 32 * WARP_ROWS * tile_stride(D));
        running.clear();
        loaded = false;
    }

    // The row of the block that half 0 or 1 of this thread's numbers belongs to.
    static __device__ __forceinline__ int row(int half) {
        return threadIdx.x / 32 * WARP_ROWS + threadIdx.x % 32 / 4 + 8 * half;
    }

    // Starts to load the queries; the first attend() waits for them. `address(i)`: of row i < rows, rows > 0.
    template <typename Address> __device__ __forceinline__ void load_queries(const Address &address, int rows) {
        load_rows<T, D, ROWS, THREADS>(queries, address, 0, rows, threadIdx.x);
    }

    // Adds keys begin .. end; this thread's rows see those below `limit`. All threads of the block, with the
    // same begin and end. `bias` is null or one number per key.
    template <typename Address>
    __device__ __forceinline__ void attend(const Address &key, const Address &value, const float *bias, int begin,
                                           int end, const int (&limit)[2], float scale_log2) {
        if (begin >= end) return;
        load_rows<T, D, KEYS, THREADS>(keys, key, begin, end, threadIdx.x);
        cp_async_commit();
        for (int first = begin; first < end; first += KEYS) {
            cp_async_wait<0>();
            __syncthreads(); // keys are here; nobody reads the last values any more
            load_rows<T, D, KEYS, THREADS>(values, value, first, end, threadIdx.x);
            cp_async_commit();
            if (!loaded) q.keep();
            loaded = true;
            float s[KEYS / 8][4];
            q.template times_keys<KEYS>(s, keys);
            const int seen[2] = {limit[0] - first, limit[1] - first};
            finish_scores<KEYS>(s, scale_log2, bias ? bias + first : nullptr, end - first, seen);
            running.template add_scores<KEYS>(s);
            cp_async_wait<0>();
            __syncthreads(); // values are here; nobody reads these keys any more
            if (first + KEYS < end) {
                load_rows<T, D, KEYS, THREADS>(keys, key, first + KEYS, end, threadIdx.x);
                cp_async_commit();
            }
            running.template add_values<T, KEYS>(s, values);
        }
    }
};

// Two neighbouring numbers of the result. f32 for partial results, the model's type for final ones.
__device__ __forceinline__ void store2(float *to, float a, float b) {
    *reinterpret_cast<float2 *>(to) = make_float2(a, b);
}
template <typename T> __device__ __forceinline__ void store2(T *to, float a, float b) {
    *reinterpret_cast<uint32_t *>(to) = pack2<T>(a, b);
}

// Stores one row (half 0 or 1) of a finished Running, as `to` `[D]`, and its log-sum-exp.
template <typename Out, int D>
__device__ __forceinline__ void store_row(const Running<D> &running, int half, Out *to, float *lse) {
    const float sum = running.sum[half];
    const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
        store2(to + 8 * i + 2 * (threadIdx.x % 4), running.out[i][2 * half] * inverse,
               running.out[i][2 * half + 1] * inverse);
    if (threadIdx.x % 4 == 0) *lse = log_sum_exp(running.max[half], sum);
}
