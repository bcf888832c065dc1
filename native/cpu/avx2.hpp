// What the tiers over AVX2 + FMA + F16C share: eight floats a register, sixteen registers. Each adds its dot products.
// Internal linkage, like all of a tier's code. Include after the intrinsics.
#pragma once

#include <array>

#include "f16c.hpp"
#include "tier.hpp"

namespace halfbyte {
namespace {

struct Avx2Vectors : F16C {
    // 6 rows × 2 vectors = 12 accumulators + 2 weights + 1 broadcast: 15 of 16 registers.
    static constexpr int WIDTH = 8, PANEL_BLOCKS = 1, TILE_ROWS = 6;
    // gemv: 6 to 8 accumulators, and a code and a broadcast beside them; 1 × 8 and 4 × 3 spill.
    static constexpr int GEMV_VECTORS_1 = 6, GEMV_VECTORS_2 = 4, GEMV_VECTORS_4 = 2, GEMV_BLOCKS = 3;
    using F = __m256;
    using I = __m256i;

    static F load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, F f) { _mm256_storeu_ps(p, f); }
    static F set1(float value) { return _mm256_set1_ps(value); }
    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static I load_words(const std::uint32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

    static F load_bf16(const std::uint16_t* p) {
        const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static F load_f16(const std::uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static F load_i8(const std::int8_t* p) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    }

    static I zero() { return _mm256_setzero_si256(); }
    static F to_float(I words) { return _mm256_cvtepi32_ps(words); }
    static I load_zeros(const std::uint8_t* p) {
        return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    }
    static I minus_product(I acc, I zeros, std::int32_t sum) {
        return _mm256_sub_epi32(acc, _mm256_mullo_epi32(zeros, _mm256_set1_epi32(sum)));
    }
    static I broadcast4(const std::int8_t* x) {
        std::int32_t word;
        std::memcpy(&word, x, sizeof word);
        return _mm256_set1_epi32(word);
    }
    // The codes of inputs 16·h .. 16·h + 15 out of six bits each, four inputs a vector.
    static inline std::array<I, 4> sixes(const std::uint32_t* words, int h) {
        const I mask = _mm256_set1_epi8(15), upper = _mm256_set1_epi8(0x30);
        const I first = load_words(words + 2 * h * BLOCK_ROWS), second = load_words(words + (2 * h + 1) * BLOCK_ROWS);
        const I bits = load_words(words + (4 + h) * BLOCK_ROWS);
        const auto join = [&](I nibbles, I twos) {
            return _mm256_or_si256(_mm256_and_si256(nibbles, mask), _mm256_and_si256(twos, upper));
        };
        return {join(first, _mm256_slli_epi32(bits, 4)), join(_mm256_srli_epi32(first, 4), _mm256_slli_epi32(bits, 2)),
                join(second, bits), join(_mm256_srli_epi32(second, 4), _mm256_srli_epi32(bits, 2))};
    }

    static constexpr PeakLoop BF16_DOTS = nullptr;

    static constexpr const float (&NIBBLE_SCALE)[OCTET] = IN_PLACE_NIBBLE;
    static constexpr const float (&BYTE_SCALE)[OCTET] = IN_PLACE_BYTE;
    template <int N>
    static F nibble(I words) {
        if constexpr (N == 7)
            return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 4 * N));
        else
            return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(15 << (4 * N))));
    }
    template <int N>
    static F byte(I words) {
        if constexpr (N == 3)
            return _mm256_cvtepi32_ps(_mm256_srli_epi32(words, 8 * N));
        else
            return _mm256_cvtepi32_ps(_mm256_and_si256(words, _mm256_set1_epi32(255 << (8 * N))));
    }
};

}  // namespace
}  // namespace halfbyte
