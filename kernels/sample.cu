// The next token of every row of logits, as src/engine/sampler.rs draws it: penalties, bias and bans, temperature,
// min-p, top-k, top-p, and one uniform number of the request's own random stream.
//
// sample_f32
//   logits        [rows, vocab] f32   `stride` apart; changed while the kernel runs, and as before at its end
//   uniforms      [rows] f64          in [0, 1); not read by greedy rows
//   options       [rows, 6] f32       temperature (not above 0, or below 3e-39: greedy, the lowest id of equals),
//                                     top_p (1: all), min_p (0: all), repetition, frequency and presence penalties
//   top_ks        [rows] int32        0: all
// Adjustments of row i are the entries entry_starts[i] .. entry_starts[i + 1] of
//   entry_ids     int32               at most once per row; those that are no token are ignored
//   entry_uses    int32               -1: never drawn; else how often the token was generated, plus 2^30 if it is in
//                                     the prompt (so that the repetition penalty applies)
//   entry_biases  f32                 added before the penalties
//   entry_saved   f32                 scratch
// and entry_starts is null if there are none.
//   tokens        [rows] int32        -1 where the row has NaN or an infinity
//   flags         [rows] int32        1 there, else 0
// grid (rows, 1, 1), 1024 threads. Limits: vocab at most 2^20; logits begin at a multiple of 16 bytes; strides that
// are no multiple of 4 are read number by number.
//
// Weights exp((logit - largest) / temperature) are summed as integers of 2^-44, so that the order of additions,
// and with it the launch, cannot change a draw. Tokens below that (5e-14 of the likeliest) are never drawn.
//
// One block per row, by arithmetic (not measured): an SM reads 64 bytes of the L2 a clock, so a pass over 128,256
// logits takes 5 us on an H100, as do their exponentials. Greedy is one pass, a plain draw two, top-k or top-p two or
// three more: 5 to 30 us for one row, beside a forward pass of 800 us (a 1B model in bf16) or more. Several blocks
// per row would divide that, but have to meet between passes: a launch of about 2 us each and a workspace, to win
// some 2% of a step with one row of a small model, and nothing from about 128 rows on, when every SM has a row.
#include "select.cuh"

constexpr int IN_PROMPT = 1 << 30;
// The largest float. Bans and adjustments end there, so that an infinity is always the model's.
constexpr float MOST = 3.402823466e38f;
// Weights are below 2^30 in their bits: at most 1.
constexpr int WEIGHT_BITS = 30 + ID_BITS;

struct Options {
    float temperature, top_p, min_p, repetition, frequency, presence;
};

__device__ __forceinline__ float adjusted(float logit, int uses, float bias, const Options &options) {
    if (!(fabsf(logit) < INFINITY)) return logit;
    if (uses < 0) return -MOST;
    logit += bias;
    if (uses > 0) logit = logit > 0.0f ? logit / options.repetition : logit * options.repetition;
    const int count = uses & (IN_PROMPT - 1);
    // Rounded like the CPU's, not fused.
    if (count > 0) logit -= __fmul_rn(options.frequency, static_cast<float>(count)) + options.presence;
    return fminf(fmaxf(logit, -MOST), MOST);
}

__device__ __forceinline__ uint64_t mass(float weight) { return static_cast<uint64_t>(weight * 0x1p44f); }

// In every thread; -1 if a logit is not finite.
__device__ __forceinline__ int draw(RowShared &shared, const LogitRow &row, const Options &options, int top_k,
                                    const double *uniform) {
    const uint64_t best = largest_logit(shared, row);
    if (best == NOT_FINITE) return -1;
    const int likeliest = id_of_ranked(best);
    const float most = float_of_ordered(bits_of_ranked(best));
    const float temperature = options.temperature, inverse = 1.0f / temperature;
    if (!(temperature > 0.0f) || inverse == INFINITY || fabsf(most) == MOST) return likeliest;

    // Calls f(rank, weight) for a token that may be drawn.
    auto candidate = [&](int id, float logit, auto f) {
        // The quotient, rounded correctly without a division.
        const float below = logit - most, rough = below * inverse;
        const float weight = expf(fmaf(fmaf(-rough, temperature, below), inverse, rough));
        if (weight >= options.min_p && weight > 0.0f) f(ranked(__float_as_uint(weight), id), weight);
    };
    uint64_t cut = 0;
    if (top_k > 0) {
        auto each = [&](auto f) {
            row.each([&](int id, float x) { candidate(id, x, [&](uint64_t rank, float) { f(rank, 1); }); });
        };
        cut = find_cut<WEIGHT_BITS, false>(shared, each, [&](uint64_t) { return static_cast<uint64_t>(top_k); });
    }
    if (options.top_p < 1.0f) {
        auto each = [&](auto f) {
            row.each([&](int id, float x) {
                candidate(id, x, [&](uint64_t rank, float weight) {
                    if (rank >= cut) f(rank, mass(weight));
                });
            });
        };
        const uint64_t nucleus = find_cut<WEIGHT_BITS, true>(shared, each, [&](uint64_t total) {
            const double share = ceil(static_cast<double>(total) * static_cast<double>(options.top_p));
            return share < 1.0 ? uint64_t{1} : static_cast<uint64_t>(share);
        });
        cut = nucleus > cut ? nucleus : cut;
    }

    // Whose warp's ids the draw falls into ...
    uint64_t sum = 0;
    auto add = [&](int id, float x) {
        candidate(id, x, [&](uint64_t rank, float weight) { sum += rank >= cut ? mass(weight) : 0; });
    };
    row.each(add);
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_MASK, sum, step);
    __syncthreads(); // `warps` has been read
    if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = sum;
    if (threadIdx.x == 0) shared.found = likeliest;
    __syncthreads();
    uint64_t total = 0;
#pragma unroll 4
    for (int warp = 0; warp < ROW_WARPS; ++warp) total += shared.warps[warp];
    if (total == 0) return likeliest; // min_p above 1
    uint64_t left = static_cast<uint64_t>(*uniform * static_cast<double>(total));
    left = left < total ? left : total - 1;
    int warp = 0;
    for (; left >= shared.warps[warp]; ++warp) left -= shared.warps[warp];
    // ... which thread's, now that all share them, and which.
    const int share = (row.chunk + ROW_THREADS - 1) / ROW_THREADS;
    const int end_of_chunk = min((warp + 1) * row.chunk, row.vocab);
    const int begin = min(warp * row.chunk + static_cast<int>(threadIdx.x) * share, end_of_chunk);
    const int end = min(begin + share, end_of_chunk);
    sum = 0;
    for (int id = begin; id < end; ++id) add(id, row.logits[id]);
    const uint64_t own = sum, reached = block_scan(shared, own, total);
    if (reached - own <= left && left < reached) {
        sum = reached - own;
        int id = begin - 1;
        while (sum <= left) ++id, add(id, row.logits[id]);
        shared.found = id;
    }
    __syncthreads();
    return shared.found;
}

extern "C" __global__ void __launch_bounds__(ROW_THREADS)
    sample_f32(float *logits, const double *uniforms, const float *options, const int *top_ks,
               const int *entry_starts, const int *entry_ids, const int *entry_uses, const float *entry_biases,
               float *entry_saved, int *tokens, int *flags, int vocab, int64_t stride) {
    RowShared &shared = *reinterpret_cast<RowShared *>(DYNAMIC_SHARED(sizeof(RowShared)));
    const int row = blockIdx.x;
    float *own = logits + row * stride;
    const float *o = options + static_cast<int64_t>(row) * 6;
    const Options settings{o[0], o[1], o[2], o[3], o[4], o[5]};
    const int first = entry_starts ? entry_starts[row] : 0, last = entry_starts ? entry_starts[row + 1] : 0;
    for (int i = first + static_cast<int>(threadIdx.x); i < last; i += ROW_THREADS) {
        const int id = entry_ids[i];
        if (id < 0 || id >= vocab) continue;
        entry_saved[i] = own[id];
        own[id] = adjusted(own[id], entry_uses[i], entry_biases[i], settings);
    }
    __syncthreads();
    const int token = draw(shared, LogitRow(own, vocab, stride % 4 == 0), settings, top_ks[row], uniforms + row);
    // Every path through draw() has met a barrier after the last read of a logit.
    for (int i = first + static_cast<int>(threadIdx.x); i < last; i += ROW_THREADS) {
        const int id = entry_ids[i];
        if (id >= 0 && id < vocab) own[id] = entry_saved[i];
    }
    if (threadIdx.x != 0) return;
    tokens[row] = token;
    flags[row] = token < 0;
}
KERNEL(sample_f32, ROW_THREADS, sizeof(RowShared))
