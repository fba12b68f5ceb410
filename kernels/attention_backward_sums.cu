// The two sums around the backward of packed attention. 256 threads.
//
// attention_backward_delta_<type>, types bf16, f16: what the slopes of a row's scores have in common.
//   out, d_out   [rows, dim]     of the forward, and the gradient of it; rows are tokens times heads
//   delta        [rows] f32      the sum of out * d_out over a row
// grid (ceil(rows / 64)). Limits: dim is a multiple of 8, base addresses of 16 bytes.
//
// attention_backward_sum: gradients of the prefix from the parts of attention_backward_prefix.
//   dk_parts, dv_parts   [parts, count] f32    count is kv_heads * prefix * dim
//   dk, dv               [count] f32           sums in the order of the parts
// grid (ceil(count / 1024), 2). Limits: count is a multiple of 4, base addresses of 16 bytes.
#include "simt.cuh"

constexpr int THREADS = 256;
constexpr int LANES = 4; // of a row: 64 bytes are read together

template <typename T>
__device__ __forceinline__ void backward_delta(const T *out, const T *d_out, float *delta, int64_t rows, int dim) {
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) / LANES;
    const int64_t at = min(row, rows - 1) * dim;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = threadIdx.x % LANES * 8; i < dim; i += LANES * 8) {
        const uint4 loaded[2] = {load16(out + at + i), load16(d_out + at + i)};
        const T *a = reinterpret_cast<const T *>(&loaded[0]), *b = reinterpret_cast<const T *>(&loaded[1]);
#pragma unroll
        for (int j = 0; j < 8; ++j) sum = fmaf(to_float(a[j]), to_float(b[j]), sum);
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_MASK, sum, step);
    if (threadIdx.x % LANES == 0 && row < rows) delta[row] = sum;
}

#define INSTANCE(T)                                                                            \
    extern "C" __global__ void __launch_bounds__(THREADS) attention_backward_delta_##T(        \
        const T *out, const T *d_out, float *delta, int64_t rows, int dim) {                   \
        backward_delta(out, d_out, delta, rows, dim);                                          \
    }                                                                                          \
    KERNEL(attention_backward_delta_##T, THREADS, 0)

INSTANCE(bf16)
INSTANCE(f16)

extern "C" __global__ void __launch_bounds__(THREADS)
    attention_backward_sum(const float *dk_parts, const float *dv_parts, float *dk, float *dv, int parts,
                           int64_t count) {
    const float *from = blockIdx.y == 0 ? dk_parts : dv_parts;
    const int64_t i = (static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x) * 4;
    if (i >= count) return;
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int part = 0; part < parts; ++part) {
        const float4 more = *reinterpret_cast<const float4 *>(from + part * count + i);
        sum.x += more.x;
        sum.y += more.y;
        sum.z += more.z;
        sum.w += more.w;
    }
    *reinterpret_cast<float4 *>((blockIdx.y == 0 ? dk : dv) + i) = sum;
}
KERNEL(attention_backward_sum, THREADS, 0)
