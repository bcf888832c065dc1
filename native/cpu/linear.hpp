// One matrix of a decoder, in whatever form its weights are: rows of activations are prepared once, then blocks of 16 output
// rows are multiplied, by any thread, in any order. A row's result does not depend on the rows beside it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "w4_matrix.hpp"

namespace halfbyte {

class Linear {
   public:
    virtual ~Linear() = default;

    int rows() const { return rows_; }
    int cols() const { return cols_; }
    int blocks() const { return (rows_ + BLOCK_ROWS - 1) / BLOCK_ROWS; }
    // Bytes a step reads of it.
    virtual std::size_t nbytes() const = 0;
    // Linears with the same form take the same prepared rows.
    virtual std::string form() const = 0;
    virtual std::size_t prepared_bytes() const = 0;  // of a row, a multiple of 64
    virtual void prepare(const float* x, void* row) const = 0;
    // y[m][16·begin .. 16·end), less what lies beyond rows(); prepared rows lie prepared_bytes() apart.
    virtual void multiply(const void* prepared, int m, float* y, std::size_t y_stride, int begin, int end) const = 0;

   protected:
    Linear(int rows, int cols) : rows_(rows), cols_(cols) {}
    void add_bias(const std::vector<float>& bias, int m, float* y, std::size_t y_stride, int begin, int end) const;
    int rows_, cols_;
};

// Integer codes times activations in 8 bits (a8.hpp). Throws std::invalid_argument for what that layout cannot hold.
class A8Linear : public Linear {
   public:
    // zeros: [rows][groups], below 2^bits; scales must be exact in fp16.
    A8Linear(const Tier& tier, const std::uint8_t* codes, const float* scales, const std::uint8_t* zeros, const float* bias,
             int rows, int cols, int groups, int bits);
    std::size_t nbytes() const override { return nbytes_; }
    std::string form() const override { return "a8/" + std::to_string(groups_); }
    std::size_t prepared_bytes() const override { return a8_row_bytes(cols_, groups_); }
    void prepare(const float* x, void* row) const override;
    void multiply(const void* prepared, int m, float* y, std::size_t y_stride, int begin, int end) const override;

   private:
    const Tier& tier_;
    int groups_;
    std::size_t nbytes_;
    std::shared_ptr<std::uint8_t> memory_;  // words, then meta
    std::vector<float> bias_;
    A8View view_{};
};

// Integer codes times activations in fp32: everything `W4Matrix` holds.
class A16Linear : public Linear {
   public:
    explicit A16Linear(std::shared_ptr<const W4Matrix> matrix);
    std::size_t nbytes() const override { return matrix_->nbytes(); }
    std::string form() const override;
    std::size_t prepared_bytes() const override;
    void prepare(const float* x, void* row) const override;
    void multiply(const void* prepared, int m, float* y, std::size_t y_stride, int begin, int end) const override;

   private:
    std::shared_ptr<const W4Matrix> matrix_;
};

// A 16-bit weight [rows][cols], copied to where weights are, or read in place; then the caller keeps it alive.
class HalfLinear : public Linear {
   public:
    HalfLinear(const Tier& tier, const void* weight, DType dtype, const float* bias, int rows, int cols, bool in_place);
    std::size_t nbytes() const override { return static_cast<std::size_t>(rows_) * cols_ * 2; }
    std::string form() const override { return "half"; }
    std::size_t prepared_bytes() const override { return (static_cast<std::size_t>(cols_) + 63) / 64 * 64 * sizeof(float); }
    void prepare(const float* x, void* row) const override;
    void multiply(const void* prepared, int m, float* y, std::size_t y_stride, int begin, int end) const override;

   private:
    const Tier& tier_;
    std::shared_ptr<std::uint8_t> memory_;  // null where it is read in place
    const void* weight_;
    DType dtype_;
    std::vector<float> bias_;
};

// y[m][rows] = x[m][cols] times each of the matrices in turn, the way a step of the decoder multiplies them, all in one call: for
// measuring. They have one shape; what is left in y is the product of the last.
void multiply_each(const std::vector<std::shared_ptr<const Linear>>& linears, const float* x, int m, float* y);

}  // namespace halfbyte
