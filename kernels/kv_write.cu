// Stores keys and values of new tokens in the paged cache of a layer.
//
// kv_write_<type>, types bf16, f16
//   k, v              [tokens, kv_heads, D]
//   places            [tokens]                   block * 16 + slot
//   k_cache, v_cache  [blocks, kv_heads, 16, D]
// grid (tokens), 128 threads. Limits: base addresses are multiples of 16 bytes, D a multiple of 8.
#include "simt.cuh"

constexpr int THREADS = 128;
constexpr int SLOTS = 16; // of a block

template <typename T>
__device__ __forceinline__ void kv_write(const T *k, const T *v, const unsigned *places, T *k_cache, T *v_cache,
                                         int kv_heads, int dim) {
    constexpr int N = 16 / sizeof(T);
    const int64_t from = static_cast<int64_t>(blockIdx.x) * kv_heads * dim;
    const unsigned place = places[blockIdx.x];
    const int64_t block = static_cast<int64_t>(place / SLOTS) * kv_heads * SLOTS * dim;
    for (int i = threadIdx.x * N; i < kv_heads * dim; i += THREADS * N) {
        const int head = i / dim;
        const int64_t to = block + (static_cast<int64_t>(head) * SLOTS + place % SLOTS) * dim + i % dim;
        store16(k_cache + to, load16(k + from + i));
        store16(v_cache + to, load16(v + from + i));
    }
}

#define INSTANCE(T)                                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                      \
        kv_write_##T(const T *k, const T *v, const unsigned *places, T *k_cache, T *v_cache, int kv_heads,     \
                     int dim) {                                                                                \
        kv_write(k, v, places, k_cache, v_cache, kv_heads, dim);                                               \
    }                                                                                                          \
    KERNEL(kv_write_##T, THREADS, 0)

INSTANCE(bf16)
INSTANCE(f16)
