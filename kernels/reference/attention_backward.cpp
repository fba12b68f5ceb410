// Packed attention and its backward in f64, row by row. What the backward kernels must agree with.
//
// The forward's result is rounded as its kernel rounds it, and the gradients are those of the rounded one, so
// that what remains is the kernels' own error. `noise` beside each gradient: the root of the sum of squares of
// its terms. Kernels round weights and slopes to 16 bits, so their error is a few times 2^-9 of that (bf16).
#include "../simt/numbers.hpp"
#include <cmath>
#include <vector>

namespace {
// Each `[.., dim]` like its tensor: gradients of q, k, v, prefix_k, prefix_v; parallel to it their noise, squared.
struct Gradients {
    double *sum[5], *noise[5];
    void add(int of, int64_t at, double term, double more_noise = 0) {
        sum[of][at] += term;
        noise[of][at] += term * term + more_noise * more_noise;
    }
};

template <typename T> double dot(const T *a, const T *b, int dim) {
    double sum = 0;
    for (int d = 0; d < dim; ++d) sum += static_cast<double>(to_float(a[d])) * to_float(b[d]);
    return sum;
}

template <typename T>
void backward(const T *q, const T *k, const T *v, const T *prefix_k, const T *prefix_v, const int *cu_seqlens,
              const T *d_out, T *out, float *lse, Gradients &to, int sequences, int heads, int kv_heads, int prefix,
              int64_t prefix_stride, int dim, float scale) {
    std::vector<double> weights, mean(static_cast<size_t>(dim));
    for (int i = 0; i < sequences; ++i)
        for (int row = cu_seqlens[i]; row < cu_seqlens[i + 1]; ++row)
            for (int head = 0; head < heads; ++head) {
                const int64_t kv_head = head / (heads / kv_heads), at = (static_cast<int64_t>(row) * heads + head) * dim;
                const int keys = prefix + row - cu_seqlens[i] + 1;
                // Where key j is, in the prefix's tensors or the sequences'.
                auto place = [&](int j) {
                    return j < prefix ? kv_head * prefix_stride + static_cast<int64_t>(j) * dim
                                      : (static_cast<int64_t>(cu_seqlens[i] + j - prefix) * kv_heads + kv_head) * dim;
                };
                auto key = [&](int j) { return (j < prefix ? prefix_k : k) + place(j); };
                auto value = [&](int j) { return (j < prefix ? prefix_v : v) + place(j); };
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
                    const double slope = weights[j] * (dot(value(j), d_out + at, dim) - delta) * static_cast<double>(scale);
                    // The difference is one of two f32 sums over the head, which may nearly cancel.
                    double size = 0;
                    for (int d = 0; d < dim; ++d)
                        size += std::fabs(static_cast<double>(to_float(d_out[at + d]))) *
                                (std::fabs(to_float(value(j)[d])) + std::fabs(to_float(out[at + d])));
                    size *= weights[j] * static_cast<double>(scale) / 1024;
                    const int of_keys = j < prefix ? 3 : 1;
                    for (int d = 0; d < dim; ++d) {
                        const double qd = to_float(q[at + d]), kd = to_float(key(j)[d]);
                        to.add(0, at + d, slope * kd, size * kd);
                        to.add(of_keys, place(j) + d, slope * qd, size * qd);
                        to.add(of_keys + 1, place(j) + d, weights[j] * to_float(d_out[at + d]));
                    }
                }
            }
}
} // namespace

// `out` and `lse` are written, gradients and noise (zero before) added to; take the root of the noise.
#define INSTANCE(T)                                                                                                 \
    extern "C" __attribute__((visibility("default"))) void reference_attention_backward_##T(                        \
        const T *q, const T *k, const T *v, const T *prefix_k, const T *prefix_v, const int *cu_seqlens,            \
        const T *d_out, T *out, float *lse, Gradients *to, int sequences, int heads, int kv_heads, int prefix,      \
        int64_t prefix_stride, int dim, float scale) {                                                              \
        backward(q, k, v, prefix_k, prefix_v, cu_seqlens, d_out, out, lse, *to, sequences, heads, kv_heads, prefix, \
                 prefix_stride, dim, scale);                                                                        \
    }

INSTANCE(bf16)
INSTANCE(f16)
