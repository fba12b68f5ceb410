// The distillation loss of one row after the other in f64.
//
// `size` beside the gradient: the sum of the sizes of its two terms, which the kernel subtracts in f32.
#include "../simt/call.hpp"
#include "../simt/numbers.hpp"
#include <cmath>

namespace {
template <typename T>
void distillation_loss(const T *logits, const int *starts, const int *ids, const float *probs, double *losses,
                       double *gradient, double *size, int rows, int vocab, float scale, float unit) {
    for (int r = 0; r < rows; ++r, logits += vocab, gradient += vocab, size += vocab) {
        losses[r] = 0;
        for (int i = 0; i < vocab; ++i) gradient[i] = size[i] = 0;
        if (starts[r] == starts[r + 1]) continue;
        auto scaled = [=](int id) { return static_cast<double>(to_float(logits[id])) * static_cast<double>(scale); };
        double most = -INFINITY, sum = 0, mass = 0;
        for (int i = 0; i < vocab; ++i) most = std::fmax(most, scaled(i));
        for (int i = 0; i < vocab; ++i) sum += std::exp(scaled(i) - most);
        const double log_sum = most + std::log(sum);
        for (int e = starts[r]; e < starts[r + 1]; ++e) {
            mass += static_cast<double>(probs[e]);
            losses[r] -= static_cast<double>(probs[e]) * (scaled(ids[e]) - log_sum);
        }
        for (int i = 0; i < vocab; ++i)
            gradient[i] = size[i] = static_cast<double>(unit) * mass * std::exp(scaled(i) - log_sum);
        for (int e = starts[r]; e < starts[r + 1]; ++e) {
            gradient[ids[e]] -= static_cast<double>(unit) * static_cast<double>(probs[e]);
            size[ids[e]] += static_cast<double>(unit) * static_cast<double>(probs[e]);
        }
    }
}
} // namespace

REFERENCE(reference_distillation_loss_bf16, distillation_loss<bf16>)
REFERENCE(reference_distillation_loss_f32, distillation_loss<float>)
