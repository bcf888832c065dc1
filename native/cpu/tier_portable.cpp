// The tier for any CPU: the compiler's own 128-bit vectors, which it lowers to whatever its target has (SSE2, NEON, scalar).
#include "tier.hpp"

namespace halfbyte {
namespace {

struct Portable {
    // 2 rows × 4 vectors = 8 accumulators + 4 weights + 2 broadcasts: 14 of SSE2's 16 registers.
    static constexpr int WIDTH = 4, PANEL_BLOCKS = 1, TILE_ROWS = 2;
    static constexpr int GEMV_VECTORS_1 = 6, GEMV_VECTORS_2 = 4, GEMV_VECTORS_4 = 2, GEMV_BLOCKS = 3;
    typedef float F __attribute__((vector_size(16)));
    typedef std::int32_t I __attribute__((vector_size(16)));

    static F load(const float* p) {
        F f;
        std::memcpy(&f, p, sizeof f);
        return f;
    }
    static void store(float* p, F f) { std::memcpy(p, &f, sizeof f); }
    static F set1(float value) { return F{value, value, value, value}; }
    static F add(F a, F b) { return a + b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F min(F a, F b) { return a < b ? a : b; }
    static F max(F a, F b) { return a > b ? a : b; }
    static F fma(F a, F b, F c) { return a * b + c; }
    static I load_words(const std::uint32_t* p) {
        I words;
        std::memcpy(&words, p, sizeof words);
        return words;
    }
    static F load_bf16(const std::uint16_t* p) {
        return F{from_bf16(p[0]), from_bf16(p[1]), from_bf16(p[2]), from_bf16(p[3])};
    }
    static F load_f16(const std::uint16_t* p) { return F{from_f16(p[0]), from_f16(p[1]), from_f16(p[2]), from_f16(p[3])}; }
    static F load_i8(const std::int8_t* p) { return to_float(I{p[0], p[1], p[2], p[3]}); }
    static void widen_f16(const std::uint16_t* source, float* target, int count) {
        for (int i = 0; i < count; ++i) target[i] = from_f16(source[i]);
    }
    static void narrow_f16(const float* source, std::uint16_t* target, int count) {
        for (int i = 0; i < count; ++i) target[i] = to_f16(source[i]);
    }

    static constexpr int A8_VECTORS_1 = 2, A8_VECTORS_2 = 2, A8_VECTORS_4 = 1, A8_BLOCKS = 2, WIDE_ROWS = 0, WIDE_LEAST = 0;
    static I zero() { return I{}; }
    static F to_float(I words) { return __builtin_convertvector(words, F); }
    static I load_zeros(const std::uint8_t* p) { return I{p[0], p[1], p[2], p[3]}; }
    static I minus_product(I acc, I zeros, std::int32_t sum) { return acc - zeros * sum; }
    template <int M, int V>
    static inline void dot32_nibbles(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                     I (&acc)[M][V]) {
        for (int octet = 0; octet < 4; ++octet)
            for (int v = 0; v < V; ++v) {
                const I line = load_words(words[v] + octet * BLOCK_ROWS);
                for (int i = 0; i < 4; ++i) {
                    const I low = (line >> (8 * i)) & 15, high = (line >> (8 * i + 4)) & 15;
                    for (int m = 0; m < M; ++m)
                        acc[m][v] += low * x[m][octet * OCTET + i] + high * x[m][octet * OCTET + 4 + i];
                }
            }
    }
    template <int M, int V>
    static inline void dot32_sixes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        for (int octet = 0; octet < 4; ++octet)
            for (int v = 0; v < V; ++v) {
                const I line = load_words(words[v] + octet * BLOCK_ROWS);
                const I bits = load_words(words[v] + (4 + octet / 2) * BLOCK_ROWS) >> (4 * (octet % 2));
                for (int i = 0; i < 4; ++i) {
                    const I low = ((line >> (8 * i)) & 15) + ((bits >> (8 * i)) & 3) * 16;
                    const I high = ((line >> (8 * i + 4)) & 15) + ((bits >> (8 * i + 2)) & 3) * 16;
                    for (int m = 0; m < M; ++m)
                        acc[m][v] += low * x[m][octet * OCTET + i] + high * x[m][octet * OCTET + 4 + i];
                }
            }
    }
    template <int M, int V>
    static inline void dot32_bytes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        for (int line = 0; line < 8; ++line)
            for (int v = 0; v < V; ++v) {
                const I bytes = load_words(words[v] + line * BLOCK_ROWS);
                for (int i = 0; i < 4; ++i) {
                    const I codes = (bytes >> (8 * i)) & 255;
                    for (int m = 0; m < M; ++m) acc[m][v] += codes * x[m][line * 4 + i];
                }
            }
    }

    static constexpr int DOT_BYTES = 0;
    static constexpr PeakLoop BF16_DOTS = nullptr;

    static constexpr const float (&NIBBLE_SCALE)[OCTET] = IN_PLACE_NIBBLE;
    static constexpr const float (&BYTE_SCALE)[OCTET] = IN_PLACE_BYTE;
    template <int N>
    static F nibble(I words) {
        if constexpr (N == 7)
            return __builtin_convertvector((words >> (4 * N)) & 15, F);
        else
            return __builtin_convertvector(words & (15 << (4 * N)), F);
    }
    template <int N>
    static F byte(I words) {
        if constexpr (N == 3)
            return __builtin_convertvector((words >> (8 * N)) & 255, F);
        else
            return __builtin_convertvector(words & (255 << (8 * N)), F);
    }
};

constexpr Tier TIER = TierOf<Portable>::tier("portable");

}  // namespace

const Tier* portable_tier() { return &TIER; }

}  // namespace halfbyte
