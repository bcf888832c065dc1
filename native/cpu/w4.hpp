// INT4 and INT8 weights in memory, and what every instruction-set tier implements over them.
//
// Layout ("interleaved 16"). Output rows stand in blocks of 16, lane r = row 16·b + r. Inputs run in octets of 8.
// One octet of one block is one 64-byte cache line: sixteen 32-bit words, one a row:
//
//     words[b][j][r]:   byte i (i = 0..3)  =  code[row, 8j + i]  |  code[row, 8j + 4 + i] << 4
//
// so `word & 0x0F0F0F0F` holds inputs 8j..8j+3 and `(word >> 4) & 0x0F0F0F0F` inputs 8j+4..8j+7, each ready for a
// four-way byte dot product; as nibbles, nibble n belongs to input 8j + NIBBLE_INPUT[n]. A line is one AVX-512 load, two
// AVX2 loads, and never straddles. With 8 bits an octet is two such lines, h = 0, 1, and a code is a byte:
//
//     words[b][j][h][r]:   byte i (i = 0..3)  =  code[row, 8j + 4h + i]
//
//     scales[b][g][r], offsets[b][g][r]: float32, W = scale · code + offset for inputs of group g
//     kept[b][j][r]: bf16 or f16, W of kept input j itself
//
// Group g is octets group_ends[g - 1] .. group_ends[g]: a group whose width is no multiple of 8 ends in an octet that is
// not full. Rows beyond `rows` and inputs that fill an octet up hold code 0. Inputs may stand in another order than the
// matrix's columns: those of a group side by side, kept ones behind all octets (`InputOrder` in w4_matrix.hpp). Codes of 2
// and 3 bits are stored as 4-bit ones, those of 5 to 7 as bytes: the scale and the offset make them what they are.
//
// Bytes per weight at group size G: 1/2 or 1, + 8/G; 2 for a kept one.
#pragma once

#include <cstddef>
#include <cstdint>

#include "a8.hpp"
#include "decoder_math.hpp"
#include "range.hpp"
#include "rejection.hpp"
#include "rounding.hpp"

namespace halfbyte {

constexpr int BLOCK_ROWS = 16;
constexpr int OCTET = 8;
// Input of an octet that nibble n of its word, or byte n of its two words, belongs to.
constexpr int NIBBLE_INPUT[OCTET] = {0, 4, 1, 5, 2, 6, 3, 7};
constexpr int BYTE_INPUT[OCTET] = {0, 1, 2, 3, 4, 5, 6, 7};
// Calls with at most this many activation rows use the kernel whose rows do not influence each other's bits.
constexpr int SMALL_M = 16;
// Their activation rows are taken this many at a time, then what is left.
constexpr int GEMV_TILE = 4;
// Activation rows a product with a 16-bit weight takes at most.
constexpr int HALF_ROWS = 6;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A packed matrix, as the kernels see it.
struct W4View {
    const std::uint32_t* words;
    const float* scales;
    const float* offsets;
    const int* group_ends;      // [groups], in octets
    const std::uint16_t* kept;  // or null
    DType kept_dtype;
    int bits;    // 4 or 8
    int rows;    // output features
    int cols;    // floats in a row of activations: input features, or 8·octets + kept_cols once put in order
    int blocks;  // ceil(rows / 16)
    int octets;
    int groups;
    int kept_cols;
};

// Where results go: row m, column n at data + m·stride + n (in elements of `dtype`).
struct Output {
    void* data;
    DType dtype;
    std::size_t stride;
    int cols;
    const float* bias;  // [cols] or null
};

// The product with codes of one width. Ranges are [begin, end); each call covers all M activation rows.
struct Product {
    // One row of activations [cols] → what gemv takes of it: octet j at x + j·x_stride, and x_sums [groups].
    void (*prepare_row)(const W4View&, const void* source, DType, float* x, int x_stride, float* x_sums);
    // M <= SMALL_M. x: tiles of GEMV_TILE rows, the last one of what is left, each [octets][its rows][8];
    // x_sums: [M][groups]; x_kept: M rows of kept inputs, `cols` floats apart.
    void (*gemv)(const W4View&, const float* x, const float* x_sums, const float* x_kept, int m, const Output&,
                 int block_begin, int block_end);
    // Tile number `tile` of activations [M][cols] whose rows are `stride` elements apart → what gemm takes of it.
    void (*pack_tile)(const W4View&, const void* source, std::size_t stride, DType, int m, int tile, float* x);
    // Any M. x: tiles of [8·octets + kept_cols][tile_rows], zero beyond M and cols.
    void (*gemm)(const W4View&, const float* x, int m, const Output&, int panel_begin, int panel_end);
};

using PeakLoop = double (*)(std::int64_t steps, float* sink);

// What a tier provides.
struct Tier {
    const char* name;
    int gemv_blocks;   // weight blocks `gemv` works on together
    int tile_rows;     // activation rows of a tile in the packed activations of `gemm`
    int panel_blocks;  // weight blocks one unit of `gemm` works on
    Product nibbles, bytes;
    // M <= HALF_ROWS, weight [..][cols] in bf16 or f16; x: [M][x_stride] float32, zero from cols to a multiple of 64.
    void (*half_multiply)(const void* weight, DType, int cols, const float* x, std::size_t x_stride, int m, const Output&,
                          int row_begin, int row_end);
    A8Product a8;
    void (*attend)(const AttentionSpan&);
    DecoderMath math;
    void (*round_block)(const RoundingBlock&);
    void (*try_range)(const RangeTrial&, int group_begin, int group_end);
    RejectionMath rejection;
    // For the rooflines: read n bytes (a multiple of 256), again and again.
    float (*read)(const void* data, std::size_t n, int passes);
    // `steps` rounds of independent multiply-adds of ones; returns how many operations they were, and adds to the sink as many as
    // there were products. Of float32 (of other numbers than one), of bytes as the products use them, and of bf16 numbers; null
    // where the tier has no instruction for it. The last may be asked only of a CPU that `has_bf16`.
    PeakLoop fma, int8_dots, bf16_dots;
};

// Null when this build or this CPU (or its operating system) lacks the tier.
const Tier* portable_tier();
const Tier* avx2_tier();
const Tier* avx_vnni_tier();
const Tier* avx512_vnni_tier();
const Tier* amx_tier();
const Tier* neon_tier();

}  // namespace halfbyte
