// Natural-log probabilities of a token and of the k likeliest of its row, as src/engine/logprobs.rs: over the whole
// row, logits divided by the temperature first, before penalties, bias and truncation.
//
// logprobs_f32
//   logits        [any, vocab] f32     `stride` apart; row_ids[i] is the row of the i-th result, null: i
//   tokens        [rows] int32         whose log-probability is wanted; minus infinity for one that is none
//   temperatures  [rows] f32           not above 0 counts as 1
//   tops          [rows] int32         alternatives wanted, at most max_top
//   chosen        [rows] f32
//   top_ids       [rows, max_top] int32  descending, equals by id; -1 behind the last
//   top_logprobs  [rows, max_top] f32    minus infinity behind the last
//   flags         [rows] int32         1 where the row has NaN or an infinity: then chosen and top_logprobs are NaN,
//                                      top_ids -1; else 0
// grid (rows, 1, 1), 1024 threads: one block per row, for the reasons given in sample.cu. Two passes over the row,
// and with alternatives three or four more.
// Limits: max_top at most 256, vocab at most 2^20; logits begin at a multiple of 16 bytes; strides that are no
// multiple of 4 are read number by number.
#include "select.cuh"

constexpr int MAX_TOP = 256;

struct LogprobShared {
    RowShared row;
    uint64_t list[MAX_TOP];
    float sums[ROW_WARPS];
    int listed;
};

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    logprobs_f32(const float *logits, const int *row_ids, const int *tokens, const float *temperatures,
                 const int *tops, float *chosen, int *top_ids, float *top_logprobs, int *flags, int vocab,
                 int max_top, int64_t stride) {
    LogprobShared &shared = *reinterpret_cast<LogprobShared *>(DYNAMIC_SHARED(sizeof(LogprobShared)));
    const int result = blockIdx.x, thread = threadIdx.x;
    const LogitRow row(logits + (row_ids ? row_ids[result] : result) * stride, vocab, stride % 4 == 0);
    top_ids += static_cast<int64_t>(result) * max_top;
    top_logprobs += static_cast<int64_t>(result) * max_top;
    const uint64_t best = largest_logit(shared.row, row);
    const bool finite = best != NOT_FINITE;
    const int wanted = max(min(min(tops[result], max_top), min(MAX_TOP, vocab)), 0), top = finite ? wanted : 0;
    for (int i = top + thread; i < max_top; i += ROW_THREADS) {
        top_ids[i] = -1;
        top_logprobs[i] = finite ? NEG_INF : NAN;
    }
    if (thread == 0) flags[result] = !finite;
    if (!finite) {
        if (thread == 0) chosen[result] = NAN;
        return; // all threads
    }

    const float most = float_of_ordered(bits_of_ranked(best)), temperature = temperatures[result];
    const float scale = temperature > 0.0f ? 1.0f / temperature : 1.0f;
    float sum = 0.0f;
    row.each([&](int, float x) { sum += expf((x - most) * scale); });
    sum = warp_sum(sum);
    if (thread % 32 == 0) shared.sums[thread / 32] = sum;
    if (thread == 0) shared.listed = 0;
    __syncthreads();
    const float log_sum = logf(warp_sum(shared.sums[thread % 32]));
    auto logprob = [=](float x) { return (x - most) * scale - log_sum; };
    if (thread == 0) {
        const int token = tokens[result];
        chosen[result] = token >= 0 && token < vocab ? logprob(row.logits[token]) : NEG_INF;
    }
    if (top == 0) return; // all threads

    auto each = [&](auto f) {
        row.each([&](int id, float x) { f(ranked(ordered_bits(x), id), 1); });
    };
    const uint64_t cut = find_cut<32 + ID_BITS, false>(shared.row, each, [=](uint64_t) { return uint64_t(top); });
    each([&](uint64_t rank, int) {
        if (rank < cut) return;
        const int at = atomicAdd(&shared.listed, 1);
        if (at < MAX_TOP) shared.list[at] = rank;
    });
    __syncthreads();
    if (thread >= top) return;
    const uint64_t own = shared.list[thread];
    int place = 0;
#pragma unroll 4
    for (int i = 0; i < top; ++i) place += shared.list[i] > own;
    top_ids[place] = id_of_ranked(own);
    top_logprobs[place] = logprob(float_of_ordered(bits_of_ranked(own)));
}
KERNEL(logprobs_f32, ROW_THREADS, sizeof(LogprobShared))
