// Root-mean-square normalisation over rows, with the residual addition before it, and its gradient.
// Arithmetic in f32; a row's bits do not depend on the other rows.
//
// rms_norm_<type>, types bf16, f16, f32: out = x / sqrt(mean(x^2) + eps) * weight.
//   x, out        [rows, width]   may be the same
//   residual      [rows, width]   added to x first, and the sum, rounded to the type, is what is normalised
//   residual_out  [rows, width]   that sum; may be `residual` or `x`. Both null: x as it is
//   weight        [width]
// rms_norm_backward_<type>: with r = 1 / sqrt(mean(x^2) + eps), h = grad * weight:
//   dx = add + r h - x r^3 mean(h x). The weights are frozen and get no gradient.
//   x             [rows, width]   what was normalised (residual_out, where there was a residual)
//   grad, dx      [rows, width]   may be the same
//   add           [rows, width]   gradient that reaches x past the normalisation; null: none. May be dx
// grid (rows, 1, 1), 256 threads. Limits: base addresses are multiples of 16 bytes; widths that are no multiple
// of 16 bytes are read number by number.
#include "rows.cuh"

constexpr int THREADS = 256;

template <typename T, int N>
__device__ __forceinline__ void rms_norm(const T *x, const T *residual, const T *weight, T *residual_out, T *out,
                                         int width, float eps) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
    const T *normalised = residual ? residual_out : x;
    float squares = 0.0f;
    for (int i = threadIdx.x * N; i < width; i += THREADS * N) {
        float values[N];
        load_floats(values, x + row + i);
        if (residual) {
            float before[N];
            load_floats(before, residual + row + i);
#pragma unroll
            for (int j = 0; j < N; ++j) values[j] = to_float(from_float<T>(values[j] + before[j]));
            store_floats(residual_out + row + i, values);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) squares += values[j] * values[j];
    }
    const float scale = rsqrtf(block_sum<THREADS>(squares) / static_cast<float>(width) + eps);
    // Every thread reads again what it read or wrote itself.
    for (int i = threadIdx.x * N; i < width; i += THREADS * N) {
        float values[N], weights[N];
        load_floats(values, normalised + row + i);
        load_floats(weights, weight + i);
#pragma unroll
        for (int j = 0; j < N; ++j) values[j] = values[j] * scale * weights[j];
        store_floats(out + row + i, values);
    }
}

template <typename T, int N>
__device__ __forceinline__ void rms_norm_backward(const T *x, const T *weight, const T *grad, const T *add, T *dx,
                                                  int width, float eps) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * width;
    float squares = 0.0f, along = 0.0f;
    for (int i = threadIdx.x * N; i < width; i += THREADS * N) {
        float values[N], weights[N], slopes[N];
        load_floats(values, x + row + i);
        load_floats(weights, weight + i);
        load_floats(slopes, grad + row + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            squares += values[j] * values[j];
            along += slopes[j] * weights[j] * values[j];
        }
    }
    const float inverse_width = 1.0f / static_cast<float>(width);
    const float scale = rsqrtf(block_sum<THREADS>(squares) * inverse_width + eps);
    const float back = block_sum<THREADS>(along) * inverse_width * scale * scale * scale;
    for (int i = threadIdx.x * N; i < width; i += THREADS * N) {
        float values[N], weights[N], slopes[N], sums[N] = {};
        load_floats(values, x + row + i);
        load_floats(weights, weight + i);
        load_floats(slopes, grad + row + i);
        if (add) load_floats(sums, add + row + i);
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] += slopes[j] * weights[j] * scale - values[j] * back;
        store_floats(dx + row + i, sums);
    }
}

#define INSTANCE(T, name)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
        rms_norm_##name(const T *x, const T *residual, const T *weight, T *residual_out, T *out, int width,   \
                        float eps) {                                                                          \
        if (width % VECTOR<T> == 0)                                                                           \
            rms_norm<T, VECTOR<T>>(x, residual, weight, residual_out, out, width, eps);                       \
        else                                                                                                  \
            rms_norm<T, 1>(x, residual, weight, residual_out, out, width, eps);                               \
    }                                                                                                         \
    KERNEL(rms_norm_##name, THREADS, 0)                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                     \
        rms_norm_backward_##name(const T *x, const T *weight, const T *grad, const T *add, T *dx, int width,  \
                                 float eps) {                                                                 \
        if (width % VECTOR<T> == 0)                                                                           \
            rms_norm_backward<T, VECTOR<T>>(x, weight, grad, add, dx, width, eps);                            \
        else                                                                                                  \
            rms_norm_backward<T, 1>(x, weight, grad, add, dx, width, eps);                                    \
    }                                                                                                         \
    KERNEL(rms_norm_backward_##name, THREADS, 0)

INSTANCE(bf16, bf16)
INSTANCE(f16, f16)
INSTANCE(float, f32)
