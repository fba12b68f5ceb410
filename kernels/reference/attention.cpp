// The attention kernels written out in f64, one row after the other. What they must agree with.
//
// Besides the result each gives `noise`: the root of the sum of squares of weight times value. A kernel rounds
// each weight to 16 bits, so its error is a few times 2^-9 of that (bf16), and a key too many or too few shows.
#include "../simt/numbers.hpp"
#include <cmath>
#include <vector>

namespace {
struct Row {
    std::vector<double> scores, out, noise;
    std::vector<const void *> values;

    template <typename T> void see(const T *q, const T *key, const T *value, int dim, double scale, double bias) {
        double dot = 0;
        for (int d = 0; d < dim; ++d) dot += static_cast<double>(to_float(q[d])) * to_float(key[d]);
        scores.push_back(dot * scale + bias);
        values.push_back(value);
    }

    // Writes `[dim]` numbers to `out` and `noise`, one to `lse`, and forgets the keys.
    template <typename T> void finish(int dim, double *out, double *noise, double *lse) {
        double most = -INFINITY, sum = 0;
        for (double score : scores) most = std::fmax(most, score);
        for (double &score : scores) {
            score = most == -INFINITY ? 0 : std::exp(score - most);
            sum += score;
        }
        *lse = sum == 0 ? -INFINITY : most + std::log(sum);
        for (int d = 0; d < dim; ++d) {
            double total = 0, squares = 0;
            for (size_t i = 0; i < scores.size(); ++i) {
                if (scores[i] == 0) continue;
                double term = scores[i] / sum * to_float(static_cast<const T *>(values[i])[d]);
                total += term;
                squares += term * term;
            }
            out[d] = total;
            noise[d] = std::sqrt(squares);
        }
        scores.clear();
        values.clear();
    }
};

template <typename T>
void prefix(const T *q, const T *k, const T *v, const float *bias, const int *row_ids, const int *slots,
            double *out, double *noise, double *lse, int rows, int heads, int kv_heads, int tokens,
            int64_t head_stride, int part_tokens, int parts, int dim, float scale) {
    Row row;
    for (int i = 0; i < rows; ++i)
        for (int head = 0; head < heads; ++head)
            for (int part = 0; part < parts; ++part) {
                const int kv_head = head / (heads / kv_heads);
                const T *query = q + (static_cast<int64_t>(row_ids ? row_ids[i] : i) * heads + head) * dim;
                for (int t = part * part_tokens; t < tokens && t < (part + 1) * part_tokens; ++t) {
                    const int64_t at = kv_head * head_stride + static_cast<int64_t>(t) * dim;
                    row.see(query, k + at, v + at, dim, scale, bias ? bias[kv_head * tokens + t] : 0);
                }
                const int64_t at = static_cast<int64_t>(slots ? slots[i] + part : i * parts + part) * heads + head;
                row.finish<T>(dim, out + at * dim, noise + at * dim, lse + at);
            }
}
} // namespace

#define EXPORT extern "C" __attribute__((visibility("default"))) void
#define INSTANCE(T)                                                                                             \
    EXPORT reference_attention_prefix_##T(const T *q, const T *k, const T *v, const float *bias,                \
                                          const int *row_ids, const int *slots, double *out, double *noise,     \
                                          double *lse, int rows, int heads, int kv_heads, int tokens,           \
                                          int64_t head_stride, int part_tokens, int parts, int dim,             \
                                          float scale) {                                                        \
        prefix(q, k, v, bias, row_ids, slots, out, noise, lse, rows, heads, kv_heads, tokens, head_stride,      \
               part_tokens, parts, dim, scale);                                                                 \
    }

INSTANCE(bf16)
INSTANCE(f16)
