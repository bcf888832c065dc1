// The product of a8.hpp for several rows of activations on tiers whose multiply-add reads a vector from memory but cannot repeat a
// number while doing so. With M = 4 rows a quarter of the instructions would be broadcasts; here a few rows are repeated once and used
// for all output rows. Included by a8_kernel.hpp only.
//
//     wide: [groups] × { [inputs / 4][M] vectors, each four inputs in every lane
//                        [M] vectors of s_g | [M] vectors of Σq, in every lane s0 + s1 · 2^16 with Σq = s0 + 128 · s1 }
//
// For 64 inputs, 8 output rows and M = 4 on avx2, counted in the compiled loop: 128 multiply-adds (from memory), 120 additions, 32
// operations to unpack, 8 to widen the sums, 35 for the end of the group; 64 broadcasts fewer than without.
//
// zero · Σq by 16-bit pairs: (zero, 128 · zero) · (s0, s1). zero < 2^8, so 128 · zero < 2^15; 0 <= s0 < 128; |s1| is at most the size
// of a group, and a group of which M rows fit L1 has less than 2^15 inputs.
#pragma once

#include <cstring>

#include "a8.hpp"
#include "w4.hpp"

namespace halfbyte {
namespace {

// The tier's type S provides, beside what A8Kernel wants:
//     WIDE_ROWS, WIDE_LEAST: rows at a time, at most and at least; 0 if it does better without
//     wide_dot32<BITS, M>(words, x, begins, acc): 32 inputs of one vector of output rows; `begins` sets acc, else they are added
//     store_words, halves, spread_zeros, minus_halves: the parts of zero · Σq
template <class S>
struct A8Wide {
    using F = typename S::F;
    using I = typename S::I;
    static constexpr int VECTORS = BLOCK_ROWS / S::WIDTH, LANE_BYTES = 4 * S::WIDTH;
    // Of repeated rows at a time: they stay in an L1 of 32 KiB beside the weights that pass.
    static constexpr int L1_BYTES = 21 << 10;

    static int group_bytes(const A8View& w, int m) { return m * (w.group_octets * 2 + 2) * LANE_BYTES; }
    static bool takes(const A8View& w) {
        return S::WIDE_ROWS > 0 && w.bits != 6 && group_bytes(w, S::WIDE_ROWS) <= L1_BYTES;
    }
    static std::size_t scratch_bytes(const A8View& w, int m) { return takes(w) && m >= S::WIDE_LEAST ? L1_BYTES : 0; }

    template <int M>
    static void widen(const A8View& w, const std::int8_t* x, std::size_t stride, int first, int last, std::int8_t* out) {
        const int size = w.group_octets * OCTET, inputs = w.octets * OCTET;
        for (int g = first; g < last; ++g) {
            for (int k = g * size; k < (g + 1) * size; k += 4)
                for (int m = 0; m < M; ++m, out += LANE_BYTES) S::store_words(out, S::broadcast4(x + m * stride + k));
            const std::int8_t* ends = x + inputs + 8 * g;
            for (int m = 0; m < M; ++m, out += LANE_BYTES) S::store_words(out, S::broadcast4(ends + m * stride));
            for (int m = 0; m < M; ++m, out += LANE_BYTES) {
                std::int32_t sum;
                std::memcpy(&sum, ends + m * stride + 4, sizeof sum);
                S::store_words(out, S::halves(sum));
            }
        }
    }

    // Groups [first, last) of one vector of output rows; what the groups before them make is in y.
    template <int BITS, int M>
    __attribute__((noinline)) static void tile(const A8View& w, const std::int8_t* x, int first, int last, float* y,
                                               std::size_t y_stride, int vector) {
        const std::size_t block_words = a8_block_words(w), block = vector / VECTORS;
        const int lane = vector % VECTORS * S::WIDTH;
        const std::uint32_t* words = w.words + block * block_words + lane + static_cast<std::size_t>(first) * w.group_octets * BITS * 4;
        // Scales are two bytes a lane, zeros one.
        const std::uint8_t* meta = w.meta + (block * w.groups + first) * A8_META + lane;
        float* to = y + vector * S::WIDTH;
        F total[M];
        for (int m = 0; m < M; ++m) total[m] = first ? S::load(to + m * y_stride) : S::set1(0.0f);
        for (int g = first; g < last; ++g, meta += A8_META) {
            I acc[M];
            for (int octet = 0; octet < w.group_octets; octet += 4) {
                for (int line = 0; line < BITS; ++line) __builtin_prefetch(words + block_words + line * BLOCK_ROWS, 0, 2);
                S::template wide_dot32<BITS, M>(words, x, octet == 0, acc);
                words += BITS * BLOCK_ROWS;
                x += A8_INPUTS / 4 * M * LANE_BYTES;
            }
            const F scale = S::load_f16(reinterpret_cast<const std::uint16_t*>(meta + lane));
            const I zeros = S::spread_zeros(S::load_zeros(meta + 32));
            for (int m = 0; m < M; ++m, x += LANE_BYTES) {
                const F exact = S::to_float(S::minus_halves(acc[m], zeros, x + M * LANE_BYTES));
                total[m] = S::fma(exact, S::mul(scale, S::load(reinterpret_cast<const float*>(x))), total[m]);
            }
            x += M * LANE_BYTES;
        }
        for (int m = 0; m < M; ++m) S::store(to + m * y_stride, total[m]);
    }

    // M rows times the vectors [first, last) of output rows.
    template <int BITS, int M>
    static void rows(const A8View& w, const std::int8_t* x, std::size_t stride, float* y, std::size_t y_stride, int first, int last,
                     std::int8_t* scratch) {
        const int groups = L1_BYTES / group_bytes(w, M);
        for (int g = 0; g < w.groups; g += groups) {
            const int end = g + groups < w.groups ? g + groups : w.groups;
            widen<M>(w, x, stride, g, end, scratch);
            for (int vector = first; vector < last; ++vector) tile<BITS, M>(w, scratch, g, end, y, y_stride, vector);
        }
    }

    // Some of m rows, from the first on; how many.
    template <int BITS, int M = S::WIDE_ROWS>
    static int multiply(const A8View& w, const std::int8_t* x, std::size_t stride, int m, float* y, std::size_t y_stride, int first,
                        int last, std::int8_t* scratch) {
        int row = 0;
        for (; row + M <= m; row += M)
            rows<BITS, M>(w, x + row * stride, stride, y + row * y_stride, y_stride, first, last, scratch);
        if constexpr (M > S::WIDE_LEAST)
            row += multiply<BITS, M - 1>(w, x + row * stride, stride, m - row, y + row * y_stride, y_stride, first, last, scratch);
        return row;
    }
};

}  // namespace
}  // namespace halfbyte
