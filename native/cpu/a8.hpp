// The product with 8-bit activations: integer codes times integer activations, exact, then one multiplication a group.
//
// Activations. A row is cut into the weight's groups; group g becomes int8 numbers q = round(x / s_g), s_g = max|x| / 127:
//
//     int8 q[cols] | groups × { float s_g; int32 Σq }          one after the other, rounded up to 64 bytes
//
// Weights. Words as in w4.hpp (16 output rows interleaved, 64 bytes an octet of 4-bit codes, two such lines with 8 bits). With
// 6 bits four octets are four lines of their codes' low nibbles and two lines of the upper two bits, h = 0, 1:
//
//     words[b][4j + 4 + h][r]:   byte i, bits 2f, 2f + 1 (f = 0..3)  =  code[row, 32j + 16h + 4f + i] >> 4
//
// And for each group of a block what makes integers of them weights, W = scale · (code - zero):
//
//     meta[b][g]:  fp16 scale[16]  |  uint8 zero[16]           48 bytes
//
//     y[m, n] = Σ_g s_g · scale[n, g] · (Σ_k code · q - zero[n, g] · Σ q)
//
// Bytes a weight at group size G: 1/2, 3/4 or 1, + 3/G. With G = 64: 0.547.
// Range: 4 bits: |code · q| <= 15 · 127, four octets of two pairs stay below 2^15, so 16-bit sums are exact; 6 bits: one
// octet, 63 · 127 · 4 < 2^15; 8 bits: the 32-bit sums are exact for groups up to 2^16. Integer sums do not depend on their order, and groups are added in order by one chain of
// FMAs, so a row has the same bits in any company, for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbyte {

constexpr int A8_META = 48;
// A group must be a multiple of this many inputs.
constexpr int A8_INPUTS = 32;

struct A8View {
    const std::uint32_t* words;
    const std::uint8_t* meta;
    int bits;    // 4, 6 or 8
    int blocks;  // of 16 output rows
    int octets;
    int groups;
    int group_octets;
};

// Words of a block: 16 for each bit of a code and 32 inputs.
inline std::size_t a8_block_words(const A8View& w) { return static_cast<std::size_t>(w.octets) * w.bits * 4; }

inline std::size_t a8_row_bytes(int cols, int groups) {
    return (static_cast<std::size_t>(cols) + 8 * static_cast<std::size_t>(groups) + 63) / 64 * 64;
}

struct A8Product {
    // x [cols] → a quantized row.
    void (*quantize)(const float* x, int cols, int groups, std::int8_t* row);
    // Of the scratch that M rows want.
    std::size_t (*scratch_bytes)(const A8View&, int m);
    // M quantized rows, `stride` bytes apart, times blocks [begin, end): y[m · y_stride + 16 · block + r]. The scratch begins a line.
    void (*multiply)(const A8View&, const std::int8_t* x, std::size_t stride, int m, float* y, std::size_t y_stride,
                     int begin, int end, std::int8_t* scratch);
};

}  // namespace halfbyte
