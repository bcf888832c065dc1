// The product y[m, n] = Σ_k x[m, k] · (scale · code[n, k] + offset), written once over a small vector type and the width of
// a code, 4 or 8 bits, and compiled once per tier. Included by tier.hpp only; everything has internal linkage, so no tier's
// instructions can leak into another's translation unit. The layout is drawn in w4.hpp.
//
// The vector type S provides: WIDTH floats in F and as many words in I; load, store, set1, add, mul, fma, load_words,
// widen_f16, narrow_f16, and nibble<n>(words), byte<n>(words): code n of each word as a float, divided by NIBBLE_SCALE or
// BYTE_SCALE of its input, a power of two. A tier that leaves the code where it stands in the word saves the shift and has
// the scales 16^-n and 256^-n; the activations are scaled instead, once a call.
//
// gemv (M <= 16). Codes meet activations as small integers and the affine part is applied once a group:
//     acc += scale · Σ_g x·code + offset · Σ_g x.
// Kept inputs come last, as one more chain: acc += weight · x.
// Bytes: 1/2 or 1, + 8/G a weight, from memory once, whatever M is. Operations: for each 8 or 16 weights, two for the code
// (mask, convert; nibbles on avx512: shift, look up) shared by the 1 to 4 rows of the tile, and one FMA a row.
// Range: |Σ_g x·code| <= 255·G·max|x|, so float32 cannot overflow for |x| < 2^108 at G <= 2048. code · 16^n is exact, and
// x · 16^-n is exact for |x| >= 2^-102; below, its error is below 2^-149 · 16^n <= 2^-125 a term.
// Error: one chain of at most G FMAs, then two FMAs a group and one a kept input, each rounding by u = 2^-24:
//     |error| <= (G + 2·groups + kept + 4) · u · Σ|x|·(scale·code + |offset|),
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
#include "w4.hpp"

namespace halfbyte {
namespace {

// What to scale input 8j + i by where a tier takes nibble n of a word in place, as code · 16^n, or byte n, as code · 256^n.
// The last of a word is the exception: in place it would hold the sign, so it is shifted down.
constexpr float IN_PLACE_NIBBLE[OCTET] = {1, 0x1p-8f, 0x1p-16f, 0x1p-24f, 0x1p-4f, 0x1p-12f, 0x1p-20f, 1};
constexpr float IN_PLACE_BYTE[OCTET] = {1, 0x1p-8f, 0x1p-16f, 1, 1, 0x1p-8f, 0x1p-16f, 1};

template <class S, int BITS>
struct W4Kernel {
    static constexpr int CODES = 32 / BITS;      // in a word
    static constexpr int LINES = OCTET / CODES;  // of 16 words, in an octet of a block
    static constexpr const int (&INPUT)[OCTET] = BITS == 4 ? NIBBLE_INPUT : BYTE_INPUT;
    static constexpr const float (&INPUT_SCALE)[OCTET] = BITS == 4 ? S::NIBBLE_SCALE : S::BYTE_SCALE;
    static constexpr int VECTORS = BLOCK_ROWS / S::WIDTH;  // vectors in a weight block
    static constexpr int PANEL_BLOCKS = S::PANEL_BLOCKS;
    static constexpr int TILE_ROWS = S::TILE_ROWS;
    static constexpr int PANEL_VECTORS = PANEL_BLOCKS * VECTORS;
    static constexpr int PANEL_ROWS = PANEL_BLOCKS * BLOCK_ROWS;
    static constexpr int PANEL_INPUTS = 256;  // × 16 or 32 rows × 4 bytes = 16 or 32 KiB: half of L1 or less
    static constexpr int STRIP_ROWS = 96;    // activation rows a dequantized panel is used for: 96 × 256 × 4 = 96 KiB of L2
    static constexpr int STRIP_TILES = (STRIP_ROWS + TILE_ROWS - 1) / TILE_ROWS;
    static constexpr int PANELS = 4;  // panels those 96 KiB are used for before the next ones are fetched

    using F = typename S::F;
    using I = typename S::I;

    // Code N of an octet, from line N / CODES of it, as a float divided by the scale of its input.
    template <int N>
    static inline F code(I line) {
        if constexpr (BITS == 4)
            return S::template nibble<N>(line);
        else
            return S::template byte<N % CODES>(line);
    }

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
        return {w.words + block * w.octets * (LINES * BLOCK_ROWS) + lane, w.scales + at, w.offsets + at};
    }

    // Codes N to END of an octet, in V vectors of words, times their inputs in M activation rows.
    // x: [M][OCTET], so that every address is a register and a constant.
    template <int M, int V, int N, int END>
    static inline void codes(const I (&words)[V], const float* x, F (&acc)[M][V]) {
        if constexpr (N < END) {
            F factor[V];
            for (int v = 0; v < V; ++v) factor[v] = code<N>(words[v]);
            for (int m = 0; m < M; ++m) {
                const F value = S::set1(x[m * OCTET + INPUT[N]]);
                for (int v = 0; v < V; ++v) acc[m][v] = S::fma(value, factor[v], acc[m][v]);
            }
            codes<M, V, N + 1, END>(words, x, acc);
        }
    }

    // One octet, from its line L on.
    template <int M, int V, int L = 0>
    static inline void lines(const Lanes (&lanes)[V], int octet, const float* x, F (&acc)[M][V]) {
        if constexpr (L < LINES) {
            I words[V];
            for (int v = 0; v < V; ++v) words[v] = S::load_words(lanes[v].words + (octet * LINES + L) * BLOCK_ROWS);
            codes<M, V, L * CODES, (L + 1) * CODES>(words, x, acc);
            lines<M, V, L + 1>(lanes, octet, x, acc);
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
            const int end = w.group_ends[g];
            F acc[M][V];
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < V; ++v) acc[m][v] = S::set1(0.0f);
            for (; octet < end; ++octet) {
                // The blocks after these, into L2: a block is about a page, too short for the hardware to catch up.
                for (int v = 0; v < V; v += VECTORS)
                    for (int line = 0; line < LINES; ++line)
                        __builtin_prefetch(lanes[v].words + ((octet + NEXT * w.octets) * LINES + line) * BLOCK_ROWS, 0, 2);
                lines<M, V>(lanes, octet, x + octet * (M * OCTET), acc);
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

    template <bool BF16>
    static inline F load_half(const std::uint16_t* p) {
        if constexpr (BF16)
            return S::load_bf16(p);
        else
            return S::load_f16(p);
    }

    // Adds the kept inputs to the values of `gemv_tile`: a function of its own, so that the tile keeps its registers.
    template <int M, int V, bool BF16>
    __attribute__((noinline)) static void add_kept(const W4View& w, const float* x_kept, int m0, int vector, float* values) {
        x_kept += static_cast<std::size_t>(m0) * w.cols;
        const std::uint16_t* kept[V];
        F total[M][V];
        for (int v = 0; v < V; ++v) {
            const std::size_t block = (vector + v) / VECTORS;
            kept[v] = w.kept + block * w.kept_cols * BLOCK_ROWS + (vector + v) % VECTORS * S::WIDTH;
        }
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) total[m][v] = S::load(values + (m * V + v) * S::WIDTH);
        for (int j = 0; j < w.kept_cols; ++j) {
            F weight[V];
            for (int v = 0; v < V; ++v) weight[v] = load_half<BF16>(kept[v] + static_cast<std::size_t>(j) * BLOCK_ROWS);
            for (int m = 0; m < M; ++m) {
                const F value = S::set1(x_kept[static_cast<std::size_t>(m) * w.cols + j]);
                for (int v = 0; v < V; ++v) total[m][v] = S::fma(value, weight[v], total[m][v]);
            }
        }
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) S::store(values + (m * V + v) * S::WIDTH, total[m][v]);
    }

    // What `gemv` takes of the activations.
    struct Activations {
        const float* x;
        const float* sums;
        const float* kept;
    };

    // M activation rows × vectors [vector, end) of whole blocks: V at a time, then a block fewer.
    template <int M, int V>
    static void gemv_rows(const W4View& w, const Activations& a, int m0, const Output& out, int vector, int end) {
        for (; vector + V <= end; vector += V) {
            alignas(64) float values[M * V * S::WIDTH];
            gemv_tile<M, V>(w, a.x, a.sums, m0, vector, values);
            if (w.kept_cols != 0 && w.kept_dtype == DType::bf16) add_kept<M, V, true>(w, a.kept, m0, vector, values);
            if (w.kept_cols != 0 && w.kept_dtype == DType::f16) add_kept<M, V, false>(w, a.kept, m0, vector, values);
            for (int m = 0; m < M; ++m)
                store_run<S>(out, m0 + m, vector * S::WIDTH, values + m * V * S::WIDTH, V * S::WIDTH);
        }
        static_assert(V > VECTORS || VECTORS % V == 0, "vectors would be left over");
        if constexpr (V > VECTORS) gemv_rows<M, V - VECTORS>(w, a, m0, out, vector, end);
    }

    // Each of the M · V sums of a tile is one chain of FMAs, so that a row's bits do not depend on the tile; S chooses V
    // for enough chains to hide the latency and few enough to stay in registers.
    static void gemv(const W4View& w, const float* x, const float* x_sums, const float* x_kept, int m, const Output& out,
                     int begin, int end) {
        const Activations a{x, x_sums, x_kept};
        // If there are several tiles of rows, a few blocks stay in L1 while all of them pass.
        const int strip = m > GEMV_TILE ? S::GEMV_BLOCKS : end - begin;
        for (int block = begin; block < end; block += strip) {
            const int vector = block * VECTORS, vector_end = (block + strip < end ? block + strip : end) * VECTORS;
            int row = 0;
            for (; row + 4 <= m; row += 4) gemv_rows<4, S::GEMV_VECTORS_4>(w, a, row, out, vector, vector_end);
            if (m - row == 3) gemv_rows<3, S::GEMV_VECTORS_4>(w, a, row, out, vector, vector_end);
            if (m - row == 2) gemv_rows<2, S::GEMV_VECTORS_2>(w, a, row, out, vector, vector_end);
            if (m - row == 1) gemv_rows<1, S::GEMV_VECTORS_1>(w, a, row, out, vector, vector_end);
        }
    }

    // One activation row as `gemv` wants it: float32, zero beyond the matrix, scaled, with the sums of its groups.
    static void prepare_row(const W4View& w, const void* source, DType dtype, float* x, int x_stride, float* x_sums) {
        for (int g = 0, octet = 0; g < w.groups; ++g) {
            const int end = w.group_ends[g];
            float part[OCTET] = {};
            for (; octet < end; ++octet) {
                float values[OCTET] = {};
                const int left = w.cols - octet * OCTET;
                widen<S>(element(source, dtype, static_cast<std::size_t>(octet) * OCTET), dtype, values,
                         left < OCTET ? left : OCTET);
                for (int i = 0; i < OCTET; ++i) {
                    part[i] += values[i];
                    x[static_cast<std::size_t>(octet) * x_stride + i] = values[i] * INPUT_SCALE[i];
                }
            }
            x_sums[g] = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
        }
    }

    // ---- gemm ---------------------------------------------------------------------------------------------------

    // One vector of rows of an octet, from code N on, as float32 [OCTET][PANEL_ROWS].
    template <int N = 0>
    static inline void dequantize_octet(const std::uint32_t* words, F scale, F offset, float* panel) {
        if constexpr (N < OCTET) {
            const F unit = S::mul(scale, S::set1(INPUT_SCALE[INPUT[N]]));
            const I line = S::load_words(words + N / CODES * BLOCK_ROWS);
            S::store(panel + INPUT[N] * PANEL_ROWS, S::fma(unit, code<N>(line), offset));
            dequantize_octet<N + 1>(words, scale, offset, panel);
        }
    }

    // Octets [begin, end) of `blocks` weight blocks as float32 [inputs][PANEL_ROWS]; octet `begin` is of group `group`.
    static void dequantize_panel(const W4View& w, int block, int blocks, int begin, int end, int group, float* panel) {
        for (int b = 0; b < blocks; ++b)
            for (int v = 0; v < VECTORS; ++v) {
                const int lane = b * BLOCK_ROWS + v * S::WIDTH;
                for (int octet = begin, g = group; octet < end; ++g) {
                    const int stop = w.group_ends[g] < end ? w.group_ends[g] : end;
                    const std::size_t at = (static_cast<std::size_t>(block + b) * w.groups + g) * BLOCK_ROWS + v * S::WIDTH;
                    const F scale = S::load(w.scales + at), offset = S::load(w.offsets + at);
                    for (; octet < stop; ++octet) {
                        const std::size_t line = (static_cast<std::size_t>(block + b) * w.octets + octet) * LINES;
                        dequantize_octet(w.words + line * BLOCK_ROWS + v * S::WIDTH, scale, offset,
                                         panel + (octet - begin) * OCTET * PANEL_ROWS + lane);
                    }
                }
            }
    }

    // Kept inputs [begin, end) likewise.
    static void widen_panel(const W4View& w, int block, int blocks, int begin, int end, float* panel) {
        for (int b = 0; b < blocks; ++b) {
            const std::uint16_t* kept = w.kept + static_cast<std::size_t>(block + b) * w.kept_cols * BLOCK_ROWS;
            for (int j = begin; j < end; ++j)
                for (int lane = 0; lane < BLOCK_ROWS; lane += S::WIDTH) {
                    const std::uint16_t* at = kept + static_cast<std::size_t>(j) * BLOCK_ROWS + lane;
                    S::store(panel + (j - begin) * PANEL_ROWS + b * BLOCK_ROWS + lane,
                             w.kept_dtype == DType::bf16 ? S::load_bf16(at) : S::load_f16(at));
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
        const int inputs = w.octets * OCTET + w.kept_cols;
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

    // Adds panels [first, first + panels) × tiles [strip, strip + count), over all inputs, to zeroed sums.
    static void sum_strip(const W4View& w, const float* x, int first, int panels, int strip, int count,
                          float (*sums)[STRIP_TILES * TILE_ROWS * PANEL_ROWS]) {
        alignas(64) float panel[PANEL_INPUTS * PANEL_ROWS];
        std::memset(panel, 0, sizeof panel);  // a last, narrower panel leaves its other blocks at zero
        const int coded = w.octets * OCTET, inputs = coded + w.kept_cols;
        for (int k = 0, group = 0, end; k < inputs; k = end) {
            const int limit = k < coded ? coded : inputs;  // kept inputs have panels of their own
            end = k + PANEL_INPUTS < limit ? k + PANEL_INPUTS : limit;
            while (k < coded && w.group_ends[group] <= k / OCTET) ++group;
            for (int p = 0; p < panels; ++p) {
                const int block = (first + p) * PANEL_BLOCKS;
                const int blocks = w.blocks - block < PANEL_BLOCKS ? w.blocks - block : PANEL_BLOCKS;
                if (k < coded)
                    dequantize_panel(w, block, blocks, k / OCTET, end / OCTET, group, panel);
                else
                    widen_panel(w, block, blocks, k - coded, end - coded, panel);
                for (int t = 0; t < count; ++t)
                    multiply_tile(x + (static_cast<std::size_t>(strip + t) * inputs + k) * TILE_ROWS, panel, end - k,
                                  sums[p] + t * TILE_ROWS * PANEL_ROWS);
            }
        }
    }

    static void gemm(const W4View& w, const float* x, int m, const Output& out, int panel_begin, int panel_end) {
        alignas(64) float sums[PANELS][STRIP_TILES * TILE_ROWS * PANEL_ROWS];
        const int tiles = (m + TILE_ROWS - 1) / TILE_ROWS;
        for (int first = panel_begin; first < panel_end; first += PANELS) {
            const int panels = panel_end - first < PANELS ? panel_end - first : PANELS;
            for (int strip = 0; strip < tiles; strip += STRIP_TILES) {
                const int count = tiles - strip < STRIP_TILES ? tiles - strip : STRIP_TILES;
                std::memset(sums, 0, sizeof sums);
                sum_strip(w, x, first, panels, strip, count, sums);
                for (int p = 0; p < panels; ++p)
                    for (int r = 0; r < count * TILE_ROWS && strip * TILE_ROWS + r < m; ++r)
                        store_run<S>(out, strip * TILE_ROWS + r, (first + p) * PANEL_ROWS,
                                     sums[p] + r * PANEL_ROWS, PANEL_ROWS);
            }
        }
    }

    static constexpr Product product() { return {prepare_row, gemv, pack_tile, gemm}; }
};

}  // namespace
}  // namespace halfbyte
