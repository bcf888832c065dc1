// An INT4 or INT8 matrix in kernel layout, owning its memory, and its product with activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "w4.hpp"

namespace halfbyte {

// A matrix W [rows][cols] as `QuantizedTensor` describes it. Column k is of group group_index[k], or k / group_size.
struct W4Parts {
    const std::uint8_t* codes;  // [rows][cols], below 2^bits
    const float* scales;        // [rows][groups]
    const float* offsets;       // [rows][groups]
    const float* bias;          // [rows] or null
    int rows, cols, groups, group_size;
    int bits;                                   // 4 or 8
    const std::int32_t* group_index = nullptr;  // [cols], below `groups`, or null
    const float* input_scale = nullptr;         // [cols] or null
    int kept = 0;
    const std::int32_t* kept_columns = nullptr;  // [kept], ascending; their codes are ignored
    const std::uint16_t* kept_weight = nullptr;  // [rows][kept]
    DType kept_dtype = DType::bf16;              // or f16
};

// The order in which a packed matrix takes its inputs: those of each group side by side, filled up to whole octets, then the
// kept ones. Kept columns take no room among the codes.
struct InputOrder {
    explicit InputOrder(const W4Parts&);

    bool natural;                 // input p is column p, as it is: activations can be read in place
    int octets;
    std::vector<int> group_ends;  // [groups], in octets
    std::vector<int> columns;     // [8·octets + kept]; -1 fills up. Empty if natural
    std::vector<float> scales;    // of those inputs; empty for ones

    int column(int input) const { return natural ? input : columns[input]; }
    // x, one row of activations, in this order.
    void gather(const void* x, DType, float* target) const;
    std::size_t nbytes() const;
};

class W4Matrix {
   public:
    // Throws std::invalid_argument or std::bad_alloc.
    W4Matrix(const Tier& tier, const W4Parts& parts);

    // y[m][rows] = x[m][cols] · Wᵀ + bias; rows of x are x_stride elements apart, y is contiguous.
    void multiply(const void* x, std::size_t x_stride, void* y, int m, DType dtype) const;

    // For callers that divide the work themselves: one row x [cols] as `multiply_blocks` takes it, view().cols floats;
    void order_row(const float* x, float* row) const;
    // then blocks [begin, end) of m <= SMALL_M such rows, x_stride floats apart.
    void multiply_blocks(const float* x, std::size_t x_stride, int m, float* y, std::size_t y_stride, int begin,
                         int end) const;
    const W4View& view() const { return view_; }
    bool natural() const { return order_.natural; }

    // float32 [rows][cols] from the packed form, with what scales the inputs.
    void dequantize(float* out) const;

    int rows() const { return view_.rows; }
    int cols() const { return cols_; }
    std::size_t nbytes() const { return nbytes_ + order_.nbytes(); }
    const Tier& tier() const { return tier_; }

   private:
    void pack(const W4Parts& parts, int begin, int end);
    struct Tiles {
        const float* x;
        const float* sums;
    };
    Tiles prepare_tiles(const void* x, std::size_t x_stride, int m, DType dtype) const;
    void multiply_small(const void* x, std::size_t x_stride, int m, DType dtype, const Output& out) const;
    void multiply_large(const void* x, std::size_t x_stride, int m, DType dtype, const Output& out) const;
    const Product& product() const { return view_.bits == 4 ? tier_.nibbles : tier_.bytes; }

    const Tier& tier_;
    int cols_;
    InputOrder order_;
    std::shared_ptr<std::uint8_t> memory_;  // words, scales, offsets, kept, bias, in this order
    std::size_t nbytes_;
    std::uint32_t* words_;
    float *scales_, *offsets_, *bias_ = nullptr;
    std::uint16_t* kept_ = nullptr;
    W4View view_{};
};

}  // namespace halfbyte
