// AVX2 + FMA + F16C.
#include <immintrin.h>

#include "avx2.hpp"

namespace halfbyte {
namespace {

struct Avx2 : Avx2Vectors {
    static constexpr int A8_VECTORS_1 = 2, A8_VECTORS_2 = 2, A8_VECTORS_4 = 1, A8_BLOCKS = 2, WIDE_ROWS = 4, WIDE_LEAST = 3;

    // Products of pairs are summed in 16 bits: 4 octets · 2 halves · 15 · 127 · 2 < 2^15.
    template <int M, int V>
    static inline void dot32_nibbles(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                     I (&acc)[M][V]) {
        const I mask = _mm256_set1_epi8(15);
        I pairs[M][V];
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) pairs[m][v] = zero();
#pragma GCC unroll 2
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
                    pairs[m][v] = _mm256_add_epi16(pairs[m][v], sum);
                }
            }
        }
        add_pairs(pairs, 1, acc);
    }
    // Two products of pairs fit 16 bits: 2 · 63 · 127 · 2 < 2^15.
    template <int M, int V>
    static inline void dot32_sixes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        for (int h = 0; h < 2; ++h) {
            I codes[4][V];
            for (int v = 0; v < V; ++v) {
                const auto parts = sixes(words[v], h);
                for (int part = 0; part < 4; ++part) codes[part][v] = parts[part];
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
    // One vector of output rows times M rows of activations that a8_wide.hpp repeated.
    template <int BITS, int M>
    static inline void wide_dot32(const std::uint32_t* words, const std::int8_t* x, bool begins, I (&acc)[M]) {
        const I mask = _mm256_set1_epi8(15);
        I low_pairs[M], high_pairs[M];
#pragma GCC unroll 8
        for (int line = 0; line < BITS; ++line) {
            const I codes = load_words(words + line * BLOCK_ROWS);
            const I low = _mm256_and_si256(codes, mask), high = _mm256_and_si256(_mm256_srli_epi32(codes, 4), mask);
            if constexpr (BITS == 4) {
                add_wide(low, x, 2 * line, line == 0, low_pairs);
                add_wide(high, x, 2 * line + 1, false, low_pairs);
            } else {
                add_wide(low, x, line, line == 0, low_pairs);
                add_wide(high, x, line, line == 0, high_pairs);
            }
        }
        const I ones = _mm256_set1_epi16(1), sixteens = _mm256_set1_epi16(16);
        for (int m = 0; m < M; ++m) {
            I sums = _mm256_madd_epi16(low_pairs[m], ones);
            if constexpr (BITS == 8) sums = _mm256_add_epi32(sums, _mm256_madd_epi16(high_pairs[m], sixteens));
            acc[m] = begins ? sums : _mm256_add_epi32(acc[m], sums);
        }
    }
    template <int M>
    static inline void add_wide(I codes, const std::int8_t* x, int part, bool begins, I (&pairs)[M]) {
        for (int m = 0; m < M; ++m) {
            const I product = _mm256_maddubs_epi16(codes, load_bytes(x + (part * M + m) * 4 * WIDTH));
            pairs[m] = begins ? product : _mm256_add_epi16(pairs[m], product);
            // GCC would rather add all products of a row in a tree, and spill them.
            asm("" : "+x"(pairs[m]));
        }
    }
    static I load_bytes(const std::int8_t* p) { return _mm256_load_si256(reinterpret_cast<const I*>(p)); }
    static void store_words(std::int8_t* p, I words) { _mm256_store_si256(reinterpret_cast<I*>(p), words); }
    static I halves(std::int32_t sum) { return _mm256_set1_epi32((sum & 127) + (sum >> 7) * 65536); }
    static I spread_zeros(I zeros) { return _mm256_or_si256(zeros, _mm256_slli_epi32(zeros, 23)); }
    static I minus_halves(I acc, I zeros, const std::int8_t* sum) {
        return _mm256_sub_epi32(acc, _mm256_madd_epi16(zeros, load_bytes(sum)));
    }
    // As in wide_dot32: pairs of eight products are summed in 16 bits before they are widened.
    static constexpr int DOT_BYTES = 32, DOT_CHAINS = 6;
    static I add_dots(I acc, I codes, I inputs) {
        I pairs = zero();
#pragma GCC unroll 8
        for (int i = 0; i < DOT_BYTES / 4; ++i) {
            asm volatile("" : "+x"(codes));  // or one product would do for all
            pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(codes, inputs));
        }
        return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    template <int M, int V>
    static inline void add_pairs(const I (&pairs)[M][V], int factor, I (&acc)[M][V]) {
        const I factors = _mm256_set1_epi16(static_cast<short>(factor));
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v)
                acc[m][v] = _mm256_add_epi32(acc[m][v], _mm256_madd_epi16(pairs[m][v], factors));
    }
};

constexpr Tier TIER = TierOf<Avx2>::tier("avx2");

}  // namespace

const Tier* avx2_tier() { return &TIER; }

}  // namespace halfbyte
