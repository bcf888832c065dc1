// What kernels ask of a GPU whose blocks and warps add up: a function each, as in machine.cuh. The model of the machine
// has them in tests/kernels/cuda_machine_blocks.hpp.
//
// Sources: PTX ISA 8.5, "redux.sync", "shfl.sync", "atom", "Memory consistency model".
#pragma once

#include "machine.cuh"

#ifndef __CUDACC__
#include "cuda_machine_blocks.hpp"
#else

namespace halfbyte {

using u64 = unsigned long long;

// Every lane of a warp takes part, and every lane has the result.
DEVICE u32 warp_sum(u32 value) { return __reduce_add_sync(0xFFFFFFFF, value); }
DEVICE u32 warp_max(u32 value) { return __reduce_max_sync(0xFFFFFFFF, value); }
DEVICE u32 warp_ballot(bool holds) { return __ballot_sync(0xFFFFFFFF, holds); }
// The value of the lane so many below; the lowest lanes keep their own.
DEVICE u64 shuffle_up(u64 value, int distance) { return __shfl_up_sync(0xFFFFFFFF, value, distance); }
// Place of the lowest bit that is set.
DEVICE int lowest_set(u32 word) { return __ffs(static_cast<int>(word)) - 1; }

// Returns what was there.
DEVICE u32 add_shared(u32* at, u32 value) { return atomicAdd(at, value); }
DEVICE void add_global(u64* at, u64 value) { atomicAdd(at, value); }
DEVICE void max_global(u64* at, u64 value) { atomicMax(at, value); }
// Returns what was there. What any thread of the block did before a barrier before it is seen by who adds later.
DEVICE u32 add_acquire_release(u32* at, u32 value) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(at), "r"(value) : "memory");
    return before;
}
// What one block writes for another goes by L2: L1 is not coherent.
template <class T>
DEVICE T load_published(const T* from) {
    return __ldcg(from);
}
template <class T>
DEVICE void store_published(T* to, T value) {
    __stcg(to, value);
}

DEVICE u32 float_bits(float value) { return __float_as_uint(value); }
DEVICE float bits_float(u32 bits) { return __uint_as_float(bits); }
// Rounded once each, never contracted to a fused operation.
DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
DEVICE float subtract(float a, float b) { return __fsub_rn(a, b); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float logarithm(float x) { return logf(x); }

}  // namespace halfbyte
#endif
