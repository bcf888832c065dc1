// AVX2 with the byte dot product of VNNI in 256 bits (AVX-VNNI): CPUs that have it and no AVX-512, from Alder Lake on.
//
// One instruction multiplies four bytes, adds them and accumulates in 32 bits, where avx2 takes one for pairs, one addition and
// a share of widening; and a byte of code needs no splitting.
#ifndef HALFBYTE_AVX_VNNI_INTRINSICS  // tests/kernels puts a scalar model of the one new intrinsic here
#define HALFBYTE_AVX_VNNI_INTRINSICS <immintrin.h>
#endif
#include HALFBYTE_AVX_VNNI_INTRINSICS

#include "avx2.hpp"

namespace halfbyte {
namespace {

struct AvxVnni : Avx2Vectors {
    // 4 or 8 accumulators, at two products a cycle of five cycles each; 2 rows × 4 spill.
    static constexpr int A8_VECTORS_1 = 4, A8_VECTORS_2 = 2, A8_VECTORS_4 = 2, A8_BLOCKS = 2, WIDE_ROWS = 0, WIDE_LEAST = 0;

    static constexpr int DOT_BYTES = 4, DOT_CHAINS = 12;
    static I add_dots(I acc, I codes, I inputs) { return _mm256_dpbusd_avx_epi32(acc, codes, inputs); }

    template <int M, int V>
    static inline void dot32_nibbles(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                     I (&acc)[M][V]) {
        const I mask = _mm256_set1_epi8(15);
        for (int octet = 0; octet < 4; ++octet) {
            I low[V], high[V];
            for (int v = 0; v < V; ++v) {
                const I line = load_words(words[v] + octet * BLOCK_ROWS);
                low[v] = _mm256_and_si256(line, mask);
                high[v] = _mm256_and_si256(_mm256_srli_epi32(line, 4), mask);
            }
            for (int m = 0; m < M; ++m) {
                const I x_low = broadcast4(x[m] + octet * OCTET), x_high = broadcast4(x[m] + octet * OCTET + 4);
                for (int v = 0; v < V; ++v)
                    acc[m][v] = _mm256_dpbusd_avx_epi32(_mm256_dpbusd_avx_epi32(acc[m][v], low[v], x_low), high[v], x_high);
            }
        }
    }
    template <int M, int V>
    static inline void dot32_sixes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        for (int h = 0; h < 2; ++h)
            for (int v = 0; v < V; ++v) {
                const auto codes = sixes(words[v], h);
                for (int m = 0; m < M; ++m)
                    for (int part = 0; part < 4; ++part)
                        acc[m][v] = _mm256_dpbusd_avx_epi32(acc[m][v], codes[part], broadcast4(x[m] + 16 * h + 4 * part));
            }
    }
    template <int M, int V>
    static inline void dot32_bytes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        for (int line = 0; line < 8; ++line)
            for (int v = 0; v < V; ++v) {
                const I codes = load_words(words[v] + line * BLOCK_ROWS);
                for (int m = 0; m < M; ++m)
                    acc[m][v] = _mm256_dpbusd_avx_epi32(acc[m][v], codes, broadcast4(x[m] + line * 4));
            }
    }
};

constexpr Tier TIER = TierOf<AvxVnni>::tier("avx_vnni");

}  // namespace

const Tier* avx_vnni_tier() { return &TIER; }

}  // namespace halfbyte
