// Codes to the operands of mma, and sums to results, for fp16 and bf16.
//
// A 16-bit float whose exponent makes the last bits of its mantissa count units holds an integer where its bits are:
// fp16 0x6400 is 1024, and 0x6400 | q is 1024 + q; 0x5400 is 64, and 0x5400 | q << 4 is 64 + q; bf16 0x4300 is 128. So
// one lop3 puts a pair of codes into a pair of floats, and subtracting 1024 + z, 64 + z or 128 + z leaves q - z,
// exactly: |q - z| <= 15. In fp16
//
//     a0   (w      & 0x000F000F | 0x64006400) - (1024 + z)                row g
//     a1   (w      & 0x00F000F0 | 0x64006400) · 1/16 - (64 + z)           row g + 8: 1024 + 16q
//     a2   (w >> 8 & 0x000F000F | 0x64006400) - (1024 + z)                row g
//     a3   (w >> 8 & 0x00F000F0 | 0x64006400) · 1/16 - (64 + z)           row g + 8
//
// 9 instructions for eight weights; in bf16, whose mantissa is too short for the second form, 11.
//
// Scales are not multiplied in here: the tensor cores sum x · (q - z) over a group in fp32, and the sum is scaled. That
// rounds no weight at all, works with fp16 scales in bf16 models, and for up to 32 rows of x is no more work.
#pragma once

#include "machine.cuh"

namespace halfbyte {

struct Half {
    // A lane's zero points of a subtile, as what is added: row g in the form for a0 and a2, row g + 8 in that for a1
    // and a3.
    struct Zeros {
        u32 low, high;
    };
    static DEVICE Zeros symmetric() { return {0x64086408, 0xD480D480}; }  // 1024 + 8, -(64 + 8)
    static DEVICE Zeros zeros(u32 nibbles, int subtile) {
        const u32 pair = and_or(nibbles >> 4 * subtile, 0x000F000F, 0x64006400);
        return {twice_low(pair), fma_f16(twice_high(pair), 0xBC00BC00, 0x63806380)};  // -(1024 + z) + 960
    }
    static DEVICE void dequantize(u32 word, const Zeros& zeros, u32 (&a)[4]) {
        constexpr u32 SIXTEENTH = 0x2C002C00;
        const u32 later = word >> 8;
        a[0] = subtract_f16(and_or(word, 0x000F000F, 0x64006400), zeros.low);
        a[1] = fma_f16(and_or(word, 0x00F000F0, 0x64006400), SIXTEENTH, zeros.high);
        a[2] = subtract_f16(and_or(later, 0x000F000F, 0x64006400), zeros.low);
        a[3] = fma_f16(and_or(later, 0x00F000F0, 0x64006400), SIXTEENTH, zeros.high);
    }
    static DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_f16(c, a, b0, b1); }
    static DEVICE u32 pack(float low, float high) { return pack_f16(low, high); }
    static DEVICE float low(u32 pair) { return low_f16(pair); }
    static DEVICE float high(u32 pair) { return high_f16(pair); }
};

struct BFloat {
    struct Zeros {
        u32 low, high;
    };
    static DEVICE Zeros symmetric() { return {0xC308C308, 0xC308C308}; }  // -(128 + 8)
    static DEVICE Zeros zeros(u32 nibbles, int subtile) {
        const u32 pair = and_or(nibbles >> 4 * subtile, 0x000F000F, 0xC300C300);
        return {twice_low(pair), twice_high(pair)};
    }
    static DEVICE void dequantize(u32 word, const Zeros& zeros, u32 (&a)[4]) {
        constexpr u32 ONE = 0x3F803F80;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            a[i] = fma_bf16(and_or(word >> 4 * i, 0x000F000F, 0x43004300), ONE, i % 2 ? zeros.high : zeros.low);
        }
    }
    static DEVICE void mma(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma_bf16(c, a, b0, b1); }
    static DEVICE u32 pack(float low, float high) { return pack_bf16(low, high); }
    static DEVICE float low(u32 pair) { return low_bf16(pair); }
    static DEVICE float high(u32 pair) { return high_bf16(pair); }
};

}  // namespace halfbyte
