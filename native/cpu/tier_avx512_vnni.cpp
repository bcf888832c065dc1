// AVX-512 (F, BW, DQ, VL, VNNI): sixteen floats a register, thirty-two registers.
//
// Nibbles are masked where they stand and converted, as on AVX2. vpermps would look them up without mask and conversion, but where
// 512 bits are two halves (Zen 4) look-up and shift take the ports of the FMAs, and mask and conversion do not (docs/design/cpu-kernel.md).
#ifndef HALFBYTE_AVX512_INTRINSICS  // tests/kernels puts a scalar model of the intrinsics here
#define HALFBYTE_AVX512_INTRINSICS <immintrin.h>
#define HALFBYTE_AVX512_BF16 __attribute__((target("avx512bf16")))
#else
#define HALFBYTE_AVX512_BF16
#endif
// GCC 12's header passes undefined vectors on purpose and then warns of them (GCC bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include HALFBYTE_AVX512_INTRINSICS
#pragma GCC diagnostic pop

#include "f16c.hpp"
#include "tier.hpp"

namespace halfbyte {
namespace {

struct Avx512 : F16C {
    // 12 rows × 2 vectors = 24 accumulators + 2 weights + 1 broadcast: 27 of 32 registers.
    static constexpr int WIDTH = 16, PANEL_BLOCKS = 2, TILE_ROWS = 12;
    // gemv: 4 to 16 accumulators; an FMA takes four cycles.
    static constexpr int GEMV_VECTORS_1 = 4, GEMV_VECTORS_2 = 4, GEMV_VECTORS_4 = 4, GEMV_BLOCKS = 4;
    using F = __m512;
    using I = __m512i;

    static F load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, F f) { _mm512_storeu_ps(p, f); }
    static F set1(float value) { return _mm512_set1_ps(value); }
    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static I load_words(const std::uint32_t* p) { return _mm512_load_si512(p); }

    static F load_bf16(const std::uint16_t* p) {
        const I wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static F load_f16(const std::uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static F load_i8(const std::int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }

    // One block at a time is one stream from memory; `Sums` makes up for the few accumulators.
    static constexpr int A8_VECTORS_1 = 1, A8_VECTORS_2 = 1, A8_VECTORS_4 = 2, A8_BLOCKS = 4, WIDE_ROWS = 0, WIDE_LEAST = 0;
    static I zero() { return _mm512_setzero_si512(); }
    static F to_float(I words) { return _mm512_cvtepi32_ps(words); }
    static I load_zeros(const std::uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static I minus_product(I acc, I zeros, std::int32_t sum) {
        return _mm512_sub_epi32(acc, _mm512_mullo_epi32(zeros, _mm512_set1_epi32(sum)));
    }
    static I broadcast4(const std::int8_t* x) {
        std::int32_t word;
        std::memcpy(&word, x, sizeof word);
        return _mm512_set1_epi32(word);
    }
    static constexpr int DOT_BYTES = 4, DOT_CHAINS = 12;
    static I add_dots(I acc, I codes, I inputs) { return _mm512_dpbusd_epi32(acc, codes, inputs); }
    // AVX512-BF16, which not every CPU of the tier has; only its peak is measured with it.
    HALFBYTE_AVX512_BF16 static double bf16_dots(std::int64_t steps, float* sink) {
        volatile int one = 0x3F803F80;
        const auto ones = (__m512bh)_mm512_set1_epi32(one);
        F acc[DOT_CHAINS];
        for (auto& sums : acc) sums = _mm512_set1_ps(0.0f);
        for (std::int64_t step = 0; step < steps; ++step)
            for (auto& sums : acc) sums = _mm512_dpbf16_ps(sums, ones, ones);
        float lanes[WIDTH];
        for (const auto& sums : acc) {
            _mm512_storeu_ps(lanes, sums);
            for (const float lane : lanes) *sink += lane;
        }
        return 2.0 * DOT_CHAINS * 2 * WIDTH * static_cast<double>(steps);
    }
    static constexpr PeakLoop BF16_DOTS = bf16_dots;

    // Where sums are few, each is added up in several chains, for a vpdpbusd takes four cycles. They are integers: any order will do.
    template <int M, int V>
    struct Sums {
        static constexpr int CHAINS = M * V < 4 ? 4 / (M * V) : 1;
        I (&acc)[M][V];
        I more[CHAINS][M][V];
        explicit Sums(I (&sums)[M][V]) : acc(sums) {
            for (int c = 1; c < CHAINS; ++c)
                for (int m = 0; m < M; ++m)
                    for (int v = 0; v < V; ++v) more[c][m][v] = zero();
        }
        void add(int product, int m, int v, I codes, I inputs) {
            I& sum = product % CHAINS == 0 ? acc[m][v] : more[product % CHAINS][m][v];
            sum = _mm512_dpbusd_epi32(sum, codes, inputs);
        }
        void join() {
            for (int c = 1; c < CHAINS; ++c)
                for (int m = 0; m < M; ++m)
                    for (int v = 0; v < V; ++v) acc[m][v] = _mm512_add_epi32(acc[m][v], more[c][m][v]);
        }
    };

    template <int M, int V>
    static inline void dot32_nibbles(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                     I (&acc)[M][V]) {
        const I mask = _mm512_set1_epi32(0x0F0F0F0F);
        Sums<M, V> sums(acc);
        for (int octet = 0; octet < 4; ++octet) {
            I low[V], high[V];
            for (int v = 0; v < V; ++v) {
                const I line = load_words(words[v] + octet * BLOCK_ROWS);
                low[v] = _mm512_and_si512(line, mask);
                high[v] = _mm512_and_si512(_mm512_srli_epi32(line, 4), mask);
            }
            for (int m = 0; m < M; ++m) {
                const I x_low = broadcast4(x[m] + octet * OCTET), x_high = broadcast4(x[m] + octet * OCTET + 4);
                for (int v = 0; v < V; ++v) {
                    sums.add(2 * octet, m, v, low[v], x_low);
                    sums.add(2 * octet + 1, m, v, high[v], x_high);
                }
            }
        }
        sums.join();
    }
    template <int M, int V>
    static inline void dot32_sixes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        const I mask = _mm512_set1_epi32(0x0F0F0F0F), upper = _mm512_set1_epi32(0x30303030);
        Sums<M, V> sums(acc);
        for (int h = 0; h < 2; ++h) {
            I codes[4][V];  // of four inputs each
            for (int v = 0; v < V; ++v) {
                const I first = load_words(words[v] + 2 * h * BLOCK_ROWS), second = load_words(words[v] + (2 * h + 1) * BLOCK_ROWS);
                const I bits = load_words(words[v] + (4 + h) * BLOCK_ROWS);
                const auto join = [&](I nibbles, I twos) {
                    return _mm512_or_si512(_mm512_and_si512(nibbles, mask), _mm512_and_si512(twos, upper));
                };
                codes[0][v] = join(first, _mm512_slli_epi32(bits, 4));
                codes[1][v] = join(_mm512_srli_epi32(first, 4), _mm512_slli_epi32(bits, 2));
                codes[2][v] = join(second, bits);
                codes[3][v] = join(_mm512_srli_epi32(second, 4), _mm512_srli_epi32(bits, 2));
            }
            for (int m = 0; m < M; ++m)
                for (int part = 0; part < 4; ++part) {
                    const I inputs = broadcast4(x[m] + 16 * h + 4 * part);
                    for (int v = 0; v < V; ++v) sums.add(part, m, v, codes[part][v], inputs);
                }
        }
        sums.join();
    }
    template <int M, int V>
    static inline void dot32_bytes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        Sums<M, V> sums(acc);
        for (int line = 0; line < 8; ++line)
            for (int v = 0; v < V; ++v) {
                const I codes = load_words(words[v] + line * BLOCK_ROWS);
                for (int m = 0; m < M; ++m) sums.add(line, m, v, codes, broadcast4(x[m] + line * 4));
            }
        sums.join();
    }

    static constexpr const float (&NIBBLE_SCALE)[OCTET] = IN_PLACE_NIBBLE;
    static constexpr const float (&BYTE_SCALE)[OCTET] = IN_PLACE_BYTE;
    template <int N>
    static F nibble(I words) {
        if constexpr (N == 7)
            return _mm512_cvtepi32_ps(_mm512_srli_epi32(words, 4 * N));
        else
            return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(15 << (4 * N))));
    }
    template <int N>
    static F byte(I words) {
        if constexpr (N == 3)
            return _mm512_cvtepi32_ps(_mm512_srli_epi32(words, 8 * N));
        else
            return _mm512_cvtepi32_ps(_mm512_and_si512(words, _mm512_set1_epi32(255 << (8 * N))));
    }
};

constexpr Tier TIER = TierOf<Avx512>::tier("avx512_vnni");

}  // namespace

const Tier* avx512_vnni_tier() { return &TIER; }

}  // namespace halfbyte
