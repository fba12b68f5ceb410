// Rows of the embedding table.
//
// embedding_<type>, types bf16, f16, f32
//   ids      [tokens] int32
//   table    [vocab, width]
//   out      [tokens, width]   zeroes for an id that is not one of the table's
//   error    [1] int32         raised to 1 + the last token with such an id; the caller zeroes it before
// grid (tokens, 1, 1), 128 threads. Limits: base addresses are multiples of 16 bytes; widths that are no
// multiple of 16 bytes are copied number by number.
#include "rows.cuh"

constexpr int THREADS = 128;

template <typename T, int N>
__device__ __forceinline__ void embedding(const int *ids, const T *table, T *out, int *error, int vocab,
                                          int width) {
    const int id = ids[blockIdx.x];
    const bool known = id >= 0 && id < vocab;
    if (!known && threadIdx.x == 0) atomicMax(error, static_cast<int>(blockIdx.x) + 1);
    const T *from = table + static_cast<int64_t>(known ? id : 0) * width;
    T *to = out + static_cast<int64_t>(blockIdx.x) * width;
    for (int i = threadIdx.x * N; i < width; i += THREADS * N) {
        if constexpr (N == 1)
            to[i] = known ? from[i] : from_float<T>(0.0f);
        else
            store16(to + i, known ? load16(from + i) : make_uint4(0, 0, 0, 0));
    }
}

#define INSTANCE(T, name)                                                                                   \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                   \
        embedding_##name(const int *ids, const T *table, T *out, int *error, int vocab, int width) {        \
        if (width % VECTOR<T> == 0)                                                                         \
            embedding<T, VECTOR<T>>(ids, table, out, error, vocab, width);                                  \
        else                                                                                                \
            embedding<T, 1>(ids, table, out, error, vocab, width);                                          \
    }                                                                                                       \
    KERNEL(embedding_##name, THREADS, 0)

INSTANCE(bf16, bf16)
INSTANCE(f16, f16)
INSTANCE(float, f32)
