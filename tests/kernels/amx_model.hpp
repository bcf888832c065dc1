// A scalar model of the tile intrinsics the amx tier uses, each written from its documented operation, over the model of AVX-512.
// What the CPU would refuse (no configuration, shapes that do not meet) ends the program. See test_modelled_tiers.py.
#pragma once

#include "avx512_model.hpp"

inline void _mm512_store_si512(void* p, __m512i v) {
    if (reinterpret_cast<std::uintptr_t>(p) % 64 != 0) __builtin_trap();
    std::memcpy(p, &v, 64);
}
inline __m512i _mm512_sub_epi8(__m512i a, __m512i b) {
    return model_lanes<__m512i>([&](int i) {
        std::uint32_t lane = 0;
        for (int shift = 0; shift < 32; shift += 8)
            lane |= (((a.lane[i] >> shift) - (b.lane[i] >> shift)) & 255u) << shift;
        return lane;
    });
}

struct TileModel {
    bool configured = false;
    int row_bytes[8], rows[8];
    std::uint8_t data[8][16][64];
    static inline std::int64_t products = 0;  // of all threads: there is one
};

inline TileModel& tile_model() {
    static thread_local TileModel model;
    return model;
}
inline void tile_require(bool holds) {
    if (!holds) __builtin_trap();
}
inline TileModel& tile_used(int tile) {
    TileModel& model = tile_model();
    tile_require(model.configured && model.rows[tile] > 0 && model.row_bytes[tile] > 0);
    return model;
}

// Clears all tiles.
inline void _tile_loadconfig(const void* config) {
    std::uint8_t bytes[64];
    std::memcpy(bytes, config, sizeof bytes);
    tile_require(bytes[0] == 1 && bytes[1] == 0);
    for (int i = 2; i < 16; ++i) tile_require(bytes[i] == 0);
    TileModel& model = tile_model();
    std::memset(model.data, 0, sizeof model.data);
    for (int tile = 0; tile < 16; ++tile) {
        const int row_bytes = bytes[16 + 2 * tile] | bytes[17 + 2 * tile] << 8, rows = bytes[48 + tile];
        tile_require(tile < 8 ? row_bytes <= 64 && rows <= 16 : row_bytes == 0 && rows == 0);
        if (tile < 8) model.row_bytes[tile] = row_bytes, model.rows[tile] = rows;
    }
    model.configured = true;
}
inline void _tile_release() { tile_model().configured = false; }
inline void _tile_zero(int tile) { std::memset(tile_used(tile).data[tile], 0, sizeof(TileModel::data[tile])); }
// Bytes beyond the configured shape become zero.
inline void _tile_loadd(int tile, const void* base, std::size_t stride) {
    TileModel& model = tile_used(tile);
    std::memset(model.data[tile], 0, sizeof model.data[tile]);
    for (int row = 0; row < model.rows[tile]; ++row)
        std::memcpy(model.data[tile][row], static_cast<const std::uint8_t*>(base) + row * stride, model.row_bytes[tile]);
}
inline void _tile_stored(int tile, void* base, std::size_t stride) {
    const TileModel& model = tile_used(tile);
    for (int row = 0; row < model.rows[tile]; ++row)
        std::memcpy(static_cast<std::uint8_t*>(base) + row * stride, model.data[tile][row], model.row_bytes[tile]);
}
inline TileModel& tile_shapes_meet(int sums, int a, int b) {
    TileModel& model = tile_used(sums);
    tile_used(a), tile_used(b);
    tile_require(sums != a && sums != b && a != b);
    tile_require(model.rows[a] == model.rows[sums] && model.row_bytes[b] == model.row_bytes[sums]);
    tile_require(model.row_bytes[a] == 4 * model.rows[b]);
    return model;
}
// Four products of signed bytes of a row of a and of a column of b, added to each 32-bit sum.
inline void _tile_dpbssd(int sums, int a, int b) {
    TileModel& model = tile_shapes_meet(sums, a, b);
    for (int m = 0; m < model.rows[sums]; ++m)
        for (int n = 0; n < model.row_bytes[sums] / 4; ++n) {
            std::int32_t sum;
            std::memcpy(&sum, &model.data[sums][m][4 * n], sizeof sum);
            for (int k = 0; k < model.row_bytes[a]; ++k)
                sum += static_cast<std::int8_t>(model.data[a][m][k]) *
                       static_cast<std::int8_t>(model.data[b][k / 4][4 * n + k % 4]);
            std::memcpy(&model.data[sums][m][4 * n], &sum, sizeof sum);
        }
    ++TileModel::products;
}
// Likewise two products of bf16 numbers, added to each float.
inline void _tile_dpbf16ps(int sums, int a, int b) {
    TileModel& model = tile_shapes_meet(sums, a, b);
    const auto half = [&](int tile, int row, int at) {
        std::uint16_t bits;
        std::memcpy(&bits, &model.data[tile][row][2 * at], sizeof bits);
        return halfbyte::from_bf16(bits);
    };
    for (int m = 0; m < model.rows[sums]; ++m)
        for (int n = 0; n < model.row_bytes[sums] / 4; ++n) {
            float sum;
            std::memcpy(&sum, &model.data[sums][m][4 * n], sizeof sum);
            for (int k = 0; k < model.row_bytes[a] / 2; ++k) sum += half(a, m, k) * half(b, k / 2, 2 * n + k % 2);
            std::memcpy(&model.data[sums][m][4 * n], &sum, sizeof sum);
        }
}
