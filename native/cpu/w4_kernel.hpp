// The W4A16 product y[m, n] = Σ_k x[m, k] · (scale · code[n, k] + offset), written once over a small vector type and
// compiled once per tier. Included by tier_*.cpp only; everything has internal linkage, so no tier's instructions can
// leak into another's translation unit. The layout is drawn in w4.hpp.
//
// The vector type S provides: WIDTH floats in F and as many words in I; load, store, set1, add, mul, fma, load_words,
// widen_f16, narrow_f16, and code<n>(words): nibble n of each word as a float, 0..15 divided by INPUT_SCALE of its input,
// a power of two. A tier that leaves the nibble where it stands in the word saves the shift and has INPUT_SCALE = 16^-n;
// the activations are scaled instead, once a call.
//
// gemv (M <= 16). Codes meet activations as small integers and the affine part is applied once a group:
//     acc += scale · Σ_g x·code + offset · Σ_g x.
// Bytes: 1/2 + 8/G a weight, from memory once, whatever M is. Operations: for each 8 or 16 weights, two for the code
// (portable, avx2: mask, convert; avx512: shift, look up) shared by the 1 to 4 rows of the tile, and one FMA a row.
// Range: |Σ_g x·code| <= 15·G·max|x|, so float32 cannot overflow for |x| < 2^112 at G <= 2048. code · 16^n is exact, and
// x · 16^-n is exact for |x| >= 2^-102; below, its error is below 2^-149 · 16^n <= 2^-125 a term.
// Error: one chain of at most G FMAs, then two FMAs a group, each rounding by u = 2^-24:
//     |error| <= (G + 2·groups + 4) · u · Σ|x|·(scale·code + |offset|),
// the classical bound, but on magnitudes before scale·code and offset cancel (for a symmetric grid, three times
// Σ|x|·max|W|). Measured: under 1e-6 of that sum for all shapes of the tests, against 4e-3 for one rounding to bf16.
// An infinite x gives NaN where a code is 0; a NaN stays in its row.
// A row of activations is accumulated in the same order whatever M is: its result has the same bits in any company.
//
// gemm (large M). A panel [256 inputs × 16 rows · PANEL_BLOCKS] of weights is dequantized to float32 into L1 and multiplied
// by a register-tiled kernel: 2·M·K·N flops, and two operations and a store a weight for every 96 rows of activations.
// Rounding differs from gemv's (weights are formed first: one rounding each, then a chain of K FMAs).
#pragma once

#include <cstring>

#include "dtypes.hpp"
#include "half_kernel.hpp"
#include "w4.hpp"

namespace halfbyte {
namespace {

// What to scale input 8j + i by where a tier takes nibble n of a word in place, as code · 16^n. Nibble 7 is the exception:
// in place it would be the sign, so it is shifted down.
constexpr float IN_PLACE_SCALE[OCTET] = {1, 0x1p-8f, 0x1p-16f, 0x1p-24f, 0x1p-4f, 0x1p-12f, 0x1p-20f, 1};

template <class S>
struct W4Kernel {
    static constexpr int VECTORS = BLOCK_ROWS / S::WIDTH;  // vectors in a weight block
    static constexpr int PANEL_BLOCKS = S::PANEL_BLOCKS;
    static constexpr int TILE_ROWS = S::TILE_ROWS;
    static constexpr int PANEL_VECTORS = PANEL_BLOCKS * VECTORS;
    static constexpr int PANEL_ROWS = PANEL_BLOCKS * BLOCK_ROWS;
    static constexpr int PANEL_OCTETS = 32;  // 256 inputs × 16 or 32 rows × 4 bytes = 16 or 32 KiB: half of L1 or less
    static constexpr int STRIP_ROWS = 96;    // activation rows a dequantized panel is used for: 96 × 256 × 4 = 96 KiB of L2
    static constexpr int PANELS = 4;  // panels those 96 KiB are used for before the next ones are fetched

    using F = typename S::F;
    using I = typename S::I;

    // ---- gemv ---------------------------------------------------------------------------------------------------

    // What one vector of output rows reads: its lanes of every line, scale and offset of a block.
    struct Lanes {
        const std::uint32_t* words;
        const float* scales;
        const float* offsets;
    };

    static inline Lanes lanes_of(const W4View& w, int vector) {
        const std::size_t block = vector / VECTORS;
        const int lane = vector % VECTORS * S::WIDTH;
        const std::size_t at = block * w.groups * BLOCK_ROWS + lane;
        return {w.words + block * w.octets * BLOCK_ROWS + lane, w.scales + at, w.offsets + at};
    }

    // Nibble N of V vectors of words, times its input in M activation rows; then the next nibble.
    // x: [M][OCTET], so that every address is a register and a constant.
    template <int M, int V, int N = 0>
    static inline void nibbles(const I (&words)[V], const float* x, F (&acc)[M][V]) {
        if constexpr (N < OCTET) {
            F code[V];
            for (int v = 0; v < V; ++v) code[v] = S::template code<N>(words[v]);
            for (int m = 0; m < M; ++m) {
                const F value = S::set1(x[m * OCTET + NIBBLE_INPUT[N]]);
                for (int v = 0; v < V; ++v) acc[m][v] = S::fma(value, code[v], acc[m][v]);
            }
            nibbles<M, V, N + 1>(words, x, acc);
        }
    }

    // M activation rows from row m0 on × V neighbouring vectors of output rows, into values [M][V · WIDTH].
    template <int M, int V>
    // Kept out of line: inlined side by side, GCC 12 moves the accumulators of one tile to the stack (47 against 84 GFLOP/s).
    __attribute__((noinline)) static void gemv_tile(const W4View& w, const float* x, const float* x_sums, int m0,
                                                    int vector, float* values) {
        x += static_cast<std::size_t>(m0) * w.octets * OCTET;
        x_sums += static_cast<std::size_t>(m0) * w.groups;
        constexpr int NEXT = (V + VECTORS - 1) / VECTORS;
        Lanes lanes[V];
        F total[M][V];
        for (int v = 0; v < V; ++v) lanes[v] = lanes_of(w, vector + v);
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) total[m][v] = S::set1(0.0f);

        int octet = 0;
        for (int g = 0; g < w.groups; ++g) {
            const int end = octet + w.group_octets < w.octets ? octet + w.group_octets : w.octets;
            F acc[M][V];
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < V; ++v) acc[m][v] = S::set1(0.0f);
            for (; octet < end; ++octet) {
                I words[V];
                for (int v = 0; v < V; ++v) words[v] = S::load_words(lanes[v].words + octet * BLOCK_ROWS);
                // The blocks after these, into L2: a block is about a page, too short for the hardware to catch up.
                for (int v = 0; v < V; v += VECTORS)
                    __builtin_prefetch(lanes[v].words + (octet + NEXT * w.octets) * BLOCK_ROWS, 0, 2);
                nibbles<M, V>(words, x + octet * (M * OCTET), acc);
            }
            for (int v = 0; v < V; ++v) {
                const F scale = S::load(lanes[v].scales + g * BLOCK_ROWS);
                const F offset = S::load(lanes[v].offsets + g * BLOCK_ROWS);
                for (int m = 0; m < M; ++m) {
                    const F affine = S::fma(offset, S::set1(x_sums[m * w.groups + g]), total[m][v]);
                    total[m][v] = S::fma(scale, acc[m][v], affine);
                }
            }
        }
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) S::store(values + (m * V + v) * S::WIDTH, total[m][v]);
    }

    // M activation rows × vectors [vector, end) of whole blocks: V at a time, then a block fewer.
    template <int M, int V>
    static void gemv_rows(const W4View& w, const float* x, const float* x_sums, int m0, const Output& out, int vector,
                          int end) {
        for (; vector + V <= end; vector += V) {
            alignas(64) float values[M * V * S::WIDTH];
            gemv_tile<M, V>(w, x, x_sums, m0, vector, values);
            for (int m = 0; m < M; ++m)
                store_run<S>(out, m0 + m, vector * S::WIDTH, values + m * V * S::WIDTH, V * S::WIDTH);
        }
        static_assert(V > VECTORS || VECTORS % V == 0, "vectors would be left over");
        if constexpr (V > VECTORS) gemv_rows<M, V - VECTORS>(w, x, x_sums, m0, out, vector, end);
    }

    // Each of the M · V sums of a tile is one chain of FMAs, so that a row's bits do not depend on the tile; S chooses V
    // for enough chains to hide the latency and few enough to stay in registers.
    static void gemv(const W4View& w, const float* x, const float* x_sums, int m, const Output& out, int begin, int end) {
        // If there are several tiles of rows, a few blocks stay in L1 while all of them pass.
        const int strip = m > GEMV_TILE ? S::GEMV_BLOCKS : end - begin;
        for (int block = begin; block < end; block += strip) {
            const int vector = block * VECTORS, vector_end = (block + strip < end ? block + strip : end) * VECTORS;
            int row = 0;
            for (; row + 4 <= m; row += 4) gemv_rows<4, S::GEMV_VECTORS_4>(w, x, x_sums, row, out, vector, vector_end);
            if (m - row == 3) gemv_rows<3, S::GEMV_VECTORS_4>(w, x, x_sums, row, out, vector, vector_end);
            if (m - row == 2) gemv_rows<2, S::GEMV_VECTORS_2>(w, x, x_sums, row, out, vector, vector_end);
            if (m - row == 1) gemv_rows<1, S::GEMV_VECTORS_1>(w, x, x_sums, row, out, vector, vector_end);
        }
    }

    // One activation row as `gemv` wants it: float32, zero beyond the matrix, scaled, with the sums of its groups.
    static void prepare_row(const W4View& w, const void* source, DType dtype, float* x, int x_stride, float* x_sums) {
        for (int g = 0, octet = 0; g < w.groups; ++g) {
            const int end = octet + w.group_octets < w.octets ? octet + w.group_octets : w.octets;
            float part[OCTET] = {};
            for (; octet < end; ++octet) {
                float values[OCTET] = {};
                const int left = w.cols - octet * OCTET;
                widen<S>(element(source, dtype, static_cast<std::size_t>(octet) * OCTET), dtype, values,
                         left < OCTET ? left : OCTET);
                for (int i = 0; i < OCTET; ++i) {
                    part[i] += values[i];
                    x[static_cast<std::size_t>(octet) * x_stride + i] = values[i] * S::INPUT_SCALE[i];
                }
            }
            x_sums[g] = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
        }
    }

    // ---- gemm ---------------------------------------------------------------------------------------------------

    template <int N = 0>
    static inline void dequantize_nibbles(I words, F scale, F offset, float* panel) {
        if constexpr (N < OCTET) {
            const F unit = S::mul(scale, S::set1(S::INPUT_SCALE[NIBBLE_INPUT[N]]));
            S::store(panel + NIBBLE_INPUT[N] * PANEL_ROWS, S::fma(unit, S::template code<N>(words), offset));
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
    __attribute__((noinline)) static void multiply_tile(const float* x, const float* panel, int inputs, float* sums) {
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

    // Tile `tile` of the activations as `gemm` wants them: [inputs][TILE_ROWS], zero beyond M and the matrix.
    static void pack_tile(const W4View& w, const void* source, std::size_t stride, DType dtype, int m, int tile,
                          float* target) {
        constexpr int CHUNK = 64;
        const int rows = m - tile * TILE_ROWS < TILE_ROWS ? m - tile * TILE_ROWS : TILE_ROWS;
        const int inputs = w.octets * OCTET;
        alignas(64) float row[TILE_ROWS][CHUNK] = {};
        for (int k = 0; k < inputs; k += CHUNK) {
            const int count = w.cols - k < CHUNK ? w.cols - k : CHUNK, padded = inputs - k < CHUNK ? inputs - k : CHUNK;
            for (int r = 0; r < rows; ++r) {
                const std::size_t at = (static_cast<std::size_t>(tile) * TILE_ROWS + r) * stride + k;
                widen<S>(element(source, dtype, at), dtype, row[r], count);
                for (int i = count; i < padded; ++i) row[r][i] = 0.0f;
            }
            for (int i = 0; i < padded; ++i)
                for (int r = 0; r < TILE_ROWS; ++r) target[static_cast<std::size_t>(k + i) * TILE_ROWS + r] = row[r][i];
        }
    }

    static void gemm(const W4View& w, const float* x, int m, const Output& out, int panel_begin, int panel_end) {
        constexpr int STRIP_TILES = (STRIP_ROWS + TILE_ROWS - 1) / TILE_ROWS;
        alignas(64) float panel[PANEL_OCTETS * OCTET * PANEL_ROWS];
        alignas(64) float sums[PANELS][STRIP_TILES * TILE_ROWS * PANEL_ROWS];
        const int tiles = (m + TILE_ROWS - 1) / TILE_ROWS;
        const std::size_t tile_stride = static_cast<std::size_t>(w.octets) * OCTET * TILE_ROWS;
        std::memset(panel, 0, sizeof panel);  // a last, narrower panel leaves its other blocks at zero
        for (int first = panel_begin; first < panel_end; first += PANELS) {
            const int panels = panel_end - first < PANELS ? panel_end - first : PANELS;
            for (int strip = 0; strip < tiles; strip += STRIP_TILES) {
                const int count = tiles - strip < STRIP_TILES ? tiles - strip : STRIP_TILES;
                std::memset(sums, 0, sizeof sums);
                for (int octet = 0; octet < w.octets; octet += PANEL_OCTETS) {
                    const int end = octet + PANEL_OCTETS < w.octets ? octet + PANEL_OCTETS : w.octets;
                    for (int p = 0; p < panels; ++p) {
                        const int block = (first + p) * PANEL_BLOCKS;
                        const int blocks = w.blocks - block < PANEL_BLOCKS ? w.blocks - block : PANEL_BLOCKS;
                        dequantize_panel(w, block, blocks, octet, end, panel);
                        for (int t = 0; t < count; ++t)
                            multiply_tile(
                                x + (strip + t) * tile_stride + static_cast<std::size_t>(octet) * OCTET * TILE_ROWS, panel,
                                (end - octet) * OCTET, sums[p] + t * TILE_ROWS * PANEL_ROWS);
                    }
                }
                for (int p = 0; p < panels; ++p)
                    for (int r = 0; r < count * TILE_ROWS && strip * TILE_ROWS + r < m; ++r)
                        store_run<S>(out, strip * TILE_ROWS + r, (first + p) * PANEL_ROWS,
                                     sums[p] + r * PANEL_ROWS, PANEL_ROWS);
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

    static constexpr Tier tier(const char* name) {
        return {name,      S::GEMV_BLOCKS, TILE_ROWS, PANEL_BLOCKS,           prepare_row, gemv,
                pack_tile, gemm,           HalfKernel<S>::multiply,           read,        fma};
    }
};

}  // namespace
}  // namespace halfbyte
