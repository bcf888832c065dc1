// y = x · Wᵀ + bias for a few float32 rows and a 16-bit weight in torch's own layout, over the pool.
#pragma once

#include "w4.hpp"

namespace halfbyte {

// weight: [rows][cols] bf16 or f16; x: [m][cols] and y: [m][rows] float32, contiguous; bias: [rows] or null. The weight is
// read once for every HALF_ROWS rows.
void half_multiply(const Tier& tier, const void* weight, DType dtype, int rows, int cols, const float* bias, const float* x,
                   float* y, int m);

}  // namespace halfbyte
