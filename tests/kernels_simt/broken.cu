// Small kernels with one mistake each; `_ok` twins without it. The emulation must find every mistake.
#include "simt.cuh"

// Each thread reads what its neighbour wrote.
template <bool BARRIER> __device__ void neighbour(int *out) {
    STATIC_SHARED(int, shared, 64);
    shared[threadIdx.x] = static_cast<int>(threadIdx.x);
    if (BARRIER) __syncthreads();
    out[threadIdx.x] = shared[(threadIdx.x + 1) % 64];
}
extern "C" __global__ void race(int *out) { neighbour<false>(out); }
extern "C" __global__ void race_ok(int *out) { neighbour<true>(out); }
KERNEL(race, 64, 0)
KERNEL(race_ok, 64, 0)

// The second round's writes overtake the first one's reads.
template <bool BARRIER> __device__ void reuse(int *out) {
    STATIC_SHARED(int, shared, 64);
    int total = 0;
    for (int round = 0; round < 2; ++round) {
        shared[threadIdx.x] = round * 100 + static_cast<int>(threadIdx.x);
        __syncthreads();
        total += shared[(threadIdx.x + 33) % 64];
        if (BARRIER) __syncthreads();
    }
    out[threadIdx.x] = total;
}
extern "C" __global__ void reused(int *out) { reuse<false>(out); }
extern "C" __global__ void reused_ok(int *out) { reuse<true>(out); }
KERNEL(reused, 64, 0)
KERNEL(reused_ok, 64, 0)

extern "C" __global__ void divergent_barrier(int *out) {
    if (threadIdx.x < 40) __syncthreads();
    out[threadIdx.x] = 1;
}
KERNEL(divergent_barrier, 64, 0)

extern "C" __global__ void two_barriers(int *out) {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
    out[threadIdx.x] = 1;
}
KERNEL(two_barriers, 64, 0)

extern "C" __global__ void missing_lane(float *out) {
    if (threadIdx.x == 5) return;
    out[threadIdx.x] = __shfl_xor_sync(FULL_MASK, 1.0f, 1);
}
KERNEL(missing_lane, 32, 0)

extern "C" __global__ void different_collectives(float *out) {
    if (threadIdx.x % 2)
        out[threadIdx.x] = __shfl_xor_sync(FULL_MASK, 1.0f, 1);
    else
        out[threadIdx.x] = __ballot_sync(FULL_MASK, true);
}
KERNEL(different_collectives, 32, 0)

extern "C" __global__ void half_mask(float *out) { out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1); }
KERNEL(half_mask, 32, 0)

// Adds in[i + by] to out[i].
extern "C" __global__ void shifted(const float *in, float *out, int by) {
    out[threadIdx.x] = in[static_cast<int>(threadIdx.x) + by];
}
KERNEL(shifted, 32, 0)

extern "C" __global__ void shared_overrun(int *out) {
    int *shared = reinterpret_cast<int *>(DYNAMIC_SHARED(128));
    shared[threadIdx.x + 1] = 1;
    out[threadIdx.x] = shared[threadIdx.x];
}
KERNEL(shared_overrun, 32, 128)

extern "C" __global__ void shared_misregistered(int *out) { out[threadIdx.x] = DYNAMIC_SHARED(64)[0]; }
KERNEL(shared_misregistered, 32, 128)

extern "C" __global__ void uninitialised(float *out) {
    float *shared = reinterpret_cast<float *>(DYNAMIC_SHARED(128));
    out[threadIdx.x] = shared[threadIdx.x];
}
KERNEL(uninitialised, 32, 128)

// Copies through shared memory; the data must have been waited for.
template <bool WAIT> __device__ void copy(const uint4 *in, uint4 *out) {
    uint4 *shared = reinterpret_cast<uint4 *>(DYNAMIC_SHARED(512));
    cp_async16(shared + threadIdx.x, in + threadIdx.x, threadIdx.x < 31);
    cp_async_commit();
    if (WAIT) cp_async_wait<0>();
    store16(out + threadIdx.x, load16(shared + threadIdx.x));
    cp_async_wait<0>();
}
extern "C" __global__ void unwaited_copy(const uint4 *in, uint4 *out) { copy<false>(in, out); }
extern "C" __global__ void unwaited_copy_ok(const uint4 *in, uint4 *out) { copy<true>(in, out); }
KERNEL(unwaited_copy, 32, 512)
KERNEL(unwaited_copy_ok, 32, 512)

// What lane 0 copied is read by all: they must meet after its wait.
template <bool BARRIER> __device__ void copy_for_others(const uint4 *in, uint32_t *out) {
    uint4 *shared = reinterpret_cast<uint4 *>(DYNAMIC_SHARED(512));
    cp_async16(shared + threadIdx.x, in + threadIdx.x, true);
    cp_async_commit();
    cp_async_wait<0>();
    if (BARRIER) __syncwarp();
    uint32_t four[4];
    ldmatrix_x4(four, shared + threadIdx.x);
    for (int i = 0; i < 4; ++i) out[i * 32 + threadIdx.x] = four[i];
}
extern "C" __global__ void unseen_copy(const uint4 *in, uint32_t *out) { copy_for_others<false>(in, out); }
extern "C" __global__ void unseen_copy_ok(const uint4 *in, uint32_t *out) { copy_for_others<true>(in, out); }
KERNEL(unseen_copy, 32, 512)
KERNEL(unseen_copy_ok, 32, 512)

extern "C" __global__ void misaligned(const float *in, float *out) {
    uint4 four = load16(in + 1);
    out[threadIdx.x] = __uint_as_float(four.x);
}
KERNEL(misaligned, 32, 0)

// acc[16, 8] = a[16, 16] b[16, 8] from plain arrays, by the lane layout that simt.cuh documents.
extern "C" __global__ void product(const bf16 *a, const bf16 *b, float *out) {
    const int r = threadIdx.x / 4, c = 2 * (threadIdx.x % 4);
    auto pair = [](bf16 low, bf16 high) { return pack2<bf16>(to_float(low), to_float(high)); };
    uint32_t left[4];
    for (int i = 0; i < 4; ++i) {
        const bf16 *at = a + (r + 8 * (i % 2)) * 16 + c + 8 * (i / 2);
        left[i] = pair(at[0], at[1]);
    }
    float acc[4] = {0, 0, 0, 0};
    mma_16816<bf16>(acc, left, pair(b[c * 8 + r], b[(c + 1) * 8 + r]),
                    pair(b[(c + 8) * 8 + r], b[(c + 9) * 8 + r]));
    for (int i = 0; i < 4; ++i) out[(r + 8 * (i / 2)) * 8 + c + i % 2] = acc[i];
}
KERNEL(product, 32, 0)

// Fragments by ldmatrix from `[16, 16]` matrices: a, and b transposed. Both ways must name the same product.
extern "C" __global__ void product_ldmatrix(const bf16 *a, const bf16 *b, float *out) {
    bf16 *shared = reinterpret_cast<bf16 *>(DYNAMIC_SHARED(1024));
    for (int i = threadIdx.x; i < 256; i += 32) {
        shared[i] = a[i];
        shared[256 + i] = i % 16 < 8 ? b[i / 16 * 8 + i % 16] : from_float<bf16>(0.0f);
    }
    __syncwarp();
    const int lane = threadIdx.x;
    uint32_t left[4], right[4];
    ldmatrix_x4(left, shared + lane % 16 * 16 + lane / 16 * 8);
    ldmatrix_x4_trans(right, shared + 256 + lane % 16 * 16 + lane / 16 * 8);
    float acc[4] = {0, 0, 0, 0};
    mma_16816<bf16>(acc, left, right[0], right[1]);
    for (int i = 0; i < 4; ++i) out[(lane / 4 + 8 * (i / 2)) * 8 + 2 * (lane % 4) + i % 2] = acc[i];
}
KERNEL(product_ldmatrix, 32, 1024)

// Blocks take tickets: what depends on their order differs from launch to launch.
extern "C" __global__ void tickets(int *next, int *out) {
    if (threadIdx.x == 0) out[blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)] = atomicAdd(next, 1);
}
KERNEL(tickets, 32, 0)
