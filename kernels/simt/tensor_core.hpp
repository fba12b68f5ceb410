// The arithmetic of the tensor-core instruction, on what 32 lanes hand in.
#pragma once

#include "block.hpp"
#include "numbers.hpp"

namespace simt {
// Products are exact; sums are in f32, in an order the hardware does not promise either.
template <typename T> void mma(Warp &warp) {
    float a[16][16], b[16][8], acc[16][8];
    auto put = [](float *at, uint32_t pair) {
        at[0] = to_float(T{static_cast<uint16_t>(pair)});
        at[1] = to_float(T{static_cast<uint16_t>(pair >> 16)});
    };
    for (unsigned lane = 0; lane < 32; ++lane) {
        const uint32_t *in = warp.lanes[lane].in;
        unsigned r = lane / 4, c = 2 * (lane % 4);
        for (unsigned i = 0; i < 4; ++i) put(&a[r + 8 * (i % 2)][c + 8 * (i / 2)], in[i]);
        for (unsigned i = 0; i < 2; ++i) {
            float pair[2];
            put(pair, in[4 + i]);
            b[c + 8 * i][r] = pair[0];
            b[c + 8 * i + 1][r] = pair[1];
        }
        for (unsigned i = 0; i < 4; ++i) acc[r + 8 * (i / 2)][c + i % 2] = float_of(in[6 + i]);
    }
    for (unsigned r = 0; r < 16; ++r)
        for (unsigned k = 0; k < 16; ++k)
            for (unsigned n = 0; n < 8; ++n) acc[r][n] += a[r][k] * b[k][n];
    for (unsigned lane = 0; lane < 32; ++lane) {
        unsigned r = lane / 4, c = 2 * (lane % 4);
        for (unsigned i = 0; i < 4; ++i) warp.lanes[lane].out[i] = bits_of(acc[r + 8 * (i / 2)][c + i % 2]);
    }
}
} // namespace simt
