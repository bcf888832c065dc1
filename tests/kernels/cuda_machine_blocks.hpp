// The functions of native/cuda/machine_blocks.cuh on the model of cuda_machine.hpp. Before every atomic operation on
// global memory the thread stops, so that others come between it and what it did before.
#pragma once

#include <cmath>

#include "cuda_machine.hpp"

namespace halfbyte {

using u64 = unsigned long long;

namespace machine {

inline u64 together(const char* operation, u64 word, void (*compute)(Thread**)) {
    Thread& self = *gpu->current;
    self.word = word;
    collective(operation, compute);
    return self.word;
}
// One number for all lanes, of those that they bring.
template <class Combine>
void spread(Thread** warp, u64 start, Combine combine) {
    u64 result = start;
    for (int lane = 0; lane < LANES; ++lane) result = combine(result, warp[lane]->word, lane);
    for (int lane = 0; lane < LANES; ++lane) warp[lane]->word = result;
}
inline void run_sum(Thread** warp) {
    spread(warp, 0, [](u64 a, u64 b, int) { return static_cast<u64>(static_cast<u32>(a + b)); });
}
inline void run_max(Thread** warp) {
    spread(warp, 0, [](u64 a, u64 b, int) { return a > b ? a : b; });
}
inline void run_ballot(Thread** warp) {
    spread(warp, 0, [](u64 a, u64 b, int lane) { return a | b << lane; });
}
template <int DISTANCE>
void run_shuffle_up(Thread** warp) {
    for (int lane = LANES - 1; lane >= DISTANCE; --lane) warp[lane]->word = warp[lane - DISTANCE]->word;
}

}  // namespace machine

inline u32 warp_sum(u32 value) { return static_cast<u32>(machine::together("sum", value, machine::run_sum)); }
inline u32 warp_max(u32 value) { return static_cast<u32>(machine::together("max", value, machine::run_max)); }
inline u32 warp_ballot(bool holds) { return static_cast<u32>(machine::together("ballot", holds, machine::run_ballot)); }
inline u64 shuffle_up(u64 value, int distance) {
    switch (distance) {
        case 1: return machine::together("shuffle up 1", value, machine::run_shuffle_up<1>);
        case 2: return machine::together("shuffle up 2", value, machine::run_shuffle_up<2>);
        case 4: return machine::together("shuffle up 4", value, machine::run_shuffle_up<4>);
        case 8: return machine::together("shuffle up 8", value, machine::run_shuffle_up<8>);
        case 16: return machine::together("shuffle up 16", value, machine::run_shuffle_up<16>);
        default: machine::fail("a shuffle by another distance than 1, 2, 4, 8, 16");
    }
    return 0;
}
inline int lowest_set(u32 word) { return __builtin_ffs(static_cast<int>(word)) - 1; }

inline u32 add_shared(u32* at, u32 value) {
    machine::shared_address(at, sizeof(u32));
    const u32 before = *at;
    *at += value;
    return before;
}
template <class T, class Change>
T change_global(T* at, Change change) {
    machine::yield(machine::State::READY);
    machine::check_global(at, sizeof(T), true);
    const T before = *at;
    *at = change(before);
    return before;
}
inline void add_global(u64* at, u64 value) {
    change_global(at, [&](u64 before) { return before + value; });
}
inline void max_global(u64* at, u64 value) {
    change_global(at, [&](u64 before) { return before > value ? before : value; });
}
inline u32 add_acquire_release(u32* at, u32 value) {
    return change_global(at, [&](u32 before) { return before + value; });
}
template <class T>
T load_published(const T* from) {
    return load_constant<T>(from);
}
template <class T>
void store_published(T* to, T value) {
    store_global(to, value);
}

inline u32 float_bits(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}
inline float bits_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline float multiply(float a, float b) { return a * b; }
inline float subtract(float a, float b) { return a - b; }
inline float divide(float a, float b) { return a / b; }
inline float fused(float a, float b, float c) { return std::fma(a, b, c); }
inline float logarithm(float x) { return std::log(x); }

}  // namespace halfbyte
