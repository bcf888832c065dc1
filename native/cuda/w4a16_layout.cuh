// Where a weight is. W [N, K] is cut into tiles of 64 rows × 64 columns, 2048 bytes each; the tiles of 64 rows, a
// strip, follow each other along K, and the strips along N:
//
//     weights  [N/64 strips][K/64 tiles][4 subtiles of 16 rows][32 lanes][4 words]     uint32
//
// A lane reads 16 bytes, its 32 codes of a subtile, and they are what the lane has to hold as operand A of four
// mma.m16n8k16. With g = lane / 4 and t = lane % 4, word s = 2h + e (h: half of the tile's columns, e: half of the
// half) holds
//
//     bits      0..3   4..7   8..11  12..15  16..19  20..23  24..27  28..31
//     row        g     g+8     g      g+8      g      g+8      g      g+8      of the subtile
//     column    c+0    c+0    c+2     c+2     c+1     c+1     c+3     c+3      with c = 32h + 8t + 4e
//
// so that word & 0x000F000F is the pair of codes for register a0, and the other three are a shift or another mask away.
//
// Which columns of W an mma takes for its k = 0..15 is free, as long as x is taken in the same order. Here a lane's
// columns are eight neighbours per half, so it loads its part of x, operand B, in 16 bytes, too, and no ldmatrix is
// needed:
//
//     k of the mma    2t   2t+1   2t+8   2t+9      is column      c   c+1   c+2   c+3
//
// Scales and zero points stand in the order the lanes need them; group j of a row are its columns [j·group_size, ...):
//
//     scales   [strips][groups][4 subtiles][8 g]    uint32: fp16 of row g, and above it of row g+8, each divided by row_scale
//     zeros    [strips][groups][8 g]                uint32: nibble j is that of row 16j + g, nibble 4+j that of row 16j + g+8
//     row_scale [N]                                 fp32, a power of two, so that a row's scales are at most 1 and at least 1/2
#pragma once

#include "machine.cuh"

namespace halfbyte {

constexpr int TILE = 64;                             // rows and columns
constexpr int SUBTILE_ROWS = 16, SUBTILES = 4;       // in a tile
constexpr int LANE_BYTES = 16, LANES = 32;           // what a lane reads of a subtile
constexpr int SUBTILE_BYTES = LANES * LANE_BYTES;    // 512
constexpr int TILE_BYTES = SUBTILES * SUBTILE_BYTES;  // 2048
constexpr int STEPS = 4;                             // of k = 16 in a tile, a word of a lane each
constexpr int SCALE_WORDS = SUBTILES * 8, ZERO_WORDS = 8;  // of a strip and group
constexpr int X_ROW_BYTES = 2 * TILE, X_CHUNKS = X_ROW_BYTES / 16;  // of a row of x in a tile

// Bytes from the first weight to the tile.
DEVICE long long tile_offset(int strip, int tile, int tiles) {
    return (static_cast<long long>(strip) * tiles + tile) * TILE_BYTES;
}
// Bytes from the start of a tile to a lane's words.
DEVICE int lane_offset(int subtile, int lane) { return subtile * SUBTILE_BYTES + lane * LANE_BYTES; }

// Words from the first of an array to those of a strip and group.
DEVICE long long group_offset(int strip, int group, int groups, int words) {
    return (static_cast<long long>(strip) * groups + group) * words;
}
// The chunk of 16 bytes of a row of x, within a tile, that a lane takes for a half.
DEVICE int x_chunk(int half, int lane) { return 4 * half + lane % 4; }

// In shared memory a row of x takes 128 bytes, all 32 banks. Eight lanes read at a time, from two rows four chunks
// each: odd rows have their halves exchanged, so that the eight chunks are in different banks.
DEVICE int x_offset(int row, int chunk) { return row * X_ROW_BYTES + 16 * (chunk ^ (row % 2 * 4)); }

}  // namespace halfbyte
