// A model of a GPU on which the kernels of native/cuda run as they are: the functions of native/cuda/machine.cuh,
// written out. Every thread is a fiber. All blocks are on the machine at once, or as many as a test says, in any order;
// which warp runs next, and in which order its lanes, is drawn at random, so that a missing barrier or a circle of waits
// shows for some seed. What is stricter than on a GPU:
//   * shared memory starts as NaN, and a copy that was begun leaves NaN behind until its group is awaited, at the latest moment: who
//     reads too early, or copies over what others still read, computes NaN;
//   * every address is checked against the tensors that were passed, for bounds and alignment, and some are for reading only;
//   * barriers need every thread of a block; mma, transpose and shuffles every lane of a warp, all at the same one;
//   * loads from shared memory that take more passes than their bytes need (bank conflicts) are counted.
// What it cannot show: speed, what the compiler and the GPU do, how mma rounds its sums, and a memory order weaker than
// sequential.
#pragma once

#include "cuda_fibers.hpp"

#define DEVICE inline

namespace halfbyte {

inline int thread_index() { return machine::gpu->current->index; }
inline int thread_index_anew() { return thread_index(); }
inline int block_index() { return machine::gpu->current->block; }
inline int block_count() { return machine::gpu->blocks; }
inline char* shared_memory() { return machine::gpu->shared[machine::gpu->current->block].data(); }
inline void barrier() { machine::yield(machine::State::BARRIER); }
inline void warp_barrier() { machine::collective("warp barrier"); }

inline void copy_async16(void* to, const void* from, bool valid) { machine::begin_copy(to, from, 16, valid); }
inline void copy_async4(void* to, const void* from, bool valid) { machine::begin_copy(to, from, 4, valid); }
inline void commit_copies() {
    machine::Thread& self = *machine::gpu->current;
    self.groups.push_back(std::move(self.open));
    self.open.clear();
}
template <int PENDING>
void await_copies() {
    machine::Thread& self = *machine::gpu->current;
    while (self.groups.size() > PENDING) {
        for (const machine::Copy& copy : self.groups.front()) {
            std::memset(copy.to, 0, copy.size);
            if (copy.bytes) std::memcpy(copy.to, copy.from, copy.bytes);
        }
        self.groups.pop_front();
    }
}

template <class T>
T load_shared(const void* from) {
    machine::gpu->current->loads.emplace_back(machine::shared_address(from, sizeof(T)), static_cast<int>(sizeof(T)));
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}
template <class T>
void store_shared(void* to, T value) {
    machine::shared_address(to, sizeof(T));
    std::memcpy(to, &value, sizeof(T));
}
template <class T>
T load_constant(const void* from) {
    machine::check_global(from, sizeof(T), false);
    T value;
    std::memcpy(&value, from, sizeof(T));
    return value;
}
template <class T>
T load_global(const void* from) {
    return load_constant<T>(from);
}
template <class T>
void store_global(void* to, T value) {
    machine::check_global(to, sizeof(T), true);
    std::memcpy(to, &value, sizeof(T));
}
inline float4 load_partial(const float4* from) { return load_constant<float4>(from); }
inline void store_partial(float4* to, float4 value) { store_global(to, value); }
inline u32 load_acquire(const u32* from) {
    ++machine::gpu->waits;
    machine::yield(machine::State::READY);
    return load_constant<u32>(from);
}
inline void store_release(u32* to, u32 value) {
    store_global(to, value);
    machine::yield(machine::State::READY);
}

inline u32 and_or(u32 word, u32 mask, u32 bits) { return (word & mask) | bits; }
inline u32 twice_low(u32 word) { return (word & 0xFFFF) | word << 16; }
inline u32 twice_high(u32 word) { return (word >> 16) | (word & 0xFFFF0000); }

// Each half of three pairs through a function of 16-bit floats.
template <class F>
u32 each_half(u32 a, u32 b, u32 c, F&& function) {
    const u32 low = function(static_cast<uint16_t>(a), static_cast<uint16_t>(b), static_cast<uint16_t>(c));
    return low | static_cast<u32>(function(static_cast<uint16_t>(a >> 16), static_cast<uint16_t>(b >> 16), static_cast<uint16_t>(c >> 16))) << 16;
}
inline u32 fma_f16(u32 a, u32 b, u32 c) { return each_half(a, b, c, machine::half_fma); }
inline u32 subtract_f16(u32 a, u32 b) { return each_half(b, 0xBC00BC00, a, machine::half_fma); }
inline u32 fma_bf16(u32 a, u32 b, u32 c) { return each_half(a, b, c, machine::bfloat_fma); }
inline float low_f16(u32 pair) { return machine::half_to_float(static_cast<uint16_t>(pair)); }
inline float high_f16(u32 pair) { return machine::half_to_float(static_cast<uint16_t>(pair >> 16)); }
inline float low_bf16(u32 pair) { return machine::bfloat_to_float(static_cast<uint16_t>(pair)); }
inline float high_bf16(u32 pair) { return machine::bfloat_to_float(static_cast<uint16_t>(pair >> 16)); }
inline u32 pack_f16(float low, float high) { return machine::float_to_half(low) | static_cast<u32>(machine::float_to_half(high)) << 16; }
inline u32 pack_bf16(float low, float high) {
    return machine::float_to_bfloat(low) | static_cast<u32>(machine::float_to_bfloat(high)) << 16;
}

inline float inverse_sqrt(float x) { return 1.0f / std::sqrt(x); }
inline float exponential(float x) { return std::exp(x); }
inline float hyperbolic_tangent(float x) { return std::tanh(x); }
inline float error_function(float x) { return std::erf(x); }
inline float shuffle_xor(float value, int mask) {
    machine::Thread& self = *machine::gpu->current;
    std::memcpy(&self.in[0], &value, sizeof(value));
    self.in[1] = static_cast<u32>(mask);
    machine::collective("shuffle", machine::run_shuffle);
    std::memcpy(&value, &self.out, sizeof(value));
    return value;
}

inline void mma(const char* operation, void (*together)(machine::Thread**), float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    machine::Thread& self = *machine::gpu->current;
    const u32 in[6] = {a[0], a[1], a[2], a[3], b0, b1};
    std::memcpy(self.in, in, sizeof(in));
    self.sums = c;
    machine::collective(operation, together);
}
inline void mma_f16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma("mma_f16", machine::run_mma<false>, c, a, b0, b1); }
inline void mma_bf16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma("mma_bf16", machine::run_mma<true>, c, a, b0, b1); }
inline u32 transpose(u32 pair) {
    machine::Thread& self = *machine::gpu->current;
    self.in[0] = pair;
    machine::collective("transpose", machine::run_transpose);
    return self.out;
}

}  // namespace halfbyte
