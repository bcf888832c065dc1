#include "linear.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "dtypes.hpp"
#include "memory.hpp"
#include "parallel.hpp"
#include "thread_pool.hpp"

namespace halfbyte {

void Linear::add_bias(const std::vector<float>& bias, int m, float* y, std::size_t y_stride, int begin, int end) const {
    if (bias.empty()) return;
    const int first = begin * BLOCK_ROWS, last = std::min(end * BLOCK_ROWS, rows_);
    for (int row = 0; row < m; ++row)
        for (int n = first; n < last; ++n) y[row * y_stride + n] += bias[n];
}

namespace {

// Thirty-two codes of one row → its word in each of `bits` lines (w4.hpp, a8.hpp).
void pack32(const std::uint8_t* codes, int bits, std::uint32_t* target) {
    std::uint32_t lines[8] = {};
    for (int i = 0; i < A8_INPUTS; ++i) {
        const int octet = i / OCTET, half = i % OCTET / 4, byte = 8 * (i % 4);
        const std::uint32_t code = codes[i];
        if (bits == 8) {
            lines[2 * octet + half] |= code << byte;
        } else {
            lines[octet] |= (code & 15u) << (byte + 4 * half);
            if (bits == 6) lines[4 + octet / 2] |= code >> 4 << (byte + 4 * (octet % 2) + 2 * half);
        }
    }
    for (int line = 0; line < bits; ++line) target[static_cast<std::size_t>(line) * BLOCK_ROWS] = lines[line];
}

}  // namespace

A8Linear::A8Linear(const Tier& tier, const std::uint8_t* codes, const float* scales, const std::uint8_t* zeros,
                   const float* bias, int rows, int cols, int groups, int bits)
    : Linear(rows, cols), tier_(tier), groups_(groups) {
    if (rows < 1 || cols < 1 || groups < 1 || cols % groups != 0 || cols / groups % A8_INPUTS != 0)
        throw std::invalid_argument("a8: groups must be multiples of 32 inputs");
    if (bits != 4 && bits != 6 && bits != 8) throw std::invalid_argument("a8: bits must be 4, 6 or 8");
    const int octets = cols / OCTET, blocks = this->blocks();
    const std::size_t block_words = static_cast<std::size_t>(cols) / A8_INPUTS * bits * BLOCK_ROWS;
    const std::size_t word_bytes = blocks * block_words * sizeof(std::uint32_t);
    const std::size_t meta_bytes = round_up(static_cast<std::size_t>(blocks) * groups * A8_META, LINE);
    nbytes_ = word_bytes + meta_bytes;
    memory_ = weight_memory(nbytes_);
    auto* words = reinterpret_cast<std::uint32_t*>(memory_.get());
    std::uint8_t* meta = memory_.get() + word_bytes;
    view_ = {words, meta, bits, blocks, octets, groups, octets / groups};
    if (bias != nullptr) bias_.assign(bias, bias + rows);
    static constexpr std::uint8_t nothing[A8_INPUTS] = {};  // rows beyond the matrix
    parallel(blocks, static_cast<std::size_t>(rows) * cols, [&](int begin, int end) {
        for (int row = begin * BLOCK_ROWS; row < end * BLOCK_ROWS; ++row) {
            const std::size_t block = row / BLOCK_ROWS, lane = row % BLOCK_ROWS;
            const bool real = row < rows;
            const std::uint8_t* source = codes + static_cast<std::size_t>(row) * cols;
            for (int k = 0; k < cols; k += A8_INPUTS)
                pack32(real ? source + k : nothing, bits, words + block * block_words + k / A8_INPUTS * bits * BLOCK_ROWS + lane);
            for (int g = 0; g < groups; ++g) {
                std::uint8_t* at = meta + (block * groups + g) * A8_META;
                const std::size_t from = static_cast<std::size_t>(row) * groups + g;
                const std::uint16_t scale = real ? to_f16(scales[from]) : 0;
                std::memcpy(at + 2 * lane, &scale, sizeof scale);
                at[32 + lane] = real ? zeros[from] : 0;
            }
        }
    });
}

void A8Linear::prepare(const float* x, void* row) const {
    tier_.a8.quantize(x, cols_, groups_, static_cast<std::int8_t*>(row));
}

void A8Linear::multiply(const void* prepared, int m, float* y, std::size_t y_stride, int begin, int end) const {
    const auto* x = static_cast<const std::int8_t*>(prepared);
    const std::size_t stride = prepared_bytes();
    const int whole = std::min(end, rows_ / BLOCK_ROWS);
    static thread_local std::vector<std::uint8_t> memory;  // grows and stays
    const std::size_t wanted = tier_.a8.scratch_bytes(view_, m) + LINE;
    if (memory.size() < wanted) memory.resize(wanted);
    auto* scratch = reinterpret_cast<std::int8_t*>(round_up(reinterpret_cast<std::uintptr_t>(memory.data()), LINE));
    if (begin < whole) tier_.a8.multiply(view_, x, stride, m, y, y_stride, begin, whole, scratch);
    if (whole < end) {  // the kernel writes all sixteen rows of the last block
        const int left = rows_ - whole * BLOCK_ROWS;
        for (int row = 0; row < m; ++row) {
            alignas(64) float values[BLOCK_ROWS];
            A8View last = view_;  // the last block alone, so that it is written to the start of `values`
            last.words += whole * a8_block_words(view_);
            last.meta += static_cast<std::size_t>(whole) * view_.groups * A8_META;
            tier_.a8.multiply(last, x + row * stride, stride, 1, values, 0, 0, 1, scratch);
            std::memcpy(y + row * y_stride + static_cast<std::size_t>(whole) * BLOCK_ROWS, values, sizeof(float) * left);
        }
    }
    add_bias(bias_, m, y, y_stride, begin, end);
}

A16Linear::A16Linear(std::shared_ptr<const W4Matrix> matrix)
    : Linear(matrix->rows(), matrix->cols()), matrix_(std::move(matrix)) {}

// Every matrix has its own order of inputs.
std::string A16Linear::form() const {
    return matrix_->natural() ? "a16" : "a16/" + std::to_string(reinterpret_cast<std::uintptr_t>(this));
}

std::size_t A16Linear::prepared_bytes() const { return round_up(sizeof(float) * matrix_->view().cols, LINE); }

void A16Linear::prepare(const float* x, void* row) const { matrix_->order_row(x, static_cast<float*>(row)); }

void A16Linear::multiply(const void* prepared, int m, float* y, std::size_t y_stride, int begin, int end) const {
    for (int first = 0; first < m; first += SMALL_M) {
        const int count = std::min(SMALL_M, m - first);
        const auto* x = reinterpret_cast<const float*>(static_cast<const std::uint8_t*>(prepared) + first * prepared_bytes());
        matrix_->multiply_blocks(x, prepared_bytes() / sizeof(float), count, y + first * y_stride, y_stride, begin, end);
    }
}

HalfLinear::HalfLinear(const Tier& tier, const void* weight, DType dtype, const float* bias, int rows, int cols, bool in_place)
    : Linear(rows, cols), tier_(tier), weight_(weight), dtype_(dtype) {
    if (!in_place) {
        memory_ = weight_memory(nbytes());
        std::memcpy(memory_.get(), weight, nbytes());
        weight_ = memory_.get();
    }
    if (bias != nullptr) bias_.assign(bias, bias + rows);
}

void HalfLinear::prepare(const float* x, void* row) const {
    auto* floats = static_cast<float*>(row);
    std::memcpy(floats, x, sizeof(float) * cols_);
    std::fill(floats + cols_, floats + prepared_bytes() / sizeof(float), 0.0f);
}

void HalfLinear::multiply(const void* prepared, int m, float* y, std::size_t y_stride, int begin, int end) const {
    const std::size_t stride = prepared_bytes() / sizeof(float);
    const int last = std::min(end * BLOCK_ROWS, rows_);
    // A few rows of weights stay in L1 while all activations pass.
    const int strip = m > HALF_ROWS ? BLOCK_ROWS : last - begin * BLOCK_ROWS;
    for (int row = begin * BLOCK_ROWS; row < last; row += strip)
        for (int first = 0; first < m; first += HALF_ROWS) {
            const int count = std::min(HALF_ROWS, m - first);
            const Output out{y + first * y_stride, DType::f32, y_stride, rows_, bias_.empty() ? nullptr : bias_.data()};
            tier_.half_multiply(weight_, dtype_, cols_, static_cast<const float*>(prepared) + first * stride, stride, count,
                                out, row, std::min(row + strip, last));
        }
}

void multiply_each(const std::vector<std::shared_ptr<const Linear>>& linears, const float* x, int m, float* y) {
    std::size_t most = 0;
    for (const auto& linear : linears) most = std::max(most, linear->prepared_bytes());
    std::vector<std::uint8_t> memory(m * most + LINE);
    auto* prepared = reinterpret_cast<std::uint8_t*>(round_up(reinterpret_cast<std::uintptr_t>(memory.data()), LINE));
    ThreadPool::instance().run_team([&](Team& team, int) {
        for (const auto& linear : linears) {
            const std::size_t stride = linear->prepared_bytes();
            team.phase(m, team.piece(m), [&](int begin, int end) {
                for (int row = begin; row < end; ++row)
                    linear->prepare(x + static_cast<std::size_t>(row) * linear->cols(), prepared + row * stride);
            });
            team.phase(linear->blocks(), team.piece(linear->blocks(), 2), [&](int begin, int end) {
                linear->multiply(prepared, m, y, linear->rows(), begin, end);
            });
        }
    });
}

}  // namespace halfbyte
