// AVX2 + FMA + F16C: eight floats a register, sixteen registers.
#include <immintrin.h>

#include "f16c.hpp"
#include "tier.hpp"

namespace halfbyte {
namespace {

struct Avx2 : F16C {
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
    static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
    static I load_words(const std::uint32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }

    static F load_bf16(const std::uint16_t* p) {
        const I wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
        return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
    }
    static F load_f16(const std::uint16_t* p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }

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

constexpr Tier TIER = TierOf<Avx2>::tier("avx2");

}  // namespace

const Tier* avx2_tier() { return &TIER; }

}  // namespace halfbyte
