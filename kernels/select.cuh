// Rows of logits, one block each: walking over them, and finding where the largest k numbers or the heaviest
// share of a distribution end, without sorting.
//
// Numbers are compared as `ranked(bits, id)`: the bits of a float, ordered as the floats are, then the ids, the
// lower one being the larger. All are distinct, so that a cut needs no rule for ties.
#pragma once

#include "simt.cuh"

constexpr int ROW_THREADS = 1024;
constexpr int ROW_WARPS = ROW_THREADS / 32;
constexpr int ID_BITS = 20;
constexpr int MAX_VOCAB = 1 << ID_BITS;
constexpr int DIGIT_BITS = 10;
constexpr int BINS = 1 << DIGIT_BITS; // each thread owns one
static_assert(BINS == ROW_THREADS);

__device__ __forceinline__ uint64_t ranked(uint32_t bits, int id) {
    return static_cast<uint64_t>(bits) << ID_BITS | static_cast<uint32_t>(MAX_VOCAB - 1 - id);
}
__device__ __forceinline__ uint32_t bits_of_ranked(uint64_t rank) { return static_cast<uint32_t>(rank >> ID_BITS); }
__device__ __forceinline__ int id_of_ranked(uint64_t rank) {
    return MAX_VOCAB - 1 - static_cast<int>(rank & (MAX_VOCAB - 1));
}

// Bits that order floats of both signs; zeroes are equal.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float float_of_ordered(uint32_t bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Each warp has a run of ids, so that sums of warps are sums of id ranges.
struct LogitRow {
    const float *logits;
    int vocab;
    int chunk; // ids of a warp
    bool aligned;

    __device__ __forceinline__ LogitRow(const float *row, int vocab, bool aligned)
        : logits(row), vocab(vocab), chunk((vocab + ROW_WARPS * 128 - 1) / (ROW_WARPS * 128) * 128), aligned(aligned) {}

    // Calls f(id, logit) for the ids of this thread, ascending. No collectives in f.
    template <typename F> __device__ __forceinline__ void each(F f) const {
        constexpr int AHEAD = 4; // loads under way
        const int warp = threadIdx.x / 32, end = min(vocab, (warp + 1) * chunk);
        for (int first = warp * chunk + 4 * (threadIdx.x % 32); first < end; first += 128 * AHEAD) {
            float x[AHEAD][4];
#pragma unroll
            for (int u = 0; u < AHEAD; ++u) {
                const int at = first + 128 * u;
                if (aligned && at + 4 <= end) {
                    const uint4 raw = load16(logits + at);
                    x[u][0] = __uint_as_float(raw.x), x[u][1] = __uint_as_float(raw.y);
                    x[u][2] = __uint_as_float(raw.z), x[u][3] = __uint_as_float(raw.w);
                } else {
#pragma unroll
                    for (int j = 0; j < 4; ++j) x[u][j] = at + j < end ? logits[at + j] : 0.0f;
                }
            }
#pragma unroll
            for (int u = 0; u < AHEAD; ++u)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    if (first + 128 * u + j < end) f(first + 128 * u + j, x[u][j]);
        }
    }
};

struct RowShared {
    uint32_t count[BINS], low[BINS], high[BINS]; // of a bin: its numbers, and 64 bits of their weight
    uint64_t warps[ROW_WARPS];
    uint64_t rest;
    int found, whole;
};

// The largest of all threads' numbers, in every thread.
__device__ __forceinline__ uint64_t block_largest(RowShared &shared, uint64_t x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
        const uint64_t other = __shfl_xor_sync(FULL_MASK, x, step);
        x = other > x ? other : x;
    }
    __syncthreads(); // `warps` has been read
    if (threadIdx.x % 32 == 0) shared.warps[threadIdx.x / 32] = x;
    __syncthreads();
#pragma unroll 4
    for (int warp = 0; warp < ROW_WARPS; ++warp) x = shared.warps[warp] > x ? shared.warps[warp] : x;
    return x;
}

// The sum of the numbers of this thread and those before it.
__device__ __forceinline__ uint64_t block_scan(RowShared &shared, uint64_t x, uint64_t &total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const uint64_t other = __shfl_up_sync(FULL_MASK, x, step);
        if (lane >= step) x += other;
    }
    __syncthreads(); // `warps` has been read
    if (lane == 31) shared.warps[warp] = x;
    __syncthreads();
    total = 0;
#pragma unroll 4
    for (int other = 0; other < ROW_WARPS; ++other) {
        if (other == warp) x += total;
        total += shared.warps[other];
    }
    return x;
}

constexpr uint64_t NOT_FINITE = ~0ull;

// The largest logit with the lowest id that has it, as ranked(ordered_bits(logit), id); NOT_FINITE if a logit is
// NaN or infinite.
__device__ __forceinline__ uint64_t largest_logit(RowShared &shared, const LogitRow &row) {
    float most = NEG_INF;
    int at = MAX_VOCAB - 1;
    bool finite = true;
    row.each([&](int id, float x) {
        finite = finite && fabsf(x) < INFINITY;
        if (x > most) {
            most = x;
            at = id;
        }
    });
    return block_largest(shared, finite ? ranked(ordered_bits(most), at) : NOT_FINITE);
}

// Adds to 64 bits in two halves: shared memory has native atomics for 32.
__device__ __forceinline__ void add_wide(uint32_t *low, uint32_t *high, uint64_t amount) {
    const uint32_t part = static_cast<uint32_t>(amount), before = atomicAdd(low, part);
    const uint32_t sum = before + part, up = static_cast<uint32_t>(amount >> 32) + (sum < part ? 1 : 0);
    if (up != 0) atomicAdd(high, up);
}

// The cut so that the numbers that rank at or above it weigh `target(total weight)` or more, and without the last of
// them less; 0 if all together do not. Weights of 1 unless WEIGHED; sums are of integers, so their order is nothing.
// `each(f)` calls f(rank, weight) for the numbers of this thread; ranks are distinct and below 2^BITS.
// One pass over the row per ten bits, most often two or three: it ends when a bin is kept whole. Equal numbers meet in
// one bin, whose atomics come one by one: a row of nothing else takes some 0.2 ms.
template <int BITS, bool WEIGHED, typename Each, typename Target>
__device__ __forceinline__ uint64_t find_cut(RowShared &shared, const Each &each, const Target &target) {
    uint64_t prefix = 0, left = 0;
    for (int shift = BITS, next;; shift = next) {
        next = max(shift - DIGIT_BITS, 0);
        __syncthreads(); // the last bins have been read
        shared.count[threadIdx.x] = shared.low[threadIdx.x] = shared.high[threadIdx.x] = 0;
        if (threadIdx.x == 0) shared.found = -1;
        __syncthreads();
        each([&](uint64_t rank, uint64_t weight) {
            if (rank >> shift != prefix) return;
            const int bin = static_cast<int>(rank >> next) & (BINS - 1);
            atomicAdd(&shared.count[bin], 1u);
            if (WEIGHED) add_wide(&shared.low[bin], &shared.high[bin], weight);
        });
        __syncthreads();
        const int bin = BINS - 1 - static_cast<int>(threadIdx.x);
        const uint32_t count = shared.count[bin];
        const uint64_t weight = WEIGHED ? static_cast<uint64_t>(shared.high[bin]) << 32 | shared.low[bin] : count;
        uint64_t total;
        const uint64_t reached = block_scan(shared, weight, total);
        if (shift == BITS) left = target(total);
        if (reached - weight < left && left <= reached) {
            shared.found = bin;
            shared.rest = left - (reached - weight);
            shared.whole = count == 1 || shared.rest == weight;
        }
        __syncthreads();
        if (shared.found < 0) return 0;
        const int digits = shift - next;
        prefix = prefix << digits | static_cast<uint64_t>(shared.found & ((1 << digits) - 1));
        left = shared.rest;
        if (shared.whole || next == 0) return prefix << next;
    }
}
