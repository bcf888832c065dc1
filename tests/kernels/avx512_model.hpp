// A scalar model of the AVX-512 and F16C intrinsics the avx512_vnni tier uses, each written from its documented operation,
// so that the tier's code is checked on machines that cannot run it. See test_modelled_tiers.py.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "dtypes.hpp"

struct __m128i_model { std::uint16_t half[8]; };
struct __m256i_model { std::uint16_t half[16]; };
struct __m256_model { float lane[8]; };
struct __m512_model { float lane[16]; };
struct __m512i_model { std::uint32_t lane[16]; };
#define __m128i __m128i_model
#define __m256i __m256i_model
#define __m256 __m256_model
#define __m512 __m512_model
#define __m512i __m512i_model
#define __m512bh __m512i_model
#define _MM_FROUND_TO_NEAREST_INT 0

template <class V, class Fn>
inline V model_lanes(Fn fn) {
    V out;
    for (int i = 0; i < 16; ++i) out.lane[i] = fn(i);
    return out;
}

inline __m512 _mm512_loadu_ps(const void* p) { __m512 v; std::memcpy(&v, p, 64); return v; }
inline void _mm512_storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, 64); }
// The aligned load faults on any other address; here it ends the program.
inline __m512i _mm512_load_si512(const void* p) {
    if (reinterpret_cast<std::uintptr_t>(p) % 64 != 0) __builtin_trap();
    __m512i v;
    std::memcpy(&v, p, 64);
    return v;
}
inline __m512 _mm512_set1_ps(float a) { return model_lanes<__m512>([&](int) { return a; }); }
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return model_lanes<__m512>([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return model_lanes<__m512>([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return model_lanes<__m512>([&](int i) { return a.lane[i] / b.lane[i]; }); }
inline __m512 _mm512_min_ps(__m512 a, __m512 b) {
    return model_lanes<__m512>([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline __m512 _mm512_max_ps(__m512 a, __m512 b) {
    return model_lanes<__m512>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
// One rounding.
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
    return model_lanes<__m512>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline __m512i _mm512_srli_epi32(__m512i a, unsigned count) {
    return model_lanes<__m512i>([&](int i) { return count > 31 ? 0u : a.lane[i] >> count; });
}
inline __m512i _mm512_set1_epi32(int a) {
    return model_lanes<__m512i>([&](int) { return static_cast<std::uint32_t>(a); });
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) {
    return model_lanes<__m512i>([&](int i) { return a.lane[i] & b.lane[i]; });
}
inline __m512i _mm512_or_si512(__m512i a, __m512i b) {
    return model_lanes<__m512i>([&](int i) { return a.lane[i] | b.lane[i]; });
}
// Signed, one rounding.
inline __m512 _mm512_cvtepi32_ps(__m512i a) {
    return model_lanes<__m512>([&](int i) { return static_cast<float>(static_cast<std::int32_t>(a.lane[i])); });
}

inline __m256i _mm256_loadu_si256(const __m256i* p) { __m256i v; std::memcpy(&v, p, 32); return v; }
inline __m512i _mm512_cvtepu16_epi32(__m256i a) {
    return model_lanes<__m512i>([&](int i) { return static_cast<std::uint32_t>(a.half[i]); });
}
inline __m512i _mm512_slli_epi32(__m512i a, unsigned count) {
    return model_lanes<__m512i>([&](int i) { return count > 31 ? 0u : a.lane[i] << count; });
}
inline __m512 _mm512_castsi512_ps(__m512i a) { __m512 v; std::memcpy(&v, &a, 64); return v; }
inline __m512 _mm512_cvtph_ps(__m256i a) {
    return model_lanes<__m512>([&](int i) { return halfbyte::from_f16(a.half[i]); });
}
inline __m128i _mm_loadu_si128(const __m128i* p) { __m128i v; std::memcpy(&v, p, 16); return v; }
inline void _mm_storeu_si128(__m128i* p, __m128i v) { std::memcpy(p, &v, 16); }
inline __m256 _mm256_loadu_ps(const float* p) { __m256 v; std::memcpy(&v, p, 32); return v; }
inline void _mm256_storeu_ps(float* p, __m256 v) { std::memcpy(p, &v, 32); }
inline __m256 _mm256_cvtph_ps(__m128i a) {
    __m256 v;
    for (int i = 0; i < 8; ++i) v.lane[i] = halfbyte::from_f16(a.half[i]);
    return v;
}
inline __m128i _mm256_cvtps_ph(__m256 a, int) {
    __m128i v;
    for (int i = 0; i < 8; ++i) v.half[i] = halfbyte::to_f16(a.lane[i]);
    return v;
}

inline __m512i _mm512_setzero_si512() {
    return model_lanes<__m512i>([](int) { return 0u; });
}
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) {
    return model_lanes<__m512i>([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
    return model_lanes<__m512i>([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) {
    return model_lanes<__m512i>([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline __m512i _mm512_cvtepu8_epi32(__m128i a) {
    return model_lanes<__m512i>([&](int i) { return (a.half[i / 2] >> (8 * (i % 2))) & 255u; });
}
inline __m512i _mm512_cvtepi8_epi32(__m128i a) {
    return model_lanes<__m512i>([&](int i) {
        return static_cast<std::uint32_t>(static_cast<std::int8_t>((a.half[i / 2] >> (8 * (i % 2))) & 255u));
    });
}
// Four products of an unsigned byte of a and a signed byte of b, added to each lane, without saturation.
inline __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
    return model_lanes<__m512i>([&](int i) {
        std::int32_t sum = static_cast<std::int32_t>(sums.lane[i]);
        for (int byte = 0; byte < 4; ++byte)
            sum += static_cast<std::int32_t>((a.lane[i] >> (8 * byte)) & 255u) *
                   static_cast<std::int8_t>((b.lane[i] >> (8 * byte)) & 255u);
        return static_cast<std::uint32_t>(sum);
    });
}
// Two products of bf16 numbers, added to each lane.
inline __m512 _mm512_dpbf16_ps(__m512 sums, __m512bh a, __m512bh b) {
    const auto half = [](std::uint32_t lane, int at) {
        return halfbyte::from_bf16(static_cast<std::uint16_t>(lane >> (16 * at)));
    };
    return model_lanes<__m512>([&](int i) {
        return sums.lane[i] + half(a.lane[i], 0) * half(b.lane[i], 0) + half(a.lane[i], 1) * half(b.lane[i], 1);
    });
}
