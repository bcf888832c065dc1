// The W4A16 product y[m, n] = Σ_k x[m, k] · (scale · code[n, k] + offset), written once over a small vector type and
// compiled once per tier. Included by tier_*.cpp only; everything has internal linkage, so no tier's instructions can
// leak into another's translation unit.
//
// The vector type S provides: WIDTH floats in F and as many words in I; load, store, set1, fma, load_words and
// code<n>(words), which gives nibble n of each word as a float 0..15.
//
// gemv (M <= 16). Codes meet activations as small integers and the affine part is applied once a group:
//     acc += scale · Σ_g x·code + offset · Σ_g x.
// Per 8 inputs × 16 rows: one 64-byte line, 8 × (shift, mask, convert) shared by all rows of the tile, 8 FMAs a row.
// Range: |Σ_g x·code| <= 15·G·max|x|, so float32 cannot overflow for |x| < 2^118 at G = 32; each group sum carries at
// most G roundings of 2^-24 relative to Σ|x|·15, and the cancellation against offset·Σx costs at most the factor
// (code range / |W| range) ≈ 2: error ≲ G · 2^-23, three decimal digits below bf16's own rounding of x.
// A row of activations is accumulated in the same order whatever M is: its result has the same bits in any company.
//
// gemm (large M). A panel [inputs × 16·blocks] of weights is dequantized to float32 into L1 and multiplied by a
// register-tiled kernel; 2·M·K·N flops at 2 FMAs a cycle. Rounding differs from gemv's (weights are formed first).
#pragma once

#include <cstring>

#include "dtypes.hpp"
#include "w4.hpp"

namespace halfbyte {
namespace {

template <class S>
struct W4Kernel {
    static constexpr int VECTORS = BLOCK_ROWS / S::WIDTH;  // vectors in a weight block
    static constexpr int PANEL_BLOCKS = S::PANEL_BLOCKS;
    static constexpr int TILE_ROWS = S::TILE_ROWS;
    static constexpr int PANEL_VECTORS = PANEL_BLOCKS * VECTORS;
    static constexpr int PANEL_ROWS = PANEL_BLOCKS * BLOCK_ROWS;
    static constexpr int PANEL_OCTETS = 32;  // 256 inputs × 16 or 32 rows × 4 bytes = 16 or 32 KiB: half of L1 or less
    static constexpr int STRIP_ROWS = 96;    // activation rows a dequantized panel is used for: 96 × 256 × 4 = 96 KiB of L2

    using F = typename S::F;
    using I = typename S::I;

    // ---- gemv ---------------------------------------------------------------------------------------------------

    // Nibble N of M activation rows × B weight blocks, then the next one.
    template <int M, int B, int N = 0>
    static inline void nibbles(const I (&words)[B][VECTORS], const float* x, std::size_t x_stride,
                               F (&acc)[M][B][VECTORS]) {
        if constexpr (N < OCTET) {
            for (int b = 0; b < B; ++b)
                for (int v = 0; v < VECTORS; ++v) {
                    const F code = S::template code<N>(words[b][v]);
                    for (int m = 0; m < M; ++m)
                        acc[m][b][v] = S::fma(S::set1(x[m * x_stride + NIBBLE_INPUT[N]]), code, acc[m][b][v]);
                }
            nibbles<M, B, N + 1>(words, x, x_stride, acc);
        }
    }

    // M activation rows from row m0 on × B neighbouring weight blocks.
    template <int M, int B>
    static void gemv_tile(const W4View& w, const float* x, const float* x_sums, int m0, const Output& out, int block) {
        const std::size_t x_stride = static_cast<std::size_t>(w.octets) * OCTET;
        const std::size_t line_stride = static_cast<std::size_t>(w.octets) * BLOCK_ROWS;
        const std::uint32_t* words = w.words + block * line_stride;
        x += m0 * x_stride;
        x_sums += static_cast<std::size_t>(m0) * w.groups;
        F total[M][B][VECTORS];
        for (int m = 0; m < M; ++m)
            for (int b = 0; b < B; ++b)
                for (int v = 0; v < VECTORS; ++v) total[m][b][v] = S::set1(0.0f);

        int octet = 0;
        for (int g = 0; g < w.groups; ++g) {
            const int end = octet + w.group_octets < w.octets ? octet + w.group_octets : w.octets;
            F acc[M][B][VECTORS];
            for (int m = 0; m < M; ++m)
                for (int b = 0; b < B; ++b)
                    for (int v = 0; v < VECTORS; ++v) acc[m][b][v] = S::set1(0.0f);
            for (; octet < end; ++octet) {
                I line[B][VECTORS];
                for (int b = 0; b < B; ++b)
                    for (int v = 0; v < VECTORS; ++v)
                        line[b][v] = S::load_words(words + b * line_stride + octet * BLOCK_ROWS + v * S::WIDTH);
                nibbles<M, B>(line, x + octet * OCTET, x_stride, acc);
            }
            for (int b = 0; b < B; ++b)
                for (int v = 0; v < VECTORS; ++v) {
                    const std::size_t at = (static_cast<std::size_t>(block + b) * w.groups + g) * BLOCK_ROWS + v * S::WIDTH;
                    const F scale = S::load(w.scales + at), offset = S::load(w.offsets + at);
                    for (int m = 0; m < M; ++m) {
                        const F affine = S::fma(offset, S::set1(x_sums[m * w.groups + g]), total[m][b][v]);
                        total[m][b][v] = S::fma(scale, acc[m][b][v], affine);
                    }
                }
        }
        for (int m = 0; m < M; ++m)
            for (int b = 0; b < B; ++b) {
                float values[BLOCK_ROWS];
                for (int v = 0; v < VECTORS; ++v) S::store(values + v * S::WIDTH, total[m][b][v]);
                store_block(out, m0 + m, block + b, values);
            }
    }

    static void gemv(const W4View& w, const float* x, const float* x_sums, int m, const Output& out, int begin, int end) {
        int row = 0;
        for (; row + 4 <= m; row += 4)
            for (int b = begin; b < end; ++b) gemv_tile<4, 1>(w, x, x_sums, row, out, b);
        for (; row + 2 <= m; row += 2)
            for (int b = begin; b < end; ++b) gemv_tile<2, 1>(w, x, x_sums, row, out, b);
        if (row < m) {
            // Two blocks at a time: a single row has too few independent sums to hide the latency of the FMA.
            int b = begin;
            for (; b + 2 <= end; b += 2) gemv_tile<1, 2>(w, x, x_sums, row, out, b);
            if (b < end) gemv_tile<1, 1>(w, x, x_sums, row, out, b);
        }
    }

    // ---- gemm ---------------------------------------------------------------------------------------------------

    template <int N = 0>
    static inline void dequantize_nibbles(I words, F scale, F offset, float* panel) {
        if constexpr (N < OCTET) {
            S::store(panel + NIBBLE_INPUT[N] * PANEL_ROWS, S::fma(scale, S::template code<N>(words), offset));
            dequantize_nibbles<N + 1>(words, scale, offset, panel);
        }
    }

    // Octets [begin, end) of `blocks` weight blocks as float32 [inputs][PANEL_ROWS].
    static void dequantize_panel(const W4View& w, int block, int blocks, int begin, int end, float* panel) {
        for (int b = 0; b < blocks; ++b)
            for (int v = 0; v < VECTORS; ++v) {
                const int lane = b * BLOCK_ROWS + v * S::WIDTH;
                for (int octet = begin; octet < end;) {
                    const int g = octet / w.group_octets;
                    const int stop = (g + 1) * w.group_octets < end ? (g + 1) * w.group_octets : end;
                    const std::size_t at = (static_cast<std::size_t>(block + b) * w.groups + g) * BLOCK_ROWS + v * S::WIDTH;
                    const F scale = S::load(w.scales + at), offset = S::load(w.offsets + at);
                    for (; octet < stop; ++octet) {
                        const std::size_t line = (static_cast<std::size_t>(block + b) * w.octets + octet) * BLOCK_ROWS;
                        dequantize_nibbles(S::load_words(w.words + line + v * S::WIDTH), scale, offset,
                                           panel + (octet - begin) * OCTET * PANEL_ROWS + lane);
                    }
                }
            }
    }

    // One tile: TILE_ROWS activation rows × one panel, `inputs` deep, added to sums [TILE_ROWS][PANEL_ROWS].
    static inline void multiply_tile(const float* x, const float* panel, int inputs, float* sums) {
        F acc[TILE_ROWS][PANEL_VECTORS];
        for (int m = 0; m < TILE_ROWS; ++m)
            for (int v = 0; v < PANEL_VECTORS; ++v) acc[m][v] = S::load(sums + m * PANEL_ROWS + v * S::WIDTH);
        for (int k = 0; k < inputs; ++k) {
            F weight[PANEL_VECTORS];
            for (int v = 0; v < PANEL_VECTORS; ++v) weight[v] = S::load(panel + k * PANEL_ROWS + v * S::WIDTH);
            for (int m = 0; m < TILE_ROWS; ++m) {
                const F a = S::set1(x[k * TILE_ROWS + m]);
                for (int v = 0; v < PANEL_VECTORS; ++v) acc[m][v] = S::fma(a, weight[v], acc[m][v]);
            }
        }
        for (int m = 0; m < TILE_ROWS; ++m)
            for (int v = 0; v < PANEL_VECTORS; ++v) S::store(sums + m * PANEL_ROWS + v * S::WIDTH, acc[m][v]);
    }

    static void gemm(const W4View& w, const float* x, int m, const Output& out, int panel_begin, int panel_end) {
        constexpr int STRIP_TILES = (STRIP_ROWS + TILE_ROWS - 1) / TILE_ROWS;
        alignas(64) float panel[PANEL_OCTETS * OCTET * PANEL_ROWS];
        alignas(64) float sums[STRIP_TILES * TILE_ROWS * PANEL_ROWS];
        const int tiles = (m + TILE_ROWS - 1) / TILE_ROWS;
        const std::size_t tile_stride = static_cast<std::size_t>(w.octets) * OCTET * TILE_ROWS;
        std::memset(panel, 0, sizeof panel);  // a last, narrower panel leaves its other blocks at zero
        for (int p = panel_begin; p < panel_end; ++p) {
            const int block = p * PANEL_BLOCKS;
            const int blocks = w.blocks - block < PANEL_BLOCKS ? w.blocks - block : PANEL_BLOCKS;
            for (int strip = 0; strip < tiles; strip += STRIP_TILES) {
                const int count = tiles - strip < STRIP_TILES ? tiles - strip : STRIP_TILES;
                std::memset(sums, 0, sizeof sums);
                for (int octet = 0; octet < w.octets; octet += PANEL_OCTETS) {
                    const int end = octet + PANEL_OCTETS < w.octets ? octet + PANEL_OCTETS : w.octets;
                    dequantize_panel(w, block, blocks, octet, end, panel);
                    for (int t = 0; t < count; ++t)
                        multiply_tile(x + (strip + t) * tile_stride + static_cast<std::size_t>(octet) * OCTET * TILE_ROWS,
                                      panel, (end - octet) * OCTET, sums + t * TILE_ROWS * PANEL_ROWS);
                }
                const int first = strip * TILE_ROWS;
                for (int r = 0; r < count * TILE_ROWS && first + r < m; ++r)
                    for (int b = 0; b < blocks; ++b)
                        store_block(out, first + r, block + b, sums + r * PANEL_ROWS + b * BLOCK_ROWS);
            }
        }
    }

    // ---- rooflines ----------------------------------------------------------------------------------------------

    static float read(const void* data, std::size_t n) {
        const auto* floats = static_cast<const float*>(data);
        constexpr int LANES = 256 / (4 * S::WIDTH);
        F sums[LANES];
        for (int i = 0; i < LANES; ++i) sums[i] = S::set1(0.0f);
        for (std::size_t at = 0; at + 256 <= n; at += 256)
            for (int i = 0; i < LANES; ++i) sums[i] = S::add(sums[i], S::load(floats + at / 4 + i * S::WIDTH));
        float total = 0.0f, lanes[S::WIDTH];
        for (int i = 0; i < LANES; ++i) {
            S::store(lanes, sums[i]);
            for (float lane : lanes) total += lane;
        }
        return total;
    }

    static double fma(std::int64_t steps, float* sink) {
        constexpr int CHAINS = 12;  // latency 4 × 2 a cycle = 8; a few more cost nothing
        F acc[CHAINS];
        for (int i = 0; i < CHAINS; ++i) acc[i] = S::set1(static_cast<float>(i));
        const F a = S::set1(0.999f), b = S::set1(1e-3f);
        for (std::int64_t step = 0; step < steps; ++step)
            for (int i = 0; i < CHAINS; ++i) acc[i] = S::fma(acc[i], a, b);
        float lanes[S::WIDTH];
        for (int i = 0; i < CHAINS; ++i) {
            S::store(lanes, acc[i]);
            *sink += lanes[0];
        }
        return 2.0 * CHAINS * S::WIDTH * static_cast<double>(steps);
    }

    static constexpr Tier tier(const char* name) { return {name, TILE_ROWS, PANEL_BLOCKS, gemv, gemm, read, fma}; }
};

}  // namespace
}  // namespace halfbyte
