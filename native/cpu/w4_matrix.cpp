#include "w4_matrix.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "dtypes.hpp"
#include "memory.hpp"
#include "parallel.hpp"

namespace halfbyte {

namespace {

// Words a row has in an octet, and which input of the octet code number `code` of them belongs to.
int lines_of(int bits) { return OCTET * bits / 32; }
int input_of(int bits, int code) { return bits == 4 ? NIBBLE_INPUT[code] : BYTE_INPUT[code]; }

void check(const W4Parts& parts) {
    if (parts.rows < 1 || parts.cols < 1) throw std::invalid_argument("a packed matrix needs at least one row and one column");
    if (parts.bits != 4 && parts.bits != 8) throw std::invalid_argument("bits must be 4 or 8");
    if (parts.groups < 1 || (parts.group_index == nullptr && (parts.cols - 1) / parts.group_size >= parts.groups))
        throw std::invalid_argument("there must be a group for each column");
}

}  // namespace

InputOrder::InputOrder(const W4Parts& parts) {
    check(parts);
    std::vector<bool> kept(parts.cols);
    for (int j = 0; j < parts.kept; ++j) kept[parts.kept_columns[j]] = true;
    const auto group = [&](int k) { return parts.group_index ? parts.group_index[k] : k / parts.group_size; };
    std::vector<int> next(parts.groups);  // first the size of each group, then where its next column goes
    for (int k = 0; k < parts.cols; ++k) next[group(k)] += !kept[k];
    octets = 0;
    for (int& size : next) {
        const int first = octets * OCTET;
        octets += (size + OCTET - 1) / OCTET;
        group_ends.push_back(octets);
        size = first;
    }
    columns.assign(static_cast<std::size_t>(octets) * OCTET, -1);
    natural = parts.kept == 0 && parts.input_scale == nullptr;
    for (int k = 0; k < parts.cols; ++k)
        if (!kept[k]) {
            natural = natural && next[group(k)] == k;
            columns[next[group(k)]++] = k;
        }
    columns.insert(columns.end(), parts.kept_columns, parts.kept_columns + parts.kept);
    if (natural) columns = {};
    if (parts.input_scale != nullptr)
        for (const int k : columns) scales.push_back(k < 0 ? 0.0f : parts.input_scale[k]);
}

void InputOrder::gather(const void* x, DType dtype, float* target) const {
    const auto fill = [&](auto read) {
        for (std::size_t i = 0; i < columns.size(); ++i) target[i] = columns[i] < 0 ? 0.0f : read(columns[i]);
    };
    const auto* halves = static_cast<const std::uint16_t*>(x);
    switch (dtype) {
        case DType::f32: fill([floats = static_cast<const float*>(x)](int k) { return floats[k]; }); break;
        case DType::bf16: fill([halves](int k) { return from_bf16(halves[k]); }); break;
        default: fill([halves](int k) { return from_f16(halves[k]); });
    }
    for (std::size_t i = 0; i < scales.size(); ++i) target[i] *= scales[i];
}

std::size_t InputOrder::nbytes() const {
    return sizeof(int) * (group_ends.size() + columns.size()) + sizeof(float) * scales.size();
}

W4Matrix::W4Matrix(const Tier& tier, const W4Parts& parts) : tier_(tier), cols_(parts.cols), order_(parts) {
    const int blocks = (parts.rows + BLOCK_ROWS - 1) / BLOCK_ROWS, octets = order_.octets;
    const std::size_t block_rows = static_cast<std::size_t>(blocks) * BLOCK_ROWS;
    const std::size_t word_bytes = block_rows * octets * lines_of(parts.bits) * sizeof(std::uint32_t);
    const std::size_t scale_bytes = block_rows * parts.groups * sizeof(float);
    const std::size_t kept_bytes = round_up(block_rows * parts.kept * sizeof(std::uint16_t), LINE);
    const std::size_t bias_bytes = parts.bias ? round_up(parts.rows * sizeof(float), LINE) : 0;
    nbytes_ = word_bytes + 2 * scale_bytes + kept_bytes + bias_bytes;
    memory_ = weight_memory(nbytes_);
    std::memset(memory_.get(), 0, nbytes_);
    words_ = reinterpret_cast<std::uint32_t*>(memory_.get());
    scales_ = reinterpret_cast<float*>(memory_.get() + word_bytes);
    offsets_ = reinterpret_cast<float*>(memory_.get() + word_bytes + scale_bytes);
    kept_ = reinterpret_cast<std::uint16_t*>(memory_.get() + word_bytes + 2 * scale_bytes);
    if (parts.bias) {
        bias_ = reinterpret_cast<float*>(memory_.get() + word_bytes + 2 * scale_bytes + kept_bytes);
        std::memcpy(bias_, parts.bias, parts.rows * sizeof(float));
    }
    const int row_floats = order_.natural ? parts.cols : octets * OCTET + parts.kept;
    view_ = {words_,     scales_,    offsets_,   order_.group_ends.data(), kept_,  parts.kept_dtype, parts.bits,
             parts.rows, row_floats, blocks,     octets,                   parts.groups, parts.kept};
    parallel(blocks, static_cast<std::size_t>(parts.rows) * parts.cols, [&](int begin, int end) {
        pack(parts, begin * BLOCK_ROWS, std::min(parts.rows, end * BLOCK_ROWS));
    });
}

// Rows [begin, end).
void W4Matrix::pack(const W4Parts& parts, int begin, int end) {
    const int lines = lines_of(parts.bits), codes = OCTET / lines;
    for (int row = begin; row < end; ++row) {
        const std::size_t block = row / BLOCK_ROWS, lane = row % BLOCK_ROWS;
        const std::uint8_t* source = parts.codes + static_cast<std::size_t>(row) * parts.cols;
        std::uint32_t* target = words_ + block * view_.octets * lines * BLOCK_ROWS + lane;
        for (int octet = 0; octet < view_.octets; ++octet)
            for (int line = 0; line < lines; ++line) {
                std::uint32_t word = 0;
                for (int n = 0; n < codes; ++n) {
                    const int input = octet * OCTET + input_of(parts.bits, line * codes + n);
                    const int k = order_.natural && input >= parts.cols ? -1 : order_.column(input);
                    if (k >= 0) word |= static_cast<std::uint32_t>(source[k]) << (parts.bits * n);
                }
                target[static_cast<std::size_t>(octet * lines + line) * BLOCK_ROWS] = word;
            }
        for (int g = 0; g < parts.groups; ++g) {
            const std::size_t at = (block * parts.groups + g) * BLOCK_ROWS + lane;
            scales_[at] = parts.scales[static_cast<std::size_t>(row) * parts.groups + g];
            offsets_[at] = parts.offsets[static_cast<std::size_t>(row) * parts.groups + g];
        }
        for (int j = 0; j < parts.kept; ++j)
            kept_[(block * parts.kept + j) * BLOCK_ROWS + lane] =
                parts.kept_weight[static_cast<std::size_t>(row) * parts.kept + j];
    }
}

void W4Matrix::dequantize(float* out) const {
    const W4View& w = view_;
    const int lines = lines_of(w.bits), codes = OCTET / lines, coded = w.octets * OCTET;
    const std::uint32_t mask = (1u << w.bits) - 1u;
    for (int row = 0; row < w.rows; ++row) {
        const std::size_t block = row / BLOCK_ROWS, lane = row % BLOCK_ROWS;
        float* target = out + static_cast<std::size_t>(row) * cols_;
        const auto put = [&](int input, float value) {
            const int k = order_.natural && input >= cols_ ? -1 : order_.column(input);
            if (k >= 0) target[k] = order_.scales.empty() ? value : value * order_.scales[input];
        };
        for (int octet = 0, g = 0; octet < w.octets; ++octet) {
            while (w.group_ends[g] <= octet) ++g;
            const std::size_t at = (block * w.groups + g) * BLOCK_ROWS + lane;
            for (int n = 0; n < OCTET; ++n) {
                const std::uint32_t word = w.words[((block * w.octets + octet) * lines + n / codes) * BLOCK_ROWS + lane];
                const auto code = static_cast<float>((word >> (w.bits * (n % codes))) & mask);
                put(octet * OCTET + input_of(w.bits, n), w.scales[at] * code + w.offsets[at]);
            }
        }
        for (int j = 0; j < w.kept_cols; ++j) {
            const std::uint16_t half = w.kept[(block * w.kept_cols + j) * BLOCK_ROWS + lane];
            put(coded + j, w.kept_dtype == DType::bf16 ? from_bf16(half) : from_f16(half));
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
    const float* x_kept = nullptr;
    if (!order_.natural) {
        float* ordered = scratch<1>(static_cast<std::size_t>(m) * view_.cols);
        for (int row = 0; row < m; ++row)
            order_.gather(element(x, dtype, row * x_stride), dtype, ordered + static_cast<std::size_t>(row) * view_.cols);
        x = ordered;
        x_stride = view_.cols;
        dtype = DType::f32;
        x_kept = ordered + inputs;
    }
    const Tiles tiles = prepare_tiles(x, x_stride, m, dtype);
    const std::size_t work = static_cast<std::size_t>(view_.rows) * cols_ * m;
    const int strip = tier_.gemv_blocks, strips = (view_.blocks + strip - 1) / strip;
    parallel(strips, work, [&](int begin, int end) {
        product().gemv(view_, tiles.x, tiles.sums, x_kept, m, out, begin * strip, std::min(end * strip, view_.blocks));
    });
}

W4Matrix::Tiles W4Matrix::prepare_tiles(const void* x, std::size_t x_stride, int m, DType dtype) const {
    const int inputs = view_.octets * OCTET;
    float* rows = scratch(static_cast<std::size_t>(m) * (inputs + view_.groups));
    float* sums = rows + static_cast<std::size_t>(m) * inputs;
    for (int row = 0; row < m; ++row) {
        const int first = row / GEMV_TILE * GEMV_TILE, tile = std::min(GEMV_TILE, m - first);
        product().prepare_row(view_, element(x, dtype, row * x_stride), dtype,
                              rows + static_cast<std::size_t>(first) * inputs + (row - first) * OCTET, tile * OCTET,
                              sums + static_cast<std::size_t>(row) * view_.groups);
    }
    return {rows, sums};
}

void W4Matrix::order_row(const float* x, float* row) const {
    if (order_.natural)
        std::memcpy(row, x, sizeof(float) * cols_);
    else
        order_.gather(x, DType::f32, row);
}

void W4Matrix::multiply_blocks(const float* x, std::size_t x_stride, int m, float* y, std::size_t y_stride, int begin,
                               int end) const {
    const Tiles tiles = prepare_tiles(x, x_stride, m, DType::f32);
    std::vector<float> kept;  // as `gemv` wants them: view().cols floats apart
    const float* x_kept = nullptr;
    if (!order_.natural) {
        kept.resize(static_cast<std::size_t>(m) * view_.cols);
        for (int row = 0; row < m; ++row)
            std::memcpy(kept.data() + static_cast<std::size_t>(row) * view_.cols, x + row * x_stride,
                        sizeof(float) * view_.cols);
        x_kept = kept.data() + view_.octets * OCTET;
    }
    product().gemv(view_, tiles.x, tiles.sums, x_kept, m, {y, DType::f32, y_stride, view_.rows, bias_}, begin, end);
}

void W4Matrix::multiply_large(const void* x, std::size_t x_stride, int m, DType dtype, const Output& out) const {
    const int inputs = view_.octets * OCTET + view_.kept_cols, tile = tier_.tile_rows;
    const int tiles = (m + tile - 1) / tile;
    float* packed = scratch(static_cast<std::size_t>(tiles) * tile * inputs);
    const auto pack_tile = [&](int t) {
        float* target = packed + static_cast<std::size_t>(t) * tile * inputs;
        if (order_.natural) return product().pack_tile(view_, x, x_stride, dtype, m, t, target);
        float* ordered = scratch<1>(static_cast<std::size_t>(tile) * inputs);
        const int rows = std::min(tile, m - t * tile);
        for (int r = 0; r < rows; ++r)
            order_.gather(element(x, dtype, (static_cast<std::size_t>(t) * tile + r) * x_stride), dtype,
                          ordered + static_cast<std::size_t>(r) * inputs);
        product().pack_tile(view_, ordered, inputs, DType::f32, rows, 0, target);
    };
    parallel(tiles, static_cast<std::size_t>(m) * inputs * 4, [&](int begin, int end) {
        for (int t = begin; t < end; ++t) pack_tile(t);
    });
    const int panels = (view_.blocks + tier_.panel_blocks - 1) / tier_.panel_blocks;
    const std::size_t work = static_cast<std::size_t>(view_.rows) * cols_ * m;
    parallel(panels, work, [&](int begin, int end) { product().gemm(view_, packed, m, out, begin, end); });
}

}  // namespace halfbyte
