// Drawing a token and log-probabilities, by sorting the whole row, in f64.
#include "../simt/call.hpp"
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {
constexpr int IN_PROMPT = 1 << 30;

struct Token {
    int id;
    double weight;
};

bool heavier(const Token &a, const Token &b) { return a.weight != b.weight ? a.weight > b.weight : a.id < b.id; }

// Keeps the first `keep`. How near the next one was to being among them counts, unless both are equal for good.
void cut(std::vector<Token> &sorted, size_t keep, double *margin) {
    if (keep >= sorted.size()) return;
    const double last = sorted[keep - 1].weight, next = sorted[keep].weight;
    if (last != next) *margin = std::fmin(*margin, (last - next) / last);
    sorted.resize(keep);
}

// The token; `margin` is how far, relative to what it is compared with, the nearest decision was from going the
// other way, so that rounding explains another token only where it is small. The row must be finite.
int sample_row(const float *logits, int vocab, double uniform, const float *options, int top_k, int entries,
               const int *ids, const int *uses, const float *biases, double *margin) {
    const double temperature = options[0], top_p = options[1], min_p = options[2];
    std::vector<float> row(logits, logits + vocab);
    for (int i = 0; i < entries; ++i) {
        if (ids[i] < 0 || ids[i] >= vocab) continue;
        float &logit = row[ids[i]];
        logit += biases[i];
        if (uses[i] > 0) logit = logit > 0 ? logit / options[3] : logit * options[3];
        const int count = uses[i] & (IN_PROMPT - 1);
        if (count > 0 && uses[i] > 0) logit -= options[4] * static_cast<float>(count) + options[5];
        if (uses[i] < 0) logit = -INFINITY;
    }
    *margin = INFINITY;
    const int likeliest = static_cast<int>(std::max_element(row.begin(), row.end()) - row.begin());
    if (temperature == 0) return likeliest;
    std::vector<Token> kept;
    for (int id = 0; id < vocab; ++id) {
        const double weight = std::exp((static_cast<double>(row[id]) - row[likeliest]) / temperature);
        if (min_p > 0 && row[id] != row[likeliest]) *margin = std::fmin(*margin, std::fabs(weight / min_p - 1));
        if (weight > 0 && weight >= min_p) kept.push_back({id, weight});
    }
    if (kept.empty()) return likeliest;
    std::sort(kept.begin(), kept.end(), heavier);
    if (top_k > 0) cut(kept, static_cast<size_t>(top_k), margin);
    double total = 0;
    for (const Token &token : kept) total += token.weight;
    if (top_p < 1) {
        double sum = 0;
        size_t keep = 0;
        while (keep < kept.size() && (keep == 0 || sum < total * top_p)) {
            if (keep > 0) *margin = std::fmin(*margin, std::fabs(sum / total - top_p));
            sum += kept[keep++].weight;
        }
        *margin = std::fmin(*margin, std::fabs(sum / total - top_p));
        cut(kept, keep, margin);
    }
    std::sort(kept.begin(), kept.end(), [](const Token &a, const Token &b) { return a.id < b.id; });
    total = 0;
    for (const Token &token : kept) total += token.weight;
    double sum = 0;
    for (const Token &token : kept) {
        sum += token.weight;
        if (token.id != kept.back().id) *margin = std::fmin(*margin, std::fabs(sum / total - uniform));
        if (sum > uniform * total) return token.id;
    }
    return kept.back().id;
}

void sample(const float *logits, const double *uniforms, const float *options, const int *top_ks,
            const int *entry_starts, const int *entry_ids, const int *entry_uses, const float *entry_biases,
            int *tokens, double *margins, int rows, int vocab, int64_t stride) {
    for (int row = 0; row < rows; ++row) {
        const int first = entry_starts[row];
        tokens[row] = sample_row(logits + row * stride, vocab, uniforms[row], options + 6 * row, top_ks[row],
                                 entry_starts[row + 1] - first, entry_ids + first, entry_uses + first,
                                 entry_biases + first, margins + row);
    }
}

// Of the `top` likeliest, descending, equals by id; and of `token`.
void logprobs(const float *logits, int vocab, int token, float temperature, int top, double *chosen, int *top_ids,
              double *top_logprobs) {
    const double scale = temperature > 0 ? 1 / static_cast<double>(temperature) : 1;
    std::vector<int> order(vocab);
    double most = -INFINITY, sum = 0;
    for (int id = 0; id < vocab; ++id) {
        order[id] = id;
        most = std::fmax(most, logits[id]);
    }
    for (int id = 0; id < vocab; ++id) sum += std::exp((logits[id] - most) * scale);
    auto logprob = [&](int id) { return (logits[id] - most) * scale - std::log(sum); };
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
    *chosen = token >= 0 && token < vocab ? logprob(token) : -INFINITY;
    for (int i = 0; i < top && i < vocab; ++i) {
        top_ids[i] = order[i];
        top_logprobs[i] = logprob(order[i]);
    }
}
} // namespace

REFERENCE(reference_sample, sample)
REFERENCE(reference_logprobs, logprobs)
