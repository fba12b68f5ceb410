// Packed attention and its backward in f64, row by row. What the backward kernels must agree with.
//
// The forward's result is rounded as its kernel rounds it, and the gradients are those of the rounded one, so
// that what remains is the kernels' own error. `noise` beside each gradient: the root of the sum of squares of
// its terms. Kernels round weights and slopes to 16 bits, so their error is a few times 2^-9 of that (bf16).
#include "../simt/call.hpp"
#include "../simt/numbers.hpp"
#include <cmath>
#include <vector>

namespace {
template <typename T> double dot(const T *a, const T *b, int dim) {
    double sum = 0;
    for (int d = 0; d < dim; ++d) sum += static_cast<double>(to_float(a[d])) * to_float(b[d]);
    return sum;
}

// The sum of |a| (|b| + |c|).
template <typename T> double size(const T *a, const T *b, const T *c, int dim) {
    double sum = 0;
    for (int d = 0; d < dim; ++d)
        sum += std::fabs(static_cast<double>(to_float(a[d]))) * (std::fabs(to_float(b[d])) + std::fabs(to_float(c[d])));
    return sum;
}

// Writes `out`, `lse`, and to `sums` and `noise` the gradients of q, k, v, prefix_k, prefix_v one after the other,
// each of them contiguous.
template <typename T>
void backward(const T *q, const T *k, const T *v, const T *prefix_k, const T *prefix_v, const int *cu_seqlens,
              const T *d_out, T *out, float *lse, double *sums, double *noise, int sequences, int heads, int kv_heads,
              int prefix, int64_t prefix_stride, int dim, float scale) {
    const int64_t tokens = cu_seqlens[sequences];
    const int64_t begin_k = tokens * heads * dim, begin_v = begin_k + tokens * kv_heads * dim;
    const int64_t begin_prefix_k = begin_v + tokens * kv_heads * dim;
    const int64_t prefix_size = static_cast<int64_t>(kv_heads) * prefix * dim;
    const int64_t all = begin_prefix_k + 2 * prefix_size;
    for (int64_t i = 0; i < all; ++i) sums[i] = noise[i] = 0;
    auto add = [=](int64_t at, double term, double more_noise) {
        sums[at] += term;
        noise[at] += term * term + more_noise * more_noise;
    };
    std::vector<double> weights, mean(static_cast<size_t>(dim));
    for (int sequence = 0; sequence < sequences; ++sequence)
        for (int64_t row = cu_seqlens[sequence]; row < cu_seqlens[sequence + 1]; ++row)
            for (int head = 0; head < heads; ++head) {
                const int64_t at = (row * heads + head) * dim, kv_head = head / (heads / kv_heads);
                const int keys = prefix + static_cast<int>(row) - cu_seqlens[sequence] + 1;
                // Key j in the tensors of the sequences.
                auto own = [=](int j) {
                    return (static_cast<int64_t>(cu_seqlens[sequence] + j - prefix) * kv_heads + kv_head) * dim;
                };
                auto place = [=](int j) {
                    return j < prefix ? kv_head * prefix_stride + static_cast<int64_t>(j) * dim : own(j);
                };
                auto key = [=](int j) { return (j < prefix ? prefix_k : k) + place(j); };
                auto value = [=](int j) { return (j < prefix ? prefix_v : v) + place(j); };
                double most = -INFINITY, sum = 0;
                weights.clear();
                for (int j = 0; j < keys; ++j) {
                    weights.push_back(dot(q + at, key(j), dim) * static_cast<double>(scale));
                    most = std::fmax(most, weights.back());
                }
                for (double weight : weights) sum += std::exp(weight - most);
                lse[at / dim] = static_cast<float>(most + std::log(sum));
                mean.assign(mean.size(), 0);
                for (int j = 0; j < keys; ++j) {
                    weights[j] = std::exp(weights[j] - static_cast<double>(lse[at / dim]));
                    for (int d = 0; d < dim; ++d) mean[d] += weights[j] * to_float(value(j)[d]);
                }
                for (int d = 0; d < dim; ++d) out[at + d] = from_float<T>(static_cast<float>(mean[d]));

                const double delta = dot(out + at, d_out + at, dim);
                for (int j = 0; j < keys; ++j) {
                    const double weight = weights[j] * static_cast<double>(scale);
                    const double slope = weight * (dot(value(j), d_out + at, dim) - delta);
                    // It is the difference of two f32 sums over the head, which may nearly cancel.
                    const double error = weight * size(d_out + at, value(j), out + at, dim) / 1024;
                    const int64_t in_prefix = (kv_head * prefix + j) * dim;
                    const int64_t to_k = j < prefix ? begin_prefix_k + in_prefix : begin_k + own(j);
                    const int64_t to_v = j < prefix ? begin_prefix_k + prefix_size + in_prefix : begin_v + own(j);
                    for (int d = 0; d < dim; ++d) {
                        const double query = to_float(q[at + d]), of_key = to_float(key(j)[d]);
                        add(at + d, slope * of_key, error * of_key);
                        add(to_k + d, slope * query, error * query);
                        add(to_v + d, weights[j] * to_float(d_out[at + d]), 0);
                    }
                }
            }
    for (int64_t i = 0; i < all; ++i) noise[i] = std::sqrt(noise[i]);
}
} // namespace

REFERENCE(reference_attention_backward_bf16, backward<bf16>)
REFERENCE(reference_attention_backward_f16, backward<f16>)
