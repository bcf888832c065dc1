// AArch64 with Advanced SIMD and its dot product (Armv8.2): four floats a register, thirty-two registers.
//
// A conversion from fixed point divides by a power of two on the way: a nibble or a byte is masked where it stands and comes
// out as the code itself, so activations need no scales. Of the dot products only the signed one (sdot) is used: it came years
// before the mixed one (usdot, i8mm), and nibbles fit it as they are.
#include <arm_neon.h>

#include "tier.hpp"

namespace halfbyte {
namespace {

struct Neon {
    // 6 rows × 4 vectors = 24 accumulators + 4 weights + 1 broadcast: 29 of 32 registers.
    static constexpr int WIDTH = 4, PANEL_BLOCKS = 1, TILE_ROWS = 6;
    // gemv: 8 to 16 accumulators: two to four FMAs a cycle, each of four cycles.
    static constexpr int GEMV_VECTORS_1 = 8, GEMV_VECTORS_2 = 4, GEMV_VECTORS_4 = 4, GEMV_BLOCKS = 2;
    using F = float32x4_t;
    using I = int32x4_t;

    static F load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, F f) { vst1q_f32(p, f); }
    static F set1(float value) { return vdupq_n_f32(value); }
    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    // As on x86, a NaN gives way to a number.
    static F min(F a, F b) { return vminnmq_f32(a, b); }
    static F max(F a, F b) { return vmaxnmq_f32(a, b); }
    // GCC 12 takes vfmaq_f32, and vcvt_f32_f16 below, for calls that read memory, and so writes a tile's accumulators back
    // after every step.
    static F fma(F a, F b, F c) {
        asm("fmla %0.4s, %1.4s, %2.4s" : "+w"(c) : "w"(a), "w"(b));
        return c;
    }
    static I load_words(const std::uint32_t* p) { return vreinterpretq_s32_u32(vld1q_u32(p)); }

    static F load_bf16(const std::uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
    static F load_f16(const std::uint16_t* p) {
        F f;
        asm("fcvtl %0.4s, %1.4h" : "=w"(f) : "w"(vld1_u16(p)));
        return f;
    }
    static F load_i8(const std::int8_t* p) {
        std::uint32_t word;
        std::memcpy(&word, p, sizeof word);
        return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(word))))));
    }
    static void widen_f16(const std::uint16_t* source, float* target, int count) {
        for (; count >= 4; count -= 4, source += 4, target += 4) store(target, load_f16(source));
        if (count == 0) return;
        std::uint16_t halves[4] = {};
        float floats[4];
        std::memcpy(halves, source, sizeof(std::uint16_t) * count);
        store(floats, load_f16(halves));
        std::memcpy(target, floats, sizeof(float) * count);
    }
    static void narrow_f16(const float* source, std::uint16_t* target, int count) {
        for (; count >= 4; count -= 4, source += 4, target += 4)
            vst1_u16(target, vreinterpret_u16_f16(vcvt_f16_f32(load(source))));
        if (count == 0) return;
        float floats[4] = {};
        std::uint16_t halves[4];
        std::memcpy(floats, source, sizeof(float) * count);
        vst1_u16(halves, vreinterpret_u16_f16(vcvt_f16_f32(load(floats))));
        std::memcpy(target, halves, sizeof(std::uint16_t) * count);
    }

    // 4 to 8 accumulators: two dot products a cycle, each of one to three cycles.
    static constexpr int A8_VECTORS_1 = 4, A8_VECTORS_2 = 4, A8_VECTORS_4 = 2, A8_BLOCKS = 2, WIDE_ROWS = 0, WIDE_LEAST = 0;
    static I zero() { return vdupq_n_s32(0); }
    static F to_float(I words) { return vcvtq_f32_s32(words); }
    static I load_zeros(const std::uint8_t* p) {
        std::uint32_t word;
        std::memcpy(&word, p, sizeof word);
        const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(word)));
        return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(wide)));
    }
    static I minus_product(I acc, I zeros, std::int32_t sum) { return vmlsq_n_s32(acc, zeros, sum); }

    static constexpr int DOT_BYTES = 4, DOT_CHAINS = 12;
    static I add_dots(I acc, I codes, I inputs) {
        return vdotq_s32(acc, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(inputs));
    }
    // Arm's BF16 extension, which not every CPU of the tier has; only its peak is measured with it. (bfmmla would do twice as much
    // an instruction, in a layout that nothing here has.)
    static double bf16_dots(std::int64_t steps, float* sink) {
        volatile std::uint32_t one = 0x3F803F80;
        const uint32x4_t ones = vdupq_n_u32(one);
        F acc[DOT_CHAINS];
        for (auto& sums : acc) sums = set1(0.0f);
        for (std::int64_t step = 0; step < steps; ++step)
            for (auto& sums : acc)
                asm(".arch_extension bf16\n\tbfdot %0.4s, %1.8h, %2.8h" : "+w"(sums) : "w"(ones), "w"(ones));
        float lanes[WIDTH];
        for (const auto& sums : acc) {
            store(lanes, sums);
            for (const float lane : lanes) *sink += lane;
        }
        return 2.0 * DOT_CHAINS * 2 * WIDTH * static_cast<double>(steps);
    }
    static constexpr PeakLoop BF16_DOTS = bf16_dots;

    // Four bytes of four rows times inputs 4·LANE .. 4·LANE + 3 of x.
    template <int LANE>
    static inline I dot(I acc, int8x16_t codes, int8x16_t x) {
        return vdotq_laneq_s32(acc, codes, x, LANE);
    }
    // Two octets and the sixteen inputs they meet.
    template <int M, int V>
    static inline void dot16_nibbles(const std::uint32_t* const (&words)[V], int octet, const int8x16_t (&x)[M],
                                     I (&acc)[M][V]) {
        const uint8x16_t mask = vdupq_n_u8(15);
        for (int v = 0; v < V; ++v) {
            const auto bytes = [&](int of) { return vreinterpretq_u8_s32(load_words(words[v] + (octet + of) * BLOCK_ROWS)); };
            const uint8x16_t first = bytes(0), second = bytes(1);
            const int8x16_t low[2] = {vreinterpretq_s8_u8(vandq_u8(first, mask)), vreinterpretq_s8_u8(vandq_u8(second, mask))};
            const int8x16_t high[2] = {vreinterpretq_s8_u8(vshrq_n_u8(first, 4)), vreinterpretq_s8_u8(vshrq_n_u8(second, 4))};
            for (int m = 0; m < M; ++m) {
                acc[m][v] = dot<1>(dot<0>(acc[m][v], low[0], x[m]), high[0], x[m]);
                acc[m][v] = dot<3>(dot<2>(acc[m][v], low[1], x[m]), high[1], x[m]);
            }
        }
    }
    template <int M, int V>
    static inline void dot32_nibbles(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                     I (&acc)[M][V]) {
        for (int half = 0; half < 2; ++half) {
            int8x16_t inputs[M];
            for (int m = 0; m < M; ++m) inputs[m] = vld1q_s8(x[m] + half * 16);
            dot16_nibbles<M, V>(words, half * 2, inputs, acc);
        }
    }
    // Six bits fit a signed byte.
    template <int M, int V>
    static inline void dot32_sixes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        const uint8x16_t mask = vdupq_n_u8(15), upper = vdupq_n_u8(0x30);
        for (int half = 0; half < 2; ++half) {
            int8x16_t inputs[M];
            for (int m = 0; m < M; ++m) inputs[m] = vld1q_s8(x[m] + half * 16);
            for (int v = 0; v < V; ++v) {
                const auto line = [&](int at) { return vreinterpretq_u8_s32(load_words(words[v] + at * BLOCK_ROWS)); };
                const uint8x16_t first = line(2 * half), second = line(2 * half + 1), bits = line(4 + half);
                const auto join = [&](uint8x16_t nibbles, uint8x16_t twos) {
                    return vreinterpretq_s8_u8(vorrq_u8(vandq_u8(nibbles, mask), vandq_u8(twos, upper)));
                };
                const int8x16_t codes[4] = {join(first, vshlq_n_u8(bits, 4)), join(vshrq_n_u8(first, 4), vshlq_n_u8(bits, 2)),
                                            join(second, bits), join(vshrq_n_u8(second, 4), vshrq_n_u8(bits, 2))};
                for (int m = 0; m < M; ++m) {
                    acc[m][v] = dot<1>(dot<0>(acc[m][v], codes[0], inputs[m]), codes[1], inputs[m]);
                    acc[m][v] = dot<3>(dot<2>(acc[m][v], codes[2], inputs[m]), codes[3], inputs[m]);
                }
            }
        }
    }
    // A byte with its top bit turned over is the code less 128, with a sign: 128 · Σq makes up for it, the same in every row.
    template <int M, int V>
    static inline void dot32_bytes(const std::uint32_t* const (&words)[V], const std::int8_t* const (&x)[M],
                                   I (&acc)[M][V]) {
        const int8x16_t top = vdupq_n_s8(-128);
        for (int half = 0; half < 2; ++half) {
            int8x16_t inputs[M];
            I minus_128[M];
            for (int m = 0; m < M; ++m) {
                inputs[m] = vld1q_s8(x[m] + half * 16);
                minus_128[m] = dot<1>(dot<0>(zero(), top, inputs[m]), top, inputs[m]);
                minus_128[m] = dot<3>(dot<2>(minus_128[m], top, inputs[m]), top, inputs[m]);
            }
            for (int v = 0; v < V; ++v) {
                int8x16_t codes[4];
                for (int line = 0; line < 4; ++line)
                    codes[line] = veorq_s8(vreinterpretq_s8_s32(load_words(words[v] + (half * 4 + line) * BLOCK_ROWS)), top);
                for (int m = 0; m < M; ++m) {
                    acc[m][v] = dot<1>(dot<0>(vsubq_s32(acc[m][v], minus_128[m]), codes[0], inputs[m]), codes[1], inputs[m]);
                    acc[m][v] = dot<3>(dot<2>(acc[m][v], codes[2], inputs[m]), codes[3], inputs[m]);
                }
            }
        }
    }

    static constexpr float NIBBLE_SCALE[OCTET] = {1, 1, 1, 1, 1, 1, 1, 1};
    static constexpr float BYTE_SCALE[OCTET] = {1, 1, 1, 1, 1, 1, 1, 1};
    template <int N>
    static F nibble(I words) {
        return field<4 * N>(words, 15u << (4 * N));
    }
    template <int N>
    static F byte(I words) {
        return field<8 * N>(words, 255u << (8 * N));
    }
    // The bits of `mask`, which begin at SHIFT, as an integer in float.
    template <int SHIFT>
    static F field(I words, std::uint32_t mask) {
        const uint32x4_t bits = vandq_u32(vreinterpretq_u32_s32(words), vdupq_n_u32(mask));
        if constexpr (SHIFT == 0)
            return vcvtq_f32_u32(bits);
        else
            return vcvtq_n_f32_u32(bits, SHIFT);
    }
};

constexpr Tier TIER = TierOf<Neon>::tier("neon");

}  // namespace

const Tier* neon_tier() { return &TIER; }

}  // namespace halfbyte
