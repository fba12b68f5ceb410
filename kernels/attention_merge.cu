// Merges partial attentions of the same query over different keys, by their log-sum-exps. Exact: the weight of
// a part is its share of the softmax's denominator. A warp per query row and head.
//
// attention_merge_<type>, types bf16, f16, f32.
//   parts     [slots, heads, dim] f32     each normalised over its own keys
//   lse       [slots, heads] f32          natural logarithm; minus infinity: the part is not read
//   first     [rows + 1]                  row i merges slots first[i] .. first[i + 1]
//   row_ids   [rows]                      where row i goes in `out`; null: i
//   out       [any, heads, dim]           zeroes where no key was visible
//   out_lse   [any, heads] f32            null: not wanted
// grid (rows, ceil(heads / 4)), 128 threads. Limits: dim even.
#include "attention_block.cuh"

template <typename T>
__device__ __forceinline__ void attention_merge(const float *parts, const float *lse, const int *first,
                                                const int *row_ids, T *out, float *out_lse, int heads, int dim) {
    const int row = blockIdx.x, head = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (head >= heads) return;
    const int begin = first[row], end = first[row + 1];
    float most = NEG_INF, total = 0.0f;
    for (int slot = begin; slot < end; ++slot) most = fmaxf(most, lse[static_cast<int64_t>(slot) * heads + head]);
    const float base = most == NEG_INF ? 0.0f : most;
    for (int slot = begin; slot < end; ++slot)
        total += exp2_approx((lse[static_cast<int64_t>(slot) * heads + head] - base) * LOG2_E);
    const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
    const int64_t to = static_cast<int64_t>(row_ids ? row_ids[row] : row) * heads + head;
    for (int d = 2 * lane; d < dim; d += 64) {
        float a = 0.0f, b = 0.0f;
        for (int slot = begin; slot < end; ++slot) {
            const int64_t from = static_cast<int64_t>(slot) * heads + head;
            if (lse[from] == NEG_INF) continue;
            const float weight = exp2_approx((lse[from] - base) * LOG2_E) * inverse;
            a += weight * parts[from * dim + d];
            b += weight * parts[from * dim + d + 1];
        }
        store2(out + to * dim + d, a, b);
    }
    if (out_lse && lane == 0) out_lse[to] = total == 0.0f ? NEG_INF : base + logf(total);
}

using f32 = float;
#define INSTANCE(T)                                                                              \
    extern "C" __global__ void __launch_bounds__(128, 8)                                         \
        attention_merge_##T(                                                                     \
            const float *parts, const float *lse, const int *first, const int *row_ids, T *out,  \
            float *out_lse, int heads, int dim) {                                                \
        attention_merge(                                                                         \
            parts, lse, first, row_ids, out, out_lse, heads, dim);                               \
    }                                                                                            \
    KERNEL(attention_merge_##T, 128, 0)

INSTANCE(bf16)
INSTANCE(f16)
INSTANCE(f32)
