// Rotary position embedding, half-split pairing, of queries and keys, with what surrounds it: the per-head
// RMSNorm of Qwen3 before it, and the store of keys and values into the paged cache after it. f32 inside.
//
// rope_<type>, types bf16, f16, f32
//   q, k, v         heads side by side, `*_stride` elements from one token to the next
//   q_norm, k_norm  [D]                        weights of the norm of every head; null: none
//   cos, sin        [tokens, D / 2] f32        of each token's position
//   q_out           [tokens, heads, D]         may be q where its rows are as far apart; null: nothing for queries
//   k_out           [tokens, kv_heads, D]      likewise of k
//   k_cache, v_cache [blocks, kv_heads, 16, D] rotated keys, and values as they are; null: no cache, v is unused
//   slots           [tokens] int32             block * 16 + offset; -1: the token is not stored
//   error           [1] int32                  raised to 1 + the last token whose slot is none of the cache_slots
//                                              (and not -1), which is not stored; the caller zeroes it before;
//                                              null: nobody asks
// grid (ceil(tokens * (heads + kv_heads + (k_cache ? kv_heads : 0)) / 4), 1, 1), 128 threads: a warp per head.
//
// rope_backward_<type>: gradients of what entered, for queries or for keys: the rotation by the opposite angle,
// then the gradient of the norm.
//   grad, dx        [tokens, heads, D]         may be the same
//   x               [tokens, heads, D]         what was normalised, `x_stride` apart; null without norm
//   norm            [D]                        null: no norm
// grid (ceil(tokens * heads / 4), 1, 1), 128 threads.
// Limits: D a multiple of 4, at most 256; even strides; base addresses are multiples of 8 bytes; at most 2^31 - 1
// heads over all tokens.
#include "simt.cuh"

constexpr int THREADS = 128;
constexpr int SLOTS = 16;      // of a block of the paged cache
constexpr int STEPS = 256 / 128; // of 64 numbers of each half

template <typename T> struct alignas(2 * sizeof(T)) Pair {
    T a, b;
};

// One head in a warp: lane l holds numbers 2 l + 64 s and the next of the first half, and their partners.
struct Head {
    float first[STEPS][2], second[STEPS][2];
    int half;

    __device__ __forceinline__ explicit Head(int dim) : half(dim / 2) {}

    // Calls f(s, i) for the pairs of this lane; i from the start of a half.
    template <typename F> __device__ __forceinline__ void each(F f) const {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
            const int i = 2 * (threadIdx.x % 32) + 64 * s;
            if (i < half) f(s, i);
        }
    }
    template <typename T> __device__ __forceinline__ void load(const T *from) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) first[s][0] = first[s][1] = second[s][0] = second[s][1] = 0.0f;
        each([&](int s, int i) {
            const Pair<T> a = *reinterpret_cast<const Pair<T> *>(from + i);
            const Pair<T> b = *reinterpret_cast<const Pair<T> *>(from + half + i);
            first[s][0] = to_float(a.a), first[s][1] = to_float(a.b);
            second[s][0] = to_float(b.a), second[s][1] = to_float(b.b);
        });
    }
    template <typename T> __device__ __forceinline__ void store(T *to) const {
        each([&](int s, int i) {
            *reinterpret_cast<Pair<T> *>(to + i) = {from_float<T>(first[s][0]), from_float<T>(first[s][1])};
            *reinterpret_cast<Pair<T> *>(to + half + i) = {from_float<T>(second[s][0]), from_float<T>(second[s][1])};
        });
    }
    // Of one token; direction -1 turns back.
    __device__ __forceinline__ void rotate(const float *cos, const float *sin, float direction) {
        each([&](int s, int i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const float c = cos[i + j], turn = sin[i + j] * direction, a = first[s][j], b = second[s][j];
                first[s][j] = a * c - b * turn;
                second[s][j] = b * c + a * turn;
            }
        });
    }
    // Sum of the products with another head's numbers. All lanes.
    __device__ __forceinline__ float dot(const Head &other) const {
        float sum = 0.0f;
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int j = 0; j < 2; ++j) sum += first[s][j] * other.first[s][j] + second[s][j] * other.second[s][j];
        return warp_sum(sum);
    }
    __device__ __forceinline__ float inverse_root_mean_square(float eps) const {
        return rsqrtf(dot(*this) / static_cast<float>(2 * half) + eps);
    }
    // Each number times `scale` and its weight.
    template <typename T> __device__ __forceinline__ void times(const T *weight, float scale) {
        each([&](int s, int i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                first[s][j] = first[s][j] * scale * to_float(weight[i + j]);
                second[s][j] = second[s][j] * scale * to_float(weight[half + i + j]);
            }
        });
    }
};

template <typename T>
__device__ __forceinline__ void rope(const T *q, const T *k, const T *v, const T *q_norm, const T *k_norm,
                                     const float *cos, const float *sin, T *q_out, T *k_out, T *k_cache,
                                     T *v_cache, const int *slots, int *error, int tokens, int heads, int kv_heads,
                                     int dim, int64_t q_stride, int64_t k_stride, int64_t v_stride,
                                     int cache_slots, float eps) {
    const int parts = heads + kv_heads + (k_cache ? kv_heads : 0);
    const int64_t at = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    const int token = static_cast<int>(at / parts), part = static_cast<int>(at % parts);
    if (token >= tokens) return; // a whole warp
    const bool query = part < heads, value = part >= heads + kv_heads;
    const int head = query ? part : (part - heads) % kv_heads;
    const T *from = query   ? q + token * q_stride
                    : value ? v + token * v_stride
                            : k + token * k_stride;
    Head numbers(dim);
    numbers.load(from + static_cast<int64_t>(head) * dim);
    if (!value) {
        const T *norm = query ? q_norm : k_norm;
        if (norm) numbers.times(norm, numbers.inverse_root_mean_square(eps));
        const int64_t angles = static_cast<int64_t>(token) * (dim / 2);
        numbers.rotate(cos + angles, sin + angles, 1.0f);
        T *out = query ? q_out : k_out;
        if (out) numbers.store(out + (static_cast<int64_t>(token) * (query ? heads : kv_heads) + head) * dim);
    }
    if (query || !k_cache) return;
    const int slot = slots[token];
    if (slot < 0 || slot >= cache_slots) {
        if (slot != -1 && error && threadIdx.x % 32 == 0) atomicMax(error, token + 1);
        return;
    }
    const int64_t row = (static_cast<int64_t>(slot / SLOTS) * kv_heads + head) * SLOTS + slot % SLOTS;
    numbers.store((value ? v_cache : k_cache) + row * dim);
}

template <typename T>
__device__ __forceinline__ void rope_backward(const T *grad, const T *x, const T *norm, const float *cos,
                                              const float *sin, T *dx, int tokens, int heads, int dim,
                                              int64_t x_stride, float eps) {
    const int64_t at = static_cast<int64_t>(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32;
    const int token = static_cast<int>(at / heads), head = static_cast<int>(at % heads);
    if (token >= tokens) return; // a whole warp
    Head slopes(dim);
    slopes.load(grad + at * dim);
    const int64_t angles = static_cast<int64_t>(token) * (dim / 2);
    slopes.rotate(cos + angles, sin + angles, -1.0f);
    if (norm) {
        // As in rms_norm_backward: dx = r h - x r^3 mean(h x), h = slopes * weight.
        Head values(dim);
        values.load(x + token * x_stride + static_cast<int64_t>(head) * dim);
        slopes.times(norm, 1.0f);
        const float r = values.inverse_root_mean_square(eps);
        const float back = slopes.dot(values) / static_cast<float>(dim) * r * r * r;
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                slopes.first[s][j] = slopes.first[s][j] * r - values.first[s][j] * back;
                slopes.second[s][j] = slopes.second[s][j] * r - values.second[s][j] * back;
            }
    }
    slopes.store(dx + at * dim);
}

#define INSTANCE(T, name)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        rope_##name(const T *q, const T *k, const T *v, const T *q_norm, const T *k_norm, const float *cos,     \
                    const float *sin, T *q_out, T *k_out, T *k_cache, T *v_cache, const int *slots, int *error, \
                    int tokens, int heads, int kv_heads, int dim, int64_t q_stride, int64_t k_stride,           \
                    int64_t v_stride, int cache_slots, float eps) {                                             \
        rope(q, k, v, q_norm, k_norm, cos, sin, q_out, k_out, k_cache, v_cache, slots, error, tokens, heads,    \
             kv_heads, dim, q_stride, k_stride, v_stride, cache_slots, eps);                                    \
    }                                                                                                           \
    KERNEL(rope_##name, THREADS, 0)                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS)                                                       \
        rope_backward_##name(const T *grad, const T *x, const T *norm, const float *cos, const float *sin,      \
                             T *dx, int tokens, int heads, int dim, int64_t x_stride, float eps) {              \
        rope_backward(grad, x, norm, cos, sin, dx, tokens, heads, dim, x_stride, eps);                          \
    }                                                                                                           \
    KERNEL(rope_backward_##name, THREADS, 0)

INSTANCE(bf16, bf16)
INSTANCE(f16, f16)
INSTANCE(float, f32)
