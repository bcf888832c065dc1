// The product of a few float32 rows with a 16-bit weight as torch holds it: y[m, n] = Σ_k x[m, k] · weight[n, k].
//
//     weight[n][k]   bf16 or fp16, row-major, read once, in place: an output head is tied to the embedding, and a copy in
//                    another layout would cost as much memory as all 4-bit weights of a small model together
//
// Bytes: 2 a weight. Operations: for each vector of weights a widening (bf16: extend, shift; fp16: convert) and M FMAs: at M = 1
// far from the arithmetic's limit, so the only floor is the memory's.
// Error: WIDTH chains of K / WIDTH FMAs and a sum of those: under K · 2^-24 · Σ|x|·|weight|, and a row has the same bits whatever
// M is. Several rows of weights go together: their chains hide the latency of the FMA, and activations are read once for all.
#pragma once

#include <cstring>
#include <type_traits>

#include "dtypes.hpp"
#include "w4.hpp"

namespace halfbyte {
namespace {

template <class S>
struct HalfKernel {
    using F = typename S::F;
    static constexpr int STEP = S::WIDTH;  // inputs a round

    static F load(const std::uint16_t* weight, std::integral_constant<bool, true>) { return S::load_bf16(weight); }
    static F load(const std::uint16_t* weight, std::integral_constant<bool, false>) { return S::load_f16(weight); }

    // Inputs [k, k + STEP) of R weight rows, `cols` apart, times M rows of x.
    template <int M, int R, bool BF16>
    static inline void step(const std::uint16_t* weight, std::size_t cols, const float* x, std::size_t x_stride, F (&acc)[M][R]) {
        F w[R];
        for (int r = 0; r < R; ++r) w[r] = load(weight + r * cols, std::integral_constant<bool, BF16>{});
        for (int m = 0; m < M; ++m) {
            const F value = S::load(x + m * x_stride);
            for (int r = 0; r < R; ++r) acc[m][r] = S::fma(w[r], value, acc[m][r]);
        }
    }

    template <int M, int R, bool BF16>
    __attribute__((noinline)) static void dot(const std::uint16_t* weight, int cols, const float* x, std::size_t x_stride,
                                              float (*sums)[R]) {
        constexpr int LINE_NUMBERS = 32;
        F acc[M][R];
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < R; ++r) acc[m][r] = S::set1(0.0f);
        int k = 0;
        for (; k + LINE_NUMBERS <= cols; k += LINE_NUMBERS) {
            // The next R rows in the order of their addresses: one stream, where the rows themselves are R of them.
            for (int r = 0; r < R; ++r)
                __builtin_prefetch(weight + static_cast<std::size_t>(R) * (cols + k) + r * LINE_NUMBERS);
            for (int i = 0; i < LINE_NUMBERS; i += STEP) step<M, R, BF16>(weight + k + i, cols, x + k + i, x_stride, acc);
        }
        for (; k + STEP <= cols; k += STEP) step<M, R, BF16>(weight + k, cols, x + k, x_stride, acc);
        if (k < cols) {
            std::uint16_t last[R][STEP] = {};
            for (int r = 0; r < R; ++r)
                std::memcpy(last[r], weight + static_cast<std::size_t>(r) * cols + k, sizeof(std::uint16_t) * (cols - k));
            step<M, R, BF16>(last[0], STEP, x + k, x_stride, acc);
        }
        for (int m = 0; m < M; ++m)
            for (int r = 0; r < R; ++r) {
                float lanes[S::WIDTH];
                S::store(lanes, acc[m][r]);
                for (int half = S::WIDTH / 2; half > 0; half /= 2)
                    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
                sums[m][r] = lanes[0];
            }
    }

    // Rows of weights at a time: with their accumulators, a weight each and an activation they fit sixteen registers.
    static constexpr int rows_at_once(int m) { return m <= 1 ? 8 : m == 2 ? 4 : m <= 4 ? 3 : 2; }

    template <int M, int R, bool BF16>
    static inline void rows(const void* weight, int cols, const float* x, std::size_t x_stride, const Output& out, int first,
                            int end) {
        for (; first + R <= end; first += R) {
            float sums[M][R];
            const auto* from = static_cast<const std::uint16_t*>(weight) + static_cast<std::size_t>(first) * cols;
            dot<M, R, BF16>(from, cols, x, x_stride, sums);
            for (int m = 0; m < M; ++m) store_run<S>(out, m, first, sums[m], R);
        }
        if constexpr (R > 1)
            if (first < end) rows<M, R / 2, BF16>(weight, cols, x, x_stride, out, first, end);
    }

    template <bool BF16>
    static void multiply_rows(const void* weight, int cols, const float* x, std::size_t x_stride, int m, const Output& out,
                              int begin, int end) {
        switch (m) {
            case 1: return rows<1, rows_at_once(1), BF16>(weight, cols, x, x_stride, out, begin, end);
            case 2: return rows<2, rows_at_once(2), BF16>(weight, cols, x, x_stride, out, begin, end);
            case 3: return rows<3, rows_at_once(3), BF16>(weight, cols, x, x_stride, out, begin, end);
            case 4: return rows<4, rows_at_once(4), BF16>(weight, cols, x, x_stride, out, begin, end);
            case 5: return rows<5, rows_at_once(5), BF16>(weight, cols, x, x_stride, out, begin, end);
            default: return rows<6, rows_at_once(6), BF16>(weight, cols, x, x_stride, out, begin, end);
        }
    }

    // Weight rows [begin, end) for M <= HALF_ROWS rows of x [M][x_stride], zero from cols to the next multiple of 64.
    static void multiply(const void* weight, DType dtype, int cols, const float* x, std::size_t x_stride, int m,
                         const Output& out, int begin, int end) {
        static_assert(64 % STEP == 0, "x is padded to a multiple of 64");
        if (dtype == DType::bf16)
            multiply_rows<true>(weight, cols, x, x_stride, m, out, begin, end);
        else
            multiply_rows<false>(weight, cols, x, x_stride, m, out, begin, end);
    }
};

}  // namespace
}  // namespace halfbyte
