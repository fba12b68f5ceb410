// The CPU's version of what simt.cuh gives kernels under nvcc, and of the CUDA names they use.
#pragma once

#include "launch.hpp"
#include "numbers.hpp"
#include "tensor_core.hpp"
#include <algorithm>
#include <cmath>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (simt::Dim3{simt::block->current->index, 0, 0})
#define blockIdx (simt::block->index)
#define gridDim (simt::block->grid)
#define blockDim (simt::Dim3{simt::block->threads, 1, 1})

#define DYNAMIC_SHARED(bytes) simt::dynamic_shared(bytes)
#define STATIC_SHARED(type, name, count) \
    static char name##_site;             \
    type *const name = static_cast<type *>(simt::block->static_shared(&name##_site, sizeof(type) * (count)))

#define KERNEL(name, threads, shared_bytes)                                                             \
    extern "C" __attribute__((visibility("default"))) int name##_launch(const simt::Launch *how) {      \
        return simt::launch(name, #name, threads, shared_bytes, *how);                                  \
    }

#define SIMT_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {
inline unsigned char *dynamic_shared(size_t bytes) {
    if (bytes != block->shared_bytes) {
        block->describe("uses %zu bytes of shared memory, registered with %zu", bytes, block->shared_bytes);
        block->leave();
    }
    return reinterpret_cast<unsigned char *>(block->dynamic());
}

inline void require_full(uint32_t mask, const char *what) {
    if (mask == 0xffffffffu) return;
    block->describe("%s with mask %x: only whole warps are supported", what, mask);
    block->leave();
}

// Every lane hands in `value` and gets what `pick(lane)` names of another lane.
template <typename V, typename F> V exchange(const Site &site, V value, F pick) {
    static_assert(sizeof(V) <= 16);
    LaneData &own = block->warp().lanes[block->lane()];
    memcpy(own.in, &value, sizeof value);
    unsigned from = pick(block->lane());
    own.in[11] = from;
    block->collective(site, [](Warp &warp) {
        for (LaneData &lane : warp.lanes) memcpy(lane.out, warp.lanes[lane.in[11]].in, 16);
    });
    memcpy(&value, own.out, sizeof value);
    return value;
}
} // namespace simt

inline void __syncthreads(SIMT_SITE) { simt::block->barrier({"__syncthreads", file, line}); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, SIMT_SITE) {
    simt::require_full(mask, "__syncwarp");
    simt::block->collective({"__syncwarp", file, line}, [](simt::Warp &) {
        for (unsigned lane = 0; lane < 32; ++lane) simt::block->sibling(lane).landed = false;
    });
}
template <typename V> V __shfl_xor_sync(uint32_t mask, V value, int with, SIMT_SITE) {
    simt::require_full(mask, "__shfl_xor_sync");
    return simt::exchange({"__shfl_xor_sync", file, line}, value,
                          [=](unsigned lane) { return (lane ^ with) & 31; });
}
template <typename V> V __shfl_sync(uint32_t mask, V value, int from, SIMT_SITE) {
    simt::require_full(mask, "__shfl_sync");
    return simt::exchange({"__shfl_sync", file, line}, value, [=](unsigned) { return from & 31; });
}
template <typename V> V __shfl_down_sync(uint32_t mask, V value, unsigned by, SIMT_SITE) {
    simt::require_full(mask, "__shfl_down_sync");
    return simt::exchange({"__shfl_down_sync", file, line}, value,
                          [=](unsigned lane) { return lane + by > 31 ? lane : lane + by; });
}
template <typename V> V __shfl_up_sync(uint32_t mask, V value, unsigned by, SIMT_SITE) {
    simt::require_full(mask, "__shfl_up_sync");
    return simt::exchange({"__shfl_up_sync", file, line}, value,
                          [=](unsigned lane) { return lane < by ? lane : lane - by; });
}
inline uint32_t __ballot_sync(uint32_t mask, bool value, SIMT_SITE) {
    simt::require_full(mask, "__ballot_sync");
    simt::LaneData &own = simt::block->warp().lanes[simt::block->lane()];
    own.in[0] = value;
    simt::block->collective({"__ballot_sync", file, line}, [](simt::Warp &warp) {
        uint32_t votes = 0;
        for (unsigned lane = 0; lane < 32; ++lane) votes |= warp.lanes[lane].in[0] << lane;
        for (simt::LaneData &lane : warp.lanes) lane.out[0] = votes;
    });
    return own.out[0];
}
inline bool __any_sync(uint32_t mask, bool value, SIMT_SITE) {
    return __ballot_sync(mask, value, file, line) != 0;
}
inline bool __all_sync(uint32_t mask, bool value, SIMT_SITE) {
    return __ballot_sync(mask, value, file, line) == 0xffffffffu;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline void __threadfence() {}

// Fibres run one at a time, so plain operations are atomic.
template <typename V> V atomicAdd(V *at, V value) {
    V old = *at;
    *at = old + value;
    return old;
}
template <typename V> V atomicMax(V *at, V value) {
    V old = *at;
    *at = std::max(old, value);
    return old;
}
template <typename V> V atomicCAS(V *at, V expected, V value) {
    V old = *at;
    if (old == expected) *at = value;
    return old;
}

inline float exp2_approx(float x) { return ::exp2f(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __uint_as_float(uint32_t x) { return simt::float_of(x); }
inline uint32_t __float_as_uint(float x) { return simt::bits_of(x); }
inline int __float_as_int(float x) { return static_cast<int>(simt::bits_of(x)); }
inline float __int_as_float(int x) { return simt::float_of(static_cast<uint32_t>(x)); }
template <typename V> V __ldg(const V *at) { return *at; }
using std::max;
using std::min;

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline uint4 load16(const void *from) {
    simt::block->require_aligned(from, 16, "load16");
    return *static_cast<const uint4 *>(from);
}
inline void store16(void *to, uint4 value) {
    simt::block->require_aligned(to, 16, "store16");
    *static_cast<uint4 *>(to) = value;
}

inline void cp_async16(void *to, const void *from, bool present) {
    simt::block->require_aligned(to, 16, "cp_async16 to");
    simt::block->require_aligned(from, 16, "cp_async16");
    simt::Fiber &self = *simt::block->current;
    self.copies.push_back({to, from, present, self.group});
}
inline void cp_async_commit() { ++simt::block->current->group; }
template <int PENDING> void cp_async_wait() {
    simt::Fiber &self = *simt::block->current;
    size_t done = 0;
    for (; done < self.copies.size(); ++done) {
        const simt::Copy &copy = self.copies[done];
        // Not committed, or among the last groups that may still be under way.
        if (copy.group + PENDING >= self.group) break;
        if (copy.present)
            memcpy(copy.to, copy.from, 16);
        else
            memset(copy.to, 0, 16);
        self.landed = true;
    }
    self.copies.erase(self.copies.begin(), self.copies.begin() + static_cast<long>(done));
}

template <bool TRANSPOSED> void simt_ldmatrix(uint32_t (&out)[4], const void *row, const char *file, int line) {
    simt::block->require_aligned(row, 16, "ldmatrix");
    simt::LaneData &own = simt::block->warp().lanes[simt::block->lane()];
    own.address = row;
    simt::block->collective({"ldmatrix", file, line}, [](simt::Warp &warp) {
        for (unsigned lane = 0; lane < 32; ++lane) {
            if (simt::block->sibling(lane).landed) {
                simt::block->describe("ldmatrix, with no barrier after lane %u waited for its copies", lane);
                simt::block->leave();
            }
            for (unsigned m = 0; m < 4; ++m) {
                uint16_t pair[2];
                for (unsigned i = 0; i < 2; ++i) {
                    unsigned r = TRANSPOSED ? 2 * (lane % 4) + i : lane / 4;
                    unsigned c = TRANSPOSED ? lane / 4 : 2 * (lane % 4) + i;
                    pair[i] = static_cast<const uint16_t *>(warp.lanes[8 * m + r].address)[c];
                }
                warp.lanes[lane].out[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
            }
        }
    });
    memcpy(out, own.out, sizeof out);
}
inline void ldmatrix_x4(uint32_t (&out)[4], const void *row, SIMT_SITE) {
    simt_ldmatrix<false>(out, row, file, line);
}
inline void ldmatrix_x4_trans(uint32_t (&out)[4], const void *row, SIMT_SITE) {
    simt_ldmatrix<true>(out, row, file, line);
}

template <typename T>
void mma_16816(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SIMT_SITE) {
    simt::LaneData &own = simt::block->warp().lanes[simt::block->lane()];
    memcpy(own.in, a, 16);
    own.in[4] = b0;
    own.in[5] = b1;
    memcpy(own.in + 6, acc, 16);
    simt::block->collective({"mma", file, line}, simt::mma<T>);
    memcpy(acc, own.out, 16);
}
