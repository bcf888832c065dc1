// What both kernels are given, and how sums become results.
#pragma once

#include "stripes.cuh"
#include "w4a16_layout.cuh"
#include "w4a16_types.cuh"

namespace halfbyte {

struct Product {
    const void* x;         // [m, k]
    const uint4* weights;  // see w4a16_layout.cuh
    const u32* scales;
    const u32* zeros;       // not read without zero points
    const float* row_scale;  // [n]
    const float* bias;       // [n] or null
    void* y;                 // [m, n]
    float4* partials;        // see stripes.cuh
    u32* flags;
    int m, n, k;
    int group_shift;  // 2^group_shift tiles along K share a scale; not read where a tile has two groups

    DEVICE int strips() const { return n / TILE; }
    DEVICE int tiles() const { return k / TILE; }
    // The scale group of a tile, or of one of its halves.
    template <bool PAIR>
    DEVICE int group(int tile, int half) const {
        return PAIR ? 2 * tile + half : tile >> group_shift;
    }
    template <bool PAIR>
    DEVICE int groups() const {
        return group<PAIR>(tiles() - 1, 1) + 1;
    }
};

constexpr int WARPS = 8, THREADS = WARPS * LANES, WARP_SUBTILES = 2;

// The sums of 16 rows of W, from `column` of y on, and eight of x to y. In: c0 to c3 of the lane, rows of W along the
// lanes' groups and rows of x within them; transposed, a lane has two neighbours of a row of y.
template <class Type>
DEVICE void store_sums(const Product& p, int row, int column, int lane, const float* sums) {
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int n = column + 8 * half + g;
        const float scale = load_constant<float>(p.row_scale + n);
        const float bias = p.bias == nullptr ? 0 : load_constant<float>(p.bias + n);
        const u32 pair = transpose(Type::pack(sums[2 * half] * scale + bias, sums[2 * half + 1] * scale + bias));
        if (row + g < p.m) {
            const long long at = static_cast<long long>(row + g) * p.n + column + 8 * half + 2 * t;
            store_global<u32>(static_cast<char*>(p.y) + 2 * at, pair);
        }
    }
}

}  // namespace halfbyte
