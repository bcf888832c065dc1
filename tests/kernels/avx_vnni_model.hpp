// A scalar model of the one intrinsic the avx_vnni tier has beyond AVX2, written from its documented operation. The rest of the
// tier runs on the CPU itself. See test_modelled_tiers.py.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

// Four products of an unsigned byte of a and a signed byte of b, added to each lane, without saturation.
inline __m256i model_dpbusd(__m256i sums, __m256i a, __m256i b) {
    std::int32_t sum[8];
    std::uint8_t codes[32];
    std::int8_t inputs[32];
    std::memcpy(sum, &sums, sizeof sum);
    std::memcpy(codes, &a, sizeof codes);
    std::memcpy(inputs, &b, sizeof inputs);
    for (int i = 0; i < 32; ++i) sum[i / 4] += codes[i] * inputs[i];
    std::memcpy(&sums, sum, sizeof sum);
    return sums;
}
#undef _mm256_dpbusd_avx_epi32
#define _mm256_dpbusd_avx_epi32 model_dpbusd
