#include "half_multiply.hpp"

#include <cstring>

#include "parallel.hpp"

namespace halfbyte {

void half_multiply(const Tier& tier, const void* weight, DType dtype, int rows, int cols, const float* bias, const float* x,
                   float* y, int m) {
    const std::size_t stride = round_up(static_cast<std::size_t>(cols), 64);
    float* padded = scratch(stride * m);
    for (int i = 0; i < m; ++i) {
        std::memcpy(padded + i * stride, x + static_cast<std::size_t>(i) * cols, sizeof(float) * cols);
        std::fill(padded + i * stride + cols, padded + (i + 1) * stride, 0.0f);
    }
    for (int first = 0; first < m; first += HALF_ROWS) {
        const int count = std::min(HALF_ROWS, m - first);
        const Output out{y + static_cast<std::size_t>(first) * rows, DType::f32, static_cast<std::size_t>(rows), rows, bias};
        parallel(rows, static_cast<std::size_t>(rows) * cols * count, [&](int begin, int end) {
            tier.half_multiply(weight, dtype, cols, padded + first * stride, stride, count, out, begin, end);
        });
    }
}

}  // namespace halfbyte
