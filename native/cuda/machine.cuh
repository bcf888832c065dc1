// Everything the kernels ask of a GPU, a function each: registers, memory, copies, tensor cores. No header of CUDA's or
// of the C++ library is included, so NVRTC needs nothing but these sources. Compiled by a C++ compiler instead, the
// same kernels run on a model of the machine (tests/kernels/cuda_machine.hpp), which defines the same functions.
//
// Sources: PTX ISA 8.5, "Matrix fragments for mma.m16n8k16", "cp.async", "movmatrix", "prmt", "Memory consistency
// model".
#pragma once

#ifndef __CUDACC__
#include "cuda_machine.hpp"
#else

#define DEVICE __device__ __forceinline__

namespace halfbyte {

using u32 = unsigned int;

DEVICE int thread_index() { return threadIdx.x; }
// The same, read where it stands: what is worked out from it is not kept in registers across a loop that seldom needs
// it.
DEVICE int thread_index_anew() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index;
}
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_count() { return gridDim.x; }

DEVICE char* shared_memory() {
    extern __shared__ uint4 shared_words[];
    return reinterpret_cast<char*>(shared_words);
}

DEVICE void barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

// Copies to shared memory that do not pass through registers; where not valid, zeros are written and nothing is read.
DEVICE void copy_async16(void* to, const void* from, bool valid) {
    const u32 target = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(valid ? 16 : 0));
}
DEVICE void copy_async4(void* to, const void* from, bool valid) {
    const u32 target = static_cast<u32>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(target), "l"(from), "r"(valid ? 4 : 0));
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Until at most PENDING of this thread's groups are under way. What other threads copied is there after a barrier.
template <int PENDING>
DEVICE void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

template <class T>
DEVICE T load_shared(const void* from) {
    return *static_cast<const T*>(from);
}
template <class T>
DEVICE void store_shared(void* to, T value) {
    *static_cast<T*>(to) = value;
}

// What no thread writes while the kernel runs.
template <class T>
DEVICE T load_constant(const void* from) {
    return __ldg(static_cast<const T*>(from));
}
// What this thread alone may write while it runs.
template <class T>
DEVICE T load_global(const void* from) {
    return *static_cast<const T*>(from);
}
template <class T>
DEVICE void store_global(void* to, T value) {
    *static_cast<T*>(to) = value;
}
// What one block writes for another goes by L2: L1 is not coherent.
DEVICE float4 load_partial(const float4* from) { return __ldcg(from); }
DEVICE void store_partial(float4* to, float4 value) { __stcg(to, value); }
DEVICE u32 load_acquire(const u32* from) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}
DEVICE void store_release(u32* to, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

// (word & mask) | bits in one instruction: the look-up table of the three inputs is (0xF0 & 0xCC) | 0xAA.
DEVICE u32 and_or(u32 word, u32 mask, u32 bits) {
    u32 result;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
    return result;
}
// Both halves of the result are the low, or the high, half of the word.
DEVICE u32 twice_low(u32 word) {
    u32 result;
    asm("prmt.b32 %0, %1, %1, 0x1010;" : "=r"(result) : "r"(word));
    return result;
}
DEVICE u32 twice_high(u32 word) {
    u32 result;
    asm("prmt.b32 %0, %1, %1, 0x3232;" : "=r"(result) : "r"(word));
    return result;
}

// Pairs of 16-bit floats in a word, the first in the low half.
DEVICE u32 subtract_f16(u32 a, u32 b) {
    u32 result;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}
DEVICE u32 fma_f16(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
DEVICE u32 fma_bf16(u32 a, u32 b, u32 c) {
    u32 result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
DEVICE float low_f16(u32 pair) {
    float result;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(result) : "r"(pair));
    return result;
}
DEVICE float high_f16(u32 pair) {
    float result;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(result) : "r"(pair));
    return result;
}
DEVICE float low_bf16(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_bf16(u32 pair) { return __uint_as_float(pair & 0xFFFF0000); }
DEVICE u32 pack_f16(float low, float high) {
    u32 result;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
DEVICE u32 pack_bf16(float low, float high) {
    u32 result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}

DEVICE float inverse_sqrt(float x) { return rsqrtf(x); }
DEVICE float exponential(float x) { return expf(x); }
DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
DEVICE float error_function(float x) { return erff(x); }

// The value of the lane whose number differs in the bits of `mask`; every lane of the warp takes part.
DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xFFFFFFFF, value, mask); }

// c[16, 8] += a[16, 16] · b[16, 8] by a warp, in fp32. With g = lane / 4 and t = lane % 4, a lane holds
//     a0: row g, columns 2t, 2t+1     a1: row g+8     a2, a3: the same rows, columns 2t+8, 2t+9
//     b0: rows 2t, 2t+1, column g     b1: rows 2t+8, 2t+9
//     c0, c1: row g, columns 2t, 2t+1     c2, c3: row g+8
DEVICE void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// An 8 × 8 matrix of 16-bit values, lane 4r + c holding row r, columns 2c and 2c+1, becomes its transpose.
DEVICE u32 transpose(u32 pair) {
    u32 result;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(pair));
    return result;
}

}  // namespace halfbyte
#endif
