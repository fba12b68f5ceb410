// The gated activation of Llama-style feed-forward layers, silu(gate) * up, and its gradients. f32 inside.
//
// swiglu_<type>, types bf16, f16, f32
//   gate, up        `stride` elements from one row to the next: width, or 2 * width where one product made both
//   out             [rows, width]   may be gate or up where stride is width
// swiglu_backward_<type>: with s = sigmoid(gate), d_up = grad gate s, d_gate = grad up s (1 + gate (1 - s)).
//   grad            [rows, width]
//   d_gate, d_up    as gate and up, which they may be
// grid (rows, ceil(width / 2048), 1), 256 threads. Limits: base addresses are multiples of 16 bytes; widths
// below 2^27. Widths or strides that are no multiple of 16 bytes are read number by number.
#include "rows.cuh"

constexpr int THREADS = 256;
// Of a row, by one block.
constexpr int PART = 2048;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <typename T, int N>
__device__ __forceinline__ void swiglu(const T *gate, const T *up, T *out, int width, int64_t stride) {
    const int64_t row = blockIdx.x;
    const int end = min(width, static_cast<int>(blockIdx.y + 1) * PART);
    for (int i = blockIdx.y * PART + threadIdx.x * N; i < end; i += THREADS * N) {
        float gates[N], ups[N];
        load_floats(gates, gate + row * stride + i);
        load_floats(ups, up + row * stride + i);
#pragma unroll
        for (int j = 0; j < N; ++j) ups[j] = gates[j] / (1.0f + expf(-gates[j])) * ups[j];
        store_floats(out + row * width + i, ups);
    }
}

template <typename T, int N>
__device__ __forceinline__ void swiglu_backward(const T *gate, const T *up, const T *grad, T *d_gate, T *d_up,
                                                int width, int64_t stride) {
    const int64_t row = blockIdx.x;
    const int end = min(width, static_cast<int>(blockIdx.y + 1) * PART);
    for (int i = blockIdx.y * PART + threadIdx.x * N; i < end; i += THREADS * N) {
        float gates[N], ups[N], slopes[N];
        load_floats(gates, gate + row * stride + i);
        load_floats(ups, up + row * stride + i);
        load_floats(slopes, grad + row * width + i);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float s = sigmoid(gates[j]), by_gate = slopes[j] * ups[j] * s * (1.0f + gates[j] * (1.0f - s));
            ups[j] = slopes[j] * gates[j] * s;
            gates[j] = by_gate;
        }
        store_floats(d_gate + row * stride + i, gates);
        store_floats(d_up + row * stride + i, ups);
    }
}

#define INSTANCE(T, name)                                                                                      \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                      \
        swiglu_##name(const T *gate, const T *up, T *out, int width, int64_t stride) {                         \
        if (width % VECTOR<T> == 0 && stride % VECTOR<T> == 0)                                                 \
            swiglu<T, VECTOR<T>>(gate, up, out, width, stride);                                                \
        else                                                                                                   \
            swiglu<T, 1>(gate, up, out, width, stride);                                                        \
    }                                                                                                          \
    KERNEL(swiglu_##name, THREADS, 0)                                                                          \
    extern "C" __global__ void __launch_bounds__(THREADS) swiglu_backward_##name(                              \
        const T *gate, const T *up, const T *grad, T *d_gate, T *d_up, int width, int64_t stride) {            \
        if (width % VECTOR<T> == 0 && stride % VECTOR<T> == 0)                                                 \
            swiglu_backward<T, VECTOR<T>>(gate, up, grad, d_gate, d_up, width, stride);                        \
        else                                                                                                   \
            swiglu_backward<T, 1>(gate, up, grad, d_gate, d_up, width, stride);                                \
    }                                                                                                          \
    KERNEL(swiglu_backward_##name, THREADS, 0)

INSTANCE(bf16, bf16)
INSTANCE(f16, f16)
INSTANCE(float, f32)
