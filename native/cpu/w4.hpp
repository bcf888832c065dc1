// INT4 weights in memory, and what every instruction-set tier implements over them.
//
// Layout ("interleaved 16"). Output rows stand in blocks of 16, lane r = row 16·b + r. Inputs run in octets of 8.
// One octet of one block is one 64-byte cache line: sixteen 32-bit words, one a row:
//
//     words[b][j][r]:   byte i (i = 0..3)  =  code[row, 8j + i]  |  code[row, 8j + 4 + i] << 4
//
// so `word & 0x0F0F0F0F` holds inputs 8j..8j+3 and `(word >> 4) & 0x0F0F0F0F` inputs 8j+4..8j+7, each ready for a
// four-way byte dot product; as nibbles, nibble n belongs to input 8j + NIBBLE_INPUT[n]. A line is one AVX-512 load, two
// AVX2 loads, and never straddles. Rows beyond `rows` and inputs beyond `cols` hold code 0.
//
//     scales[b][g][r], offsets[b][g][r]: float32, W = scale · code + offset for inputs of group g (short last group: fine)
//
// Bytes per weight at group size G: 1/2 + 8/G.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbyte {

constexpr int BLOCK_ROWS = 16;
constexpr int OCTET = 8;
constexpr int NIBBLE_INPUT[OCTET] = {0, 4, 1, 5, 2, 6, 3, 7};
// Calls with at most this many activation rows use the kernel whose rows do not influence each other's bits.
constexpr int SMALL_M = 16;
// Their activation rows are taken this many at a time, then what is left.
constexpr int GEMV_TILE = 4;
// Activation rows a product with a 16-bit weight takes at most.
constexpr int HALF_ROWS = 4;

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

// A packed matrix, as the kernels see it.
struct W4View {
    const std::uint32_t* words;
    const float* scales;
    const float* offsets;
    int rows;    // output features
    int cols;    // input features
    int blocks;  // ceil(rows / 16)
    int octets;  // ceil(cols / 8)
    int groups;
    int group_octets;  // group size / 8
};

// Where results go: row m, column n at data + m·stride + n (in elements of `dtype`).
struct Output {
    void* data;
    DType dtype;
    std::size_t stride;
    int cols;
    const float* bias;  // [cols] or null
};

// What a tier provides. Ranges are [begin, end); each call covers all M activation rows.
struct Tier {
    const char* name;
    int gemv_blocks;   // weight blocks `gemv` works on together
    int tile_rows;     // activation rows of a tile in the packed activations of `gemm`
    int panel_blocks;  // weight blocks one unit of `gemm` works on
    // One row of activations [cols] → what gemv takes of it: octet j at x + j·x_stride, and x_sums [groups].
    void (*prepare_row)(const W4View&, const void* source, DType, float* x, int x_stride, float* x_sums);
    // M <= SMALL_M. x: tiles of GEMV_TILE rows, the last one of what is left, each [octets][its rows][8];
    // x_sums: [M][groups].
    void (*gemv)(const W4View&, const float* x, const float* x_sums, int m, const Output&, int block_begin, int block_end);
    // Tile number `tile` of activations [M][cols] whose rows are `stride` elements apart → what gemm takes of it.
    void (*pack_tile)(const W4View&, const void* source, std::size_t stride, DType, int m, int tile, float* x);
    // Any M. x: tiles of [8·octets][tile_rows], zero beyond M and cols.
    void (*gemm)(const W4View&, const float* x, int m, const Output&, int panel_begin, int panel_end);
    // M <= HALF_ROWS, weight [..][cols] in bf16 or f16; x: [M][x_stride] float32, zero from cols to a multiple of 64.
    void (*half_multiply)(const void* weight, DType, int cols, const float* x, std::size_t x_stride, int m, const Output&,
                          int row_begin, int row_end);
    // For the rooflines: read n bytes (a multiple of 256); run `steps` rounds of independent FMAs, returning their flops.
    float (*read)(const void* data, std::size_t n);
    double (*fma)(std::int64_t steps, float* sink);
};

// Null when this build or this CPU (or its operating system) lacks the tier.
const Tier* portable_tier();
const Tier* avx2_tier();
const Tier* avx512_vnni_tier();

}  // namespace halfbyte
