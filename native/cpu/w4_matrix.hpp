// An INT4 matrix in kernel layout, owning its memory, and its product with activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "w4.hpp"

namespace halfbyte {

class W4Matrix {
   public:
    // codes: [rows][cols] below 16; scales, offsets: [rows][groups], groups = ceil(cols / group_size); bias: [rows] or
    // null. group_size must be a multiple of 8. Throws std::invalid_argument or std::bad_alloc.
    W4Matrix(const Tier& tier, const std::uint8_t* codes, const float* scales, const float* offsets, const float* bias,
             int rows, int cols, int group_size);

    // y[m][rows] = x[m][cols] · Wᵀ + bias; rows of x are x_stride elements apart, y is contiguous.
    void multiply(const void* x, std::size_t x_stride, void* y, int m, DType dtype) const;

    // float32 [rows][cols] from the packed form.
    void dequantize(float* out) const;

    int rows() const { return view_.rows; }
    int cols() const { return view_.cols; }
    std::size_t nbytes() const { return nbytes_; }
    const Tier& tier() const { return tier_; }

   private:
    void multiply_small(const void* x, std::size_t x_stride, int m, DType dtype, const Output& out) const;
    void multiply_large(const void* x, std::size_t x_stride, int m, DType dtype, const Output& out) const;

    struct Free {
        void operator()(void* memory) const;
    };
    const Tier& tier_;
    std::unique_ptr<std::uint8_t, Free> memory_;  // words, scales, offsets, bias, in this order
    std::size_t nbytes_;
    const float* bias_ = nullptr;
    W4View view_{};
};

}  // namespace halfbyte
