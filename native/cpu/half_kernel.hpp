// The product of a few float32 rows with a 16-bit weight as torch holds it: y[m, n] = Σ_k x[m, k] · weight[n, k].
//
//     weight[n][k]   bf16 or fp16, row-major, read once, in place: an output head is tied to the embedding, and a copy in
//                    another layout would cost as much memory as all 4-bit weights of a small model together
//
// Bytes: 2 a weight. Operations: for each vector of weights a widening (bf16: extend, shift; fp16: convert) and M FMAs: at M = 1
// far from the arithmetic's limit, so the only floor is the memory's.
// Error: 4 · WIDTH chains of K / (4 · WIDTH) FMAs and a sum of those: under K · 2^-24 · Σ|x|·|weight|, and a row has the
// same bits whatever M is.
#pragma once

#include <cstring>

#include "dtypes.hpp"
#include "w4.hpp"

namespace halfbyte {
namespace {

template <class S>
struct HalfKernel {
    static constexpr int CHAINS = 4;                  // hides the latency of the FMA at M = 1
    static constexpr int STEP = CHAINS * S::WIDTH;    // inputs a round
    using F = typename S::F;

    // Inputs [k, k + STEP) of one weight row, times M rows of x.
    template <int M, bool BF16>
    static inline void step(const std::uint16_t* weight, const float* x, std::size_t x_stride, F (&acc)[M][CHAINS]) {
        for (int c = 0; c < CHAINS; ++c) {
            const F w = BF16 ? S::load_bf16(weight + c * S::WIDTH) : S::load_f16(weight + c * S::WIDTH);
            for (int m = 0; m < M; ++m) acc[m][c] = S::fma(w, S::load(x + m * x_stride + c * S::WIDTH), acc[m][c]);
        }
    }

    template <int M, bool BF16>
    __attribute__((noinline)) static void dot(const std::uint16_t* weight, int cols, const float* x, std::size_t x_stride,
                                              float* sums) {
        F acc[M][CHAINS];
        for (int m = 0; m < M; ++m)
            for (int c = 0; c < CHAINS; ++c) acc[m][c] = S::set1(0.0f);
        int k = 0;
        for (; k + STEP <= cols; k += STEP) step<M, BF16>(weight + k, x + k, x_stride, acc);
        if (k < cols) {
            std::uint16_t last[STEP] = {};
            std::memcpy(last, weight + k, sizeof(std::uint16_t) * (cols - k));
            step<M, BF16>(last, x + k, x_stride, acc);
        }
        for (int m = 0; m < M; ++m) {
            float lanes[S::WIDTH];
            S::store(lanes, S::add(S::add(acc[m][0], acc[m][1]), S::add(acc[m][2], acc[m][3])));
            sums[m] = 0.0f;
            for (const float lane : lanes) sums[m] += lane;
        }
    }

    template <bool BF16>
    static inline void dot_rows(int m, const std::uint16_t* weight, int cols, const float* x, std::size_t x_stride,
                                float* sums) {
        switch (m) {
            case 1: return dot<1, BF16>(weight, cols, x, x_stride, sums);
            case 2: return dot<2, BF16>(weight, cols, x, x_stride, sums);
            case 3: return dot<3, BF16>(weight, cols, x, x_stride, sums);
            default: return dot<4, BF16>(weight, cols, x, x_stride, sums);
        }
    }

    // Weight rows [begin, end) for M <= HALF_ROWS rows of x [M][x_stride], zero from cols to the next multiple of 64.
    static void multiply(const void* weight, DType dtype, int cols, const float* x, std::size_t x_stride, int m,
                         const Output& out, int begin, int end) {
        static_assert(64 % STEP == 0, "x is padded to a multiple of 64");
        for (int first = begin; first < end; first += BLOCK_ROWS) {
            const int count = end - first < BLOCK_ROWS ? end - first : BLOCK_ROWS;
            float values[HALF_ROWS][BLOCK_ROWS];
            for (int r = 0; r < count; ++r) {
                const auto* row = static_cast<const std::uint16_t*>(weight) + static_cast<std::size_t>(first + r) * cols;
                float sums[HALF_ROWS];
                if (dtype == DType::bf16)
                    dot_rows<true>(m, row, cols, x, x_stride, sums);
                else
                    dot_rows<false>(m, row, cols, x, x_stride, sums);
                for (int i = 0; i < m; ++i) values[i][r] = sums[i];
            }
            for (int i = 0; i < m; ++i) store_run<S>(out, i, first, values[i], count);
        }
    }
};

}  // namespace
}  // namespace halfbyte
