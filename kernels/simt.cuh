// What the kernels use of the machine: one set of names for two compilers.
//
// nvcc sees a thin layer over PTX. A host C++ compiler sees `simt/`, which runs the same source on the CPU:
// threads as fibres, shared memory, barriers, warp collectives and tensor-core fragments. The names that
// CUDA has (`threadIdx`, `__syncthreads`, `__shfl_xor_sync`, `atomicAdd`, ...) are used as they are.
//
// Rules for kernels, so that both agree:
// - one-dimensional blocks of whole warps; collectives take the full mask;
// - dynamic shared memory by DYNAMIC_SHARED, small fixed arrays by STATIC_SHARED, never plain __shared__;
// - every entry is `extern "C" __global__` and registered by KERNEL, with its threads and shared bytes;
// - loads of 16 bytes through load16, store16 and cp_async16 (alignment is checked on the CPU).
#pragma once

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;
using f16 = __half;

extern __shared__ __align__(16) unsigned char simt_dynamic_shared[];
#define DYNAMIC_SHARED(bytes) simt_dynamic_shared
#define STATIC_SHARED(type, name, count) __shared__ type name[count]

// `name_shape` in the PTX tells a launcher the threads of a block and the bytes of dynamic shared memory.
#define KERNEL(name, threads, shared_bytes) \
    extern "C" __device__ int name##_shape[2] = {threads, shared_bytes};

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ __forceinline__ f16 from_float<f16>(float x) { return __float2half_rn(x); }
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

// Two numbers in one register, `low` at the lower address.
template <typename T> __device__ __forceinline__ uint32_t pack2(float low, float high);
template <> __device__ __forceinline__ uint32_t pack2<bf16>(float low, float high) {
    uint32_t out;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}
template <> __device__ __forceinline__ uint32_t pack2<f16>(float low, float high) {
    uint32_t out;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
    return out;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float out;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
    return out;
}

// acc[16, 8] += a[16, 16] b[16, 8], in f32. Lane l holds, with r = l / 4 and c = 2 (l % 4):
// a: (r, c..c+1), (r + 8, c..), (r, c + 8..), (r + 8, c + 8..); b: (c..c+1, r), (c + 8.., r);
// acc: (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1).
template <typename T>
__device__ __forceinline__ void mma_16816(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define SIMT_MMA(T, name)                                                                          \
    template <>                                                                                    \
    __device__ __forceinline__ void mma_16816<T>(float (&acc)[4], const uint32_t (&a)[4],          \
                                                 uint32_t b0, uint32_t b1) {                       \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." name "." name ".f32 "                \
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"             \
                     : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));              \
    }
SIMT_MMA(bf16, "bf16")
SIMT_MMA(f16, "f16")
#undef SIMT_MMA

// Four 8x8 matrices of 16-bit numbers. Lane l names row l % 8 of matrix l / 8 (16 bytes in shared memory);
// register m of lane l gets (l / 4, 2 (l % 4)..) of matrix m; transposed: (2 (l % 4).., l / 4).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&out)[4], const void *row) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&out)[4], const void *row) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes from global to shared memory, without waiting; zeroes, and no read, if not `present`.
__device__ __forceinline__ void cp_async16(void *to, const void *from, bool present) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(address), "l"(from), "r"(present ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `PENDING` of this thread's committed groups are under way.
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

__device__ __forceinline__ uint4 load16(const void *from) { return *static_cast<const uint4 *>(from); }
__device__ __forceinline__ void store16(void *to, uint4 value) { *static_cast<uint4 *>(to) = value; }

#else
#include "simt/device.hpp"
#endif

constexpr uint32_t FULL_MASK = 0xffffffffu;
constexpr float NEG_INF = -INFINITY;

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(FULL_MASK, x, step);
    return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(FULL_MASK, x, step));
    return x;
}
