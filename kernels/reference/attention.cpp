// The attention kernels written out in f64, one row after the other. What they must agree with.
//
// Besides the result each gives `noise`: the root of the sum of squares of weight times value. A kernel rounds
// each weight to 16 bits, so its error is a few times 2^-9 of that (bf16), and a key too many or too few shows.
#include "../simt/call.hpp"
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

// Keys of a sequence in the blocks of the cache: number `t` of KV head `kv_head`.
template <typename T>
const T *in_blocks(const T *cache, const int *table, int t, int kv_head, int kv_heads, int dim) {
    return cache + ((static_cast<int64_t>(table[t / 16]) * kv_heads + kv_head) * 16 + t % 16) * dim;
}

template <typename T>
void decode(const T *q, const T *k, const T *v, const int *tables, const int *lengths, const int *row_ids,
            const int *slots, double *out, double *noise, double *lse, int sequences, int heads, int kv_heads,
            int table_stride, int part_tokens, int parts, int dim, float scale) {
    Row row;
    for (int i = 0; i < sequences; ++i)
        for (int head = 0; head < heads; ++head)
            for (int part = 0; part < parts; ++part) {
                if (part > 0 && part * part_tokens >= lengths[i]) continue;
                const int kv_head = head / (heads / kv_heads), *table = tables + i * table_stride;
                const T *query = q + (static_cast<int64_t>(row_ids ? row_ids[i] : i) * heads + head) * dim;
                for (int t = part * part_tokens; t < lengths[i] && t < (part + 1) * part_tokens; ++t)
                    row.see(query, in_blocks(k, table, t, kv_head, kv_heads, dim),
                            in_blocks(v, table, t, kv_head, kv_heads, dim), dim, scale, 0);
                const int64_t at = static_cast<int64_t>(slots ? slots[i] + part : i * parts + part) * heads + head;
                row.finish<T>(dim, out + at * dim, noise + at * dim, lse + at);
            }
}

template <typename T>
void packed(const T *q, const T *k, const T *v, const T *prefix_k, const T *prefix_v, const int *cu_seqlens,
            double *out, double *noise, double *lse, int sequences, int heads, int kv_heads, int prefix,
            int64_t prefix_stride, int dim, float scale) {
    Row row;
    for (int sequence = 0; sequence < sequences; ++sequence)
        for (int token = cu_seqlens[sequence]; token < cu_seqlens[sequence + 1]; ++token)
            for (int head = 0; head < heads; ++head) {
                const int kv_head = head / (heads / kv_heads);
                const int64_t at = static_cast<int64_t>(token) * heads + head;
                for (int t = 0; t < prefix; ++t) {
                    const int64_t from = kv_head * prefix_stride + static_cast<int64_t>(t) * dim;
                    row.see(q + at * dim, prefix_k + from, prefix_v + from, dim, scale, 0);
                }
                for (int t = cu_seqlens[sequence]; t <= token; ++t) {
                    const int64_t from = (static_cast<int64_t>(t) * kv_heads + kv_head) * dim;
                    row.see(q + at * dim, k + from, v + from, dim, scale, 0);
                }
                row.finish<T>(dim, out + at * dim, noise + at * dim, lse + at);
            }
}

template <typename T>
void prefill(const T *q, const T *k, const T *v, const int *tables, const int *cu_seqlens, const int *before,
             const int *slots, double *out, double *noise, double *lse, int sequences, int heads, int kv_heads,
             int table_stride, int dim, float scale) {
    Row row;
    for (int sequence = 0; sequence < sequences; ++sequence)
        for (int r = cu_seqlens[sequence]; r < cu_seqlens[sequence + 1]; ++r)
            for (int head = 0; head < heads; ++head) {
                const int kv_head = head / (heads / kv_heads), *table = tables + sequence * table_stride;
                const T *query = q + (static_cast<int64_t>(r) * heads + head) * dim;
                for (int t = 0; t <= before[sequence] + r - cu_seqlens[sequence]; ++t)
                    row.see(query, in_blocks(k, table, t, kv_head, kv_heads, dim),
                            in_blocks(v, table, t, kv_head, kv_heads, dim), dim, scale, 0);
                const int64_t at = static_cast<int64_t>(slots ? slots[r] : r) * heads + head;
                row.finish<T>(dim, out + at * dim, noise + at * dim, lse + at);
            }
}

// Parts of the same query merged by their denominators: `first[i] .. first[i + 1]` are the parts of row i.
void merge(const float *parts, const float *lse, const int *first, const int *row_ids,
           double *out, double *out_lse, int rows, int heads, int dim) {
    for (int i = 0; i < rows; ++i)
        for (int head = 0; head < heads; ++head) {
            const int64_t to = static_cast<int64_t>(row_ids ? row_ids[i] : i) * heads + head;
            double sum = 0;
            for (int slot = first[i]; slot < first[i + 1]; ++slot)
                sum += std::exp(static_cast<double>(lse[static_cast<int64_t>(slot) * heads + head]));
            out_lse[to] = std::log(sum);
            for (int d = 0; d < dim; ++d) {
                out[to * dim + d] = 0;
                for (int slot = first[i]; slot < first[i + 1]; ++slot) {
                    const int64_t from = static_cast<int64_t>(slot) * heads + head;
                    if (lse[from] == -INFINITY) continue;
                    out[to * dim + d] += std::exp(static_cast<double>(lse[from])) / sum * parts[from * dim + d];
                }
            }
        }
}
} // namespace

#define INSTANCE(T)                                      \
    REFERENCE(reference_attention_prefix_##T, prefix<T>)   \
    REFERENCE(reference_attention_decode_##T, decode<T>)   \
    REFERENCE(reference_attention_packed_##T, packed<T>)   \
    REFERENCE(reference_attention_prefill_##T, prefill<T>)
INSTANCE(bf16)
INSTANCE(f16)
REFERENCE(reference_attention_merge, merge)
