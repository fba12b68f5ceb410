// What the row-wise kernels share: a row read and written 16 bytes at a time, and sums over a block.
#pragma once

#include "simt.cuh"

// Numbers of a row that one access covers. One at a time where rows do not all begin at a multiple of 16 bytes.
template <typename T> constexpr int VECTOR = 16 / static_cast<int>(sizeof(T));

template <typename T, int N> __device__ __forceinline__ void load_floats(float (&to)[N], const T *from) {
    if constexpr (N == VECTOR<T>) {
        alignas(16) T raw[N];
        *reinterpret_cast<uint4 *>(raw) = load16(from);
#pragma unroll
        for (int i = 0; i < N; ++i) to[i] = to_float(raw[i]);
    } else {
        static_assert(N == 1);
        to[0] = to_float(*from);
    }
}

template <typename T, int N> __device__ __forceinline__ void store_floats(T *to, const float (&from)[N]) {
    if constexpr (N == VECTOR<T>) {
        alignas(16) T raw[N];
#pragma unroll
        for (int i = 0; i < N; ++i) raw[i] = from_float<T>(from[i]);
        store16(to, *reinterpret_cast<const uint4 *>(raw));
    } else {
        static_assert(N == 1);
        *to = from_float<T>(from[0]);
    }
}

// The sum over all threads of a block, the same bits in each of them and for every launch.
template <int THREADS> __device__ __forceinline__ float block_sum(float x) {
    STATIC_SHARED(float, parts, THREADS / 32);
    x = warp_sum(x);
    __syncthreads(); // an earlier sum has been read
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < THREADS / 32; ++i) total += parts[i];
    return total;
}
