// Cross entropy of rows of logits with sparse targets, and its gradient in place of the logits.
//
// distillation_loss_<type>, types bf16, f32. One block per row; all sums in f32 and in one order.
//   logits     [rows, vocab]       with `gradient`, overwritten by unit * (mass * softmax - p)
//   starts     [rows + 1]          row r's targets are the entries starts[r] .. starts[r + 1]
//   ids        [entries]           token ids, below vocab; one may occur again in its row
//   probs      [entries] f32       p; mass is their sum over the row
//   losses     [rows] f32          minus the sum of p * ln softmax(scale * logits); not finite if a logit of the
//                                  row is NaN or plus infinity, or one with a target minus infinity
//   slopes     [entries] f32       scratch; null without `gradient`
//   scale                          1 / temperature, positive
//   unit                           scale / divisor of the loss
// A row without targets has loss and gradient zero, whatever its logits.
// grid (rows), 512 threads. Limits: vocab > 0; 2^31 - 1 entries; logits aligned to their type.
#include "simt.cuh"

constexpr int THREADS = 512;
constexpr int WARPS = THREADS / 32;
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float LN_2 = 0.6931471805599453f;

// `visit(x)` for every number of a row, in arrays of 16 bytes where aligned and of one at the ends; with STORE
// what it left in x replaces them. By all threads of the block.
template <bool STORE, typename T, typename Visit>
__device__ __forceinline__ void each_of_row(T *row, int count, const Visit &visit) {
    constexpr int WIDTH = 16 / sizeof(T);
    const int before = static_cast<int>((16 - reinterpret_cast<uintptr_t>(row) % 16) % 16 / sizeof(T));
    const int head = min(before, count), vectors = (count - head) / WIDTH;
#pragma unroll 4
    for (int i = threadIdx.x; i < vectors; i += THREADS) {
        T *at = row + head + static_cast<int64_t>(i) * WIDTH;
        uint4 loaded = load16(at);
        T *numbers = reinterpret_cast<T *>(&loaded);
        float x[WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) x[j] = to_float(numbers[j]);
        visit(x);
        if constexpr (STORE) {
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) numbers[j] = from_float<T>(x[j]);
            store16(at, loaded);
        }
    }
    for (int i = threadIdx.x; i < count - vectors * WIDTH; i += THREADS) {
        T *at = row + (i < head ? i : i + vectors * WIDTH);
        float x[1] = {to_float(*at)};
        visit(x);
        if constexpr (STORE) *at = from_float<T>(x[0]);
    }
}

// The sum of 2^(x - base), of numbers in powers of two. While none is above minus infinity, any base will do.
struct Exponentials {
    float max = NEG_INF, sum = 0.0f;
    __device__ __forceinline__ float base() const { return max == NEG_INF ? 0.0f : max; }
    __device__ __forceinline__ void raise(float most) {
        const float before = max;
        max = fmaxf(max, most);
        sum *= exp2_approx(before - base());
    }
};

template <typename T>
__device__ __forceinline__ void distillation_loss(T *logits, const int *starts, const int *ids, const float *probs,
                                                  float *losses, float *slopes, int vocab, float scale, float unit,
                                                  int gradient) {
    STATIC_SHARED(float, shared_max, WARPS);
    STATIC_SHARED(float, shared_sum, WARPS);
    STATIC_SHARED(float, shared_mass, WARPS);
    STATIC_SHARED(float, shared_loss, WARPS);
    T *row = logits + static_cast<int64_t>(blockIdx.x) * vocab;
    const int begin = starts[blockIdx.x], end = starts[blockIdx.x + 1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (begin == end) {
        if (threadIdx.x == 0) losses[blockIdx.x] = 0.0f;
        if (gradient) each_of_row<true>(row, vocab, [](auto &x) {
            for (float &value : x) value = 0.0f;
        });
        return;
    }

    const float to_log2 = scale * LOG2_E;
    Exponentials all;
    each_of_row<false>(row, vocab, [&](const auto &x) {
        float most = NEG_INF;
        for (float value : x) most = fmaxf(most, value * to_log2);
        if (most > all.max) all.raise(most);
        const float base = all.base();
        for (float value : x) all.sum += exp2_approx(fmaf(value, to_log2, -base));
    });
    float mass = 0.0f;
    for (int i = begin + threadIdx.x; i < end; i += THREADS) mass += probs[i];
    all.raise(warp_max(all.max));
    all.sum = warp_sum(all.sum);
    mass = warp_sum(mass);
    if (lane == 0) {
        shared_max[warp] = all.max;
        shared_sum[warp] = all.sum;
        shared_mass[warp] = mass;
    }
    __syncthreads();
    all = Exponentials();
    mass = 0.0f;
    for (int i = 0; i < WARPS; ++i) all.max = fmaxf(all.max, shared_max[i]);
    const float base = all.base();
    for (int i = 0; i < WARPS; ++i) {
        all.sum += shared_sum[i] * exp2_approx(shared_max[i] - base);
        mass += shared_mass[i];
    }

    const float factor = unit * mass / all.sum, log2_sum = log2f(all.sum);
    float loss = 0.0f;
    for (int i = begin + threadIdx.x; i < end; i += THREADS) {
        const int id = ids[i];
        const float power = fmaf(to_float(row[id]), to_log2, -base);
        loss -= probs[i] * ((power - log2_sum) * LN_2);
        if (!gradient) continue;
        // The difference is rounded once: near the optimum it is small, and softmax and p are not.
        float p = 0.0f;
        for (int other = begin; other < end; ++other)
            if (ids[other] == id) p += probs[other];
        slopes[i] = factor * exp2_approx(power) - unit * p;
    }
    loss = warp_sum(loss);
    if (lane == 0) shared_loss[warp] = loss;
    __syncthreads(); // the targets' logits have been read, too
    if (threadIdx.x == 0) {
        float total = 0.0f;
        for (int i = 0; i < WARPS; ++i) total += shared_loss[i];
        losses[blockIdx.x] = total;
    }
    if (!gradient) return;
    each_of_row<true>(row, vocab, [&](auto &x) {
        for (float &value : x) value = factor * exp2_approx(fmaf(value, to_log2, -base));
    });
    __syncthreads();
    for (int i = begin + threadIdx.x; i < end; i += THREADS) row[ids[i]] = from_float<T>(slopes[i]);
}

#define INSTANCE(T, name)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS) distillation_loss_##name(                             \
        T *logits, const int *starts, const int *ids, const float *probs, float *losses, float *slopes,         \
        int vocab, float scale, float unit, int gradient) {                                                     \
        distillation_loss(logits, starts, ids, probs, losses, slopes, vocab, scale, unit, gradient);            \
    }                                                                                                           \
    KERNEL(distillation_loss_##name, THREADS, 0)

INSTANCE(bf16, bf16)
INSTANCE(float, f32)
