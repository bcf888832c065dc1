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

    static constexpr int A8_VECTORS_1 = 2, A8_VECTORS_2 = 2, A8_VECTORS_4 = 1, A8_BLOCKS = 2;
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
    // Products of pairs are summed in 16 bits: 4 octets · 2 halves · 15 · 127 · 2 < 2^15.
    template <int M, int V>
    static inline void dot32_nibbles(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                     I (&acc)[M][V]) {
        const I mask = _mm256_set1_epi8(15);
        I pairs[M][V];
        for (int octet = 0; octet < 4; ++octet) {
            I low[V], high[V];
            for (int v = 0; v < V; ++v) {
                const I line = load_words(words[v] + octet * BLOCK_ROWS);
                low[v] = _mm256_and_si256(line, mask);
                high[v] = _mm256_and_si256(_mm256_srli_epi32(line, 4), mask);
            }
            for (int m = 0; m < M; ++m) {
                const I x_low = broadcast4(x[m] + octet * OCTET), x_high = broadcast4(x[m] + octet * OCTET + 4);
                for (int v = 0; v < V; ++v) {
                    const I sum = _mm256_add_epi16(_mm256_maddubs_epi16(low[v], x_low), _mm256_maddubs_epi16(high[v], x_high));
                    pairs[m][v] = octet == 0 ? sum : _mm256_add_epi16(pairs[m][v], sum);
                }
            }
        }
        add_pairs(pairs, 1, acc);
    }
    // Two products of pairs fit 16 bits: 2 · 63 · 127 · 2 < 2^15.
    template <int M, int V>
    static inline void dot32_sixes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        const I mask = _mm256_set1_epi8(15), upper = _mm256_set1_epi8(0x30);
        for (int h = 0; h < 2; ++h) {
            I codes[4][V];  // of four inputs each
            for (int v = 0; v < V; ++v) {
                const I first = load_words(words[v] + 2 * h * BLOCK_ROWS), second = load_words(words[v] + (2 * h + 1) * BLOCK_ROWS);
                const I bits = load_words(words[v] + (4 + h) * BLOCK_ROWS);
                const auto join = [&](I nibbles, I twos) {
                    return _mm256_or_si256(_mm256_and_si256(nibbles, mask), _mm256_and_si256(twos, upper));
                };
                codes[0][v] = join(first, _mm256_slli_epi32(bits, 4));
                codes[1][v] = join(_mm256_srli_epi32(first, 4), _mm256_slli_epi32(bits, 2));
                codes[2][v] = join(second, bits);
                codes[3][v] = join(_mm256_srli_epi32(second, 4), _mm256_srli_epi32(bits, 2));
            }
            for (int octet = 0; octet < 2; ++octet) {
                I pairs[M][V];
                for (int m = 0; m < M; ++m) {
                    const std::int8_t* inputs = x[m] + (2 * h + octet) * OCTET;
                    const I x_low = broadcast4(inputs), x_high = broadcast4(inputs + 4);
                    for (int v = 0; v < V; ++v)
                        pairs[m][v] = _mm256_add_epi16(_mm256_maddubs_epi16(codes[2 * octet][v], x_low),
                                                       _mm256_maddubs_epi16(codes[2 * octet + 1][v], x_high));
                }
                add_pairs(pairs, 1, acc);
            }
        }
    }
    // A byte is two nibbles: one would overflow 16 bits.
    template <int M, int V>
    static inline void dot32_bytes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        const I mask = _mm256_set1_epi8(15);
        I low_pairs[M][V], high_pairs[M][V];
        for (int line = 0; line < 8; ++line) {
            I low[V], high[V];
            for (int v = 0; v < V; ++v) {
                const I bytes = load_words(words[v] + line * BLOCK_ROWS);
                low[v] = _mm256_and_si256(bytes, mask);
                high[v] = _mm256_and_si256(_mm256_srli_epi32(bytes, 4), mask);
            }
            for (int m = 0; m < M; ++m) {
                const I inputs = broadcast4(x[m] + line * 4);
                for (int v = 0; v < V; ++v) {
                    const I of_low = _mm256_maddubs_epi16(low[v], inputs), of_high = _mm256_maddubs_epi16(high[v], inputs);
                    low_pairs[m][v] = line == 0 ? of_low : _mm256_add_epi16(low_pairs[m][v], of_low);
                    high_pairs[m][v] = line == 0 ? of_high : _mm256_add_epi16(high_pairs[m][v], of_high);
                }
            }
        }
        add_pairs(low_pairs, 1, acc);
        add_pairs(high_pairs, 16, acc);
    }
    template <int M, int V>
    static inline void add_pairs(const I (&pairs)[M][V], int factor, I (&acc)[M][V]) {
        const I factors = _mm256_set1_epi16(static_cast<short>(factor));
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v)
                acc[m][v] = _mm256_add_epi32(acc[m][v], _mm256_madd_epi16(pairs[m][v], factors));
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
