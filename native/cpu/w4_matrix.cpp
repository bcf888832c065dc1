#include "w4_matrix.hpp"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "dtypes.hpp"
#include "parallel.hpp"

namespace halfbyte {

void W4Matrix::Free::operator()(void* memory) const { std::free(memory); }

W4Matrix::W4Matrix(const Tier& tier, const std::uint8_t* codes, const float* scales, const float* offsets,
                   const float* bias, int rows, int cols, int group_size)
    : tier_(tier) {
    if (rows < 1 || cols < 1) throw std::invalid_argument("a packed matrix needs at least one row and one column");
    if (group_size < OCTET || group_size % OCTET) throw std::invalid_argument("group_size must be a multiple of 8");
    const int blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS, octets = (cols + OCTET - 1) / OCTET;
    const int groups = (cols + group_size - 1) / group_size;
    const std::size_t word_bytes = static_cast<std::size_t>(blocks) * octets * BLOCK_ROWS * 4;
    const std::size_t scale_bytes = static_cast<std::size_t>(blocks) * groups * BLOCK_ROWS * 4;
    const std::size_t bias_bytes = bias ? round_up(static_cast<std::size_t>(rows) * 4, LINE) : 0;
    nbytes_ = word_bytes + 2 * scale_bytes + bias_bytes;
    memory_.reset(static_cast<std::uint8_t*>(std::aligned_alloc(LINE, nbytes_)));
    if (!memory_) throw std::bad_alloc();
    std::memset(memory_.get(), 0, nbytes_);
    auto* words = reinterpret_cast<std::uint32_t*>(memory_.get());
    auto* packed_scales = reinterpret_cast<float*>(memory_.get() + word_bytes);
    auto* packed_offsets = reinterpret_cast<float*>(memory_.get() + word_bytes + scale_bytes);
    if (bias) {
        auto* packed_bias = reinterpret_cast<float*>(memory_.get() + word_bytes + 2 * scale_bytes);
        std::memcpy(packed_bias, bias, static_cast<std::size_t>(rows) * 4);
        bias_ = packed_bias;
    }
    view_ = {words, packed_scales, packed_offsets, rows, cols, blocks, octets, groups, group_size / OCTET};

    parallel(blocks, static_cast<std::size_t>(rows) * cols, [&](int begin, int end) {
        for (int row = begin * BLOCK_ROWS; row < std::min(rows, end * BLOCK_ROWS); ++row) {
            const int block = row / BLOCK_ROWS, lane = row % BLOCK_ROWS;
            const std::uint8_t* source = codes + static_cast<std::size_t>(row) * cols;
            std::uint32_t* target = words + static_cast<std::size_t>(block) * octets * BLOCK_ROWS + lane;
            for (int octet = 0; octet < octets; ++octet) {
                std::uint32_t word = 0;
                for (int n = 0; n < OCTET; ++n) {
                    const int k = octet * OCTET + NIBBLE_INPUT[n];
                    if (k < cols) word |= static_cast<std::uint32_t>(source[k] & 15u) << (4 * n);
                }
                target[static_cast<std::size_t>(octet) * BLOCK_ROWS] = word;
            }
            for (int g = 0; g < groups; ++g) {
                const std::size_t at = (static_cast<std::size_t>(block) * groups + g) * BLOCK_ROWS + lane;
                packed_scales[at] = scales[static_cast<std::size_t>(row) * groups + g];
                packed_offsets[at] = offsets[static_cast<std::size_t>(row) * groups + g];
            }
        }
    });
}

void W4Matrix::dequantize(float* out) const {
    for (int row = 0; row < view_.rows; ++row) {
        const std::size_t block = row / BLOCK_ROWS;
        const int lane = row % BLOCK_ROWS;
        for (int octet = 0; octet < view_.octets; ++octet) {
            const std::uint32_t word = view_.words[(block * view_.octets + octet) * BLOCK_ROWS + lane];
            const std::size_t at = (block * view_.groups + octet / view_.group_octets) * BLOCK_ROWS + lane;
            for (int n = 0; n < OCTET; ++n) {
                const int k = octet * OCTET + NIBBLE_INPUT[n];
                if (k < view_.cols)
                    out[static_cast<std::size_t>(row) * view_.cols + k] =
                        view_.scales[at] * static_cast<float>((word >> (4 * n)) & 15u) + view_.offsets[at];
            }
        }
    }
}

void W4Matrix::multiply(const void* x, std::size_t x_stride, void* y, int m, DType dtype) const {
    const Output out{y, dtype, static_cast<std::size_t>(view_.rows), view_.rows, bias_};
    if (m <= SMALL_M)
        multiply_small(x, x_stride, m, dtype, out);
    else
        multiply_large(x, x_stride, m, dtype, out);
}

void W4Matrix::multiply_small(const void* x, std::size_t x_stride, int m, DType dtype, const Output& out) const {
    const int inputs = view_.octets * OCTET;
    float* rows = scratch(static_cast<std::size_t>(m) * (inputs + view_.groups));
    float* sums = rows + static_cast<std::size_t>(m) * inputs;
    for (int row = 0; row < m; ++row) {
        const int first = row / GEMV_TILE * GEMV_TILE, tile = std::min(GEMV_TILE, m - first);
        tier_.prepare_row(view_, element(x, dtype, row * x_stride), dtype,
                          rows + static_cast<std::size_t>(first) * inputs + (row - first) * OCTET, tile * OCTET,
                          sums + static_cast<std::size_t>(row) * view_.groups);
    }
    const std::size_t work = static_cast<std::size_t>(view_.rows) * view_.cols * m;
    const int strip = tier_.gemv_blocks, strips = (view_.blocks + strip - 1) / strip;
    parallel(strips, work, [&](int begin, int end) {
        tier_.gemv(view_, rows, sums, m, out, begin * strip, std::min(end * strip, view_.blocks));
    });
}

void W4Matrix::multiply_large(const void* x, std::size_t x_stride, int m, DType dtype, const Output& out) const {
    const int inputs = view_.octets * OCTET, tile = tier_.tile_rows;
    const int tiles = (m + tile - 1) / tile;
    float* packed = scratch(static_cast<std::size_t>(tiles) * tile * inputs);
    parallel(tiles, static_cast<std::size_t>(m) * inputs * 4, [&](int begin, int end) {
        for (int t = begin; t < end; ++t)
            tier_.pack_tile(view_, x, x_stride, dtype, m, t, packed + static_cast<std::size_t>(t) * tile * inputs);
    });
    const int panels = (view_.blocks + tier_.panel_blocks - 1) / tier_.panel_blocks;
    const std::size_t work = static_cast<std::size_t>(view_.rows) * view_.cols * m;
    parallel(panels, work, [&](int begin, int end) { tier_.gemm(view_, packed, m, out, begin, end); });
}

}  // namespace halfbyte
