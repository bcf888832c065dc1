// AMX-INT8: products of 8-bit activations by tiles, sixteen rows at a time; everything else is the avx512_vnni tier's.
//
// A line of sixteen words is, unpacked, two rows of the right-hand tile as TDPBSSD wants them: four inputs of sixteen output rows.
// With the zero point taken from each byte on the way (-15 .. 15), a tile of accumulators holds Σ (code - zero) · q, the very
// integers the avx512_vnni tier gets as Σ code · q - zero · Σq; they are scaled and added by the same operations in the same
// order, so a row has the same bits on either path, and M may decide between them.
//
// Operations for 64 inputs × 16 rows × 16 output rows at groups of 64: one TDPBSSD (16 cycles), and to drain its accumulators
// 16 stores, then for each row a conversion, a product, an FMA and a store. See docs/design/cpu-kernel.md.
#ifndef HALFBYTE_AMX_INTRINSICS  // tests/kernels puts a scalar model of the intrinsics here
#define HALFBYTE_AMX_INTRINSICS <immintrin.h>
#endif
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include HALFBYTE_AMX_INTRINSICS
#pragma GCC diagnostic pop

#include <cstring>

#include "w4.hpp"

namespace halfbyte {
namespace {

constexpr int TILE_ROWS = 16;
constexpr int MOST_TILES = 4;  // of rows that share the unpacking
// Tile registers 0 to 3 are accumulators; 4 and 5 take 32 inputs of activations and weights, 6 and 7 take 64.
constexpr int DEEP = 8, SHALLOW = 4;  // octets

struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 4 * OCTET, 64, 8 * OCTET, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 2 * SHALLOW, 16, 2 * DEEP};
};
static_assert(sizeof(TileConfig) == 64, "as LDTILECFG reads it");
constexpr TileConfig CONFIG;

// GCC 12's tile loads do not tell the compiler that they read memory: nothing may be moved past them.
inline void fence() { asm volatile("" ::: "memory"); }

// `octets` lines of nibbles less their zero points, two rows of a tile each.
inline void unpack(const std::uint32_t* words, int octets, __m512i zeros, std::uint8_t* tile) {
    const __m512i mask = _mm512_set1_epi32(0x0F0F0F0F);
    for (int octet = 0; octet < octets; ++octet) {
        const __m512i line = _mm512_load_si512(words + octet * BLOCK_ROWS);
        const __m512i low = _mm512_and_si512(line, mask), high = _mm512_and_si512(_mm512_srli_epi32(line, 4), mask);
        _mm512_store_si512(tile + octet * 128, _mm512_sub_epi8(low, zeros));
        _mm512_store_si512(tile + octet * 128 + 64, _mm512_sub_epi8(high, zeros));
    }
}

template <int R>
inline void clear() {
    _tile_zero(0);
    if constexpr (R > 1) _tile_zero(1);
    if constexpr (R > 2) _tile_zero(2);
    if constexpr (R > 3) _tile_zero(3);
}

// 64 inputs of R tiles of rows. The intrinsics take literals only.
template <int R>
inline void add_deep(const std::int8_t* x, std::size_t stride, const std::uint8_t* weights) {
    const std::size_t tile = TILE_ROWS * stride;
    _tile_loadd(7, weights, 64);
    _tile_loadd(6, x, stride);
    _tile_dpbssd(0, 6, 7);
    if constexpr (R > 1) {
        _tile_loadd(6, x + tile, stride);
        _tile_dpbssd(1, 6, 7);
    }
    if constexpr (R > 2) {
        _tile_loadd(6, x + 2 * tile, stride);
        _tile_dpbssd(2, 6, 7);
    }
    if constexpr (R > 3) {
        _tile_loadd(6, x + 3 * tile, stride);
        _tile_dpbssd(3, 6, 7);
    }
}

// The 32 inputs left of a group that is no multiple of 64.
template <int R>
inline void add_shallow(const std::int8_t* x, std::size_t stride, const std::uint8_t* weights) {
    const std::size_t tile = TILE_ROWS * stride;
    _tile_loadd(5, weights, 64);
    _tile_loadd(4, x, stride);
    _tile_dpbssd(0, 4, 5);
    if constexpr (R > 1) {
        _tile_loadd(4, x + tile, stride);
        _tile_dpbssd(1, 4, 5);
    }
    if constexpr (R > 2) {
        _tile_loadd(4, x + 2 * tile, stride);
        _tile_dpbssd(2, 4, 5);
    }
    if constexpr (R > 3) {
        _tile_loadd(4, x + 3 * tile, stride);
        _tile_dpbssd(3, 4, 5);
    }
}

using Sums = std::int32_t[TILE_ROWS][BLOCK_ROWS];
using Totals = float[TILE_ROWS][BLOCK_ROWS];

template <int R>
inline void store_sums(Sums* sums) {
    constexpr int BYTES = BLOCK_ROWS * sizeof(std::int32_t);
    _tile_stored(0, sums[0], BYTES);
    if constexpr (R > 1) _tile_stored(1, sums[1], BYTES);
    if constexpr (R > 2) _tile_stored(2, sums[2], BYTES);
    if constexpr (R > 3) _tile_stored(3, sums[3], BYTES);
}

// The end of a group for one tile: as in a8_kernel.hpp, operation for operation. `ends`: scale and sum of the group, of row 0.
inline void drain(const Sums& sums, __m512 scale, const std::int8_t* ends, std::size_t stride, Totals& totals) {
    for (int row = 0; row < TILE_ROWS; ++row) {
        float x_scale;
        std::memcpy(&x_scale, ends + row * stride, sizeof x_scale);
        const __m512 exact = _mm512_cvtepi32_ps(_mm512_load_si512(sums[row]));
        const __m512 total = _mm512_fmadd_ps(exact, _mm512_mul_ps(scale, _mm512_set1_ps(x_scale)), _mm512_loadu_ps(totals[row]));
        _mm512_storeu_ps(totals[row], total);
    }
}

// R tiles of rows × one block of output rows.
template <int R>
void multiply_block(const A8View& w, const std::int8_t* x, std::size_t stride, float* y, std::size_t y_stride, int block) {
    alignas(64) std::uint8_t weights[2 * DEEP * 64];
    alignas(64) Sums sums[R];
    alignas(64) Totals totals[R] = {};
    const std::uint32_t* words = w.words + static_cast<std::size_t>(block) * w.octets * BLOCK_ROWS;
    const std::int8_t* ends = x + static_cast<std::size_t>(w.octets) * OCTET;
    for (int g = 0; g < w.groups; ++g, ends += 8) {
        const std::uint8_t* meta = w.meta + (static_cast<std::size_t>(block) * w.groups + g) * A8_META;
        const __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(meta)));
        const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(meta + 32)));
        const __m512i zeros = _mm512_mullo_epi32(zero, _mm512_set1_epi32(0x01010101));
        clear<R>();
        for (int left = w.group_octets; left > 0;) {
            const int octets = left < DEEP ? SHALLOW : DEEP;
            unpack(words, octets, zeros, weights);
            fence();
            if (octets == DEEP)
                add_deep<R>(x, stride, weights);
            else
                add_shallow<R>(x, stride, weights);
            fence();
            words += octets * BLOCK_ROWS;
            x += octets * OCTET;
            left -= octets;
        }
        store_sums<R>(sums);
        for (int r = 0; r < R; ++r) drain(sums[r], scale, ends + r * TILE_ROWS * stride, stride, totals[r]);
    }
    for (int row = 0; row < R * TILE_ROWS; ++row)
        _mm512_storeu_ps(y + row * y_stride + static_cast<std::size_t>(block) * BLOCK_ROWS,
                         _mm512_loadu_ps(totals[row / TILE_ROWS][row % TILE_ROWS]));
}

void multiply(const A8View& w, const std::int8_t* x, std::size_t stride, int m, float* y, std::size_t y_stride, int begin,
              int end, std::int8_t* scratch) {
    const auto& vnni = avx512_vnni_tier()->a8;
    // 8-bit codes less their zero points would need nine bits.
    const int whole = w.bits == 4 ? m / TILE_ROWS * TILE_ROWS : 0;
    if (whole > 0) {
        _tile_loadconfig(&CONFIG);
        for (int block = begin; block < end; ++block)
            for (int row = 0; row < whole; row += MOST_TILES * TILE_ROWS) {
                const std::int8_t* from = x + row * stride;
                float* to = y + row * y_stride;
                switch ((whole - row) / TILE_ROWS) {
                    case 1: multiply_block<1>(w, from, stride, to, y_stride, block); break;
                    case 2: multiply_block<2>(w, from, stride, to, y_stride, block); break;
                    case 3: multiply_block<3>(w, from, stride, to, y_stride, block); break;
                    default: multiply_block<MOST_TILES>(w, from, stride, to, y_stride, block);
                }
            }
        _tile_release();
    }
    if (whole < m) vnni.multiply(w, x + whole * stride, stride, m - whole, y + whole * y_stride, y_stride, begin, end, scratch);
}

// Tiles of ones, multiplied into four tiles of sums; `multiply` is one instruction for each of them, of `products`.
template <class Fn>
inline double tile_peak(std::uint8_t low, std::uint8_t high, double products, std::int64_t steps, float* sink, Fn multiply) {
    alignas(64) std::uint8_t ones[TILE_ROWS * 64];
    for (int i = 0; i < TILE_ROWS * 64; ++i) ones[i] = i % 2 ? high : low;
    _tile_loadconfig(&CONFIG);
    clear<MOST_TILES>();
    fence();
    _tile_loadd(6, ones, 64);
    _tile_loadd(7, ones, 64);
    for (std::int64_t step = 0; step < steps; ++step) multiply();
    alignas(64) Sums sums[MOST_TILES];
    store_sums<MOST_TILES>(sums);
    fence();
    _tile_release();
    for (const auto& tile : sums)
        for (const auto& row : tile)
            for (const std::int32_t sum : row) {
                float value;
                std::memcpy(&value, &sum, sizeof value);
                *sink += low == high ? static_cast<float>(sum) : value;
            }
    return 2.0 * MOST_TILES * products * static_cast<double>(steps);
}

double int8_dots(std::int64_t steps, float* sink) {
    return tile_peak(1, 1, TILE_ROWS * BLOCK_ROWS * 64, steps, sink, [] {
        _tile_dpbssd(0, 6, 7);
        _tile_dpbssd(1, 6, 7);
        _tile_dpbssd(2, 6, 7);
        _tile_dpbssd(3, 6, 7);
    });
}

// AMX-BF16, which not every CPU with AMX-INT8 must have.
__attribute__((target("amx-bf16"))) inline void add_bf16_dots() {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
}

double bf16_dots(std::int64_t steps, float* sink) {
    return tile_peak(0x80, 0x3F, TILE_ROWS * BLOCK_ROWS * 32, steps, sink, add_bf16_dots);
}

}  // namespace

const Tier* amx_tier() {
    static const Tier tier = [] {
        Tier amx = *avx512_vnni_tier();
        amx.name = "amx";
        amx.a8.multiply = multiply;
        amx.int8_dots = int8_dots;
        amx.bf16_dots = bf16_dots;
        return amx;
    }();
    return &tier;
}

}  // namespace halfbyte
