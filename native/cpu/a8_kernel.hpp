// The product of a8.hpp, once over a tier's integer vectors. Included by tier.hpp only; everything has internal linkage.
//
// The tier's type S provides, for vectors I of WIDTH 32-bit lanes (one lane an output row):
//     dot32_nibbles<M, V>(words, x, acc): four octets of V vectors of rows times 32 inputs of M activation rows
//     dot32_sixes<M, V>(words, x, acc):   the same with codes of six bits, six lines
//     dot32_bytes<M, V>(words, x, acc):   the same with eight lines of bytes
//     zero, load_zeros, minus_product, to_float: the ends of a group
// M rows share the unpacking. Operations for 64 bytes of nibbles on avx2, M = 1: 2 loads, 6 to unpack, 4 multiply-adds of pairs,
// 4 additions; about 4 cycles, a third of what the same bytes take from memory.
#pragma once

#include <cstring>

#include "a8.hpp"
#include "a8_wide.hpp"
#include "w4.hpp"

namespace halfbyte {
namespace {

template <class S>
struct A8Kernel {
    using F = typename S::F;
    using I = typename S::I;
    static constexpr int VECTORS = BLOCK_ROWS / S::WIDTH, LINES_AHEAD = 16, A8_ROWS = 4;

    static void quantize(const float* x, int cols, int groups, std::int8_t* row) {
        const int size = cols / groups;
        auto* ends = reinterpret_cast<std::uint8_t*>(row + cols);
        for (int g = 0; g < groups; ++g) {
            const float* from = x + g * size;
            std::int8_t* to = row + g * size;
            F larger = S::set1(0.0f);
            for (int i = 0; i < size; i += S::WIDTH) {
                const F value = S::load(from + i);
                larger = S::max(S::max(value, S::mul(value, S::set1(-1.0f))), larger);  // a NaN leaves it
            }
            float lanes[S::WIDTH], most = 0.0f;
            S::store(lanes, larger);
            for (const float lane : lanes) most = lane > most ? lane : most;
            // Below 2^-120 the reciprocal is not finite; such a group is zero for every purpose.
            const float inverse = most > 0x1p-120f ? 127.0f / most : 0.0f;
            std::int32_t sum = 0;
            for (int i = 0; i < size; i += A8_INPUTS) {
                // With 1.5 · 2^23 added the last bits of a float are the nearest integer, in two's complement.
                float rounded[A8_INPUTS];
                for (int j = 0; j < A8_INPUTS; j += S::WIDTH)
                    S::store(rounded + j, S::add(S::mul(S::load(from + i + j), S::set1(inverse)), S::set1(0x1.8p23f)));
                std::int32_t codes[A8_INPUTS];
                std::memcpy(codes, rounded, sizeof codes);
                for (int j = 0; j < A8_INPUTS; ++j) to[i + j] = static_cast<std::int8_t>(codes[j] & 255);
                for (int j = 0; j < A8_INPUTS; ++j) sum += codes[j] - 0x4B400000;
            }
            const float scale = most / 127.0f;
            std::memcpy(ends + 8 * g, &scale, sizeof scale);
            std::memcpy(ends + 8 * g + 4, &sum, sizeof sum);
        }
    }

    // M rows × V neighbouring vectors of output rows, `vector` the first.
    template <int BITS, int M, int V>
    __attribute__((noinline)) static void tile(const A8View& w, const std::int8_t* x, std::size_t stride, float* y,
                                               std::size_t y_stride, int vector) {
        // Thirty-two inputs are as many lines as a code has bits.
        const std::size_t block_words = a8_block_words(w);
        const std::uint32_t* words[V];
        const std::uint8_t* meta[V];
        for (int v = 0; v < V; ++v) {
            const std::size_t block = (vector + v) / VECTORS;
            const int lane = (vector + v) % VECTORS * S::WIDTH;
            words[v] = w.words + block * block_words + lane;
            meta[v] = w.meta + block * w.groups * A8_META + lane;
        }
        const std::int8_t* rows[M];
        for (int m = 0; m < M; ++m) rows[m] = x + m * stride;
        const int inputs = w.octets * OCTET;
        F total[M][V];
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) total[m][v] = S::set1(0.0f);
        std::size_t at = 0;  // words from the start of the block
        const std::size_t ahead = V > VECTORS ? block_words * (V / VECTORS) : LINES_AHEAD * BLOCK_ROWS;
        for (int g = 0, k = 0; g < w.groups; ++g) {
            I acc[M][V];
            for (int m = 0; m < M; ++m)
                for (int v = 0; v < V; ++v) acc[m][v] = S::zero();
            for (int octet = 0; octet < w.group_octets; octet += 4, k += A8_INPUTS) {
                // Into L2. One block at a time is one stream, for the next one lies behind it; of several, a block is about a
                // page, too short for the hardware to catch up.
                for (int v = 0; v < V; v += VECTORS)
                    for (int line = 0; line < BITS; ++line)
                        __builtin_prefetch(words[v] + at + ahead + line * BLOCK_ROWS, 0, 2);
                const std::uint32_t* from[V];
                const std::int8_t* to[M];
                for (int v = 0; v < V; ++v) from[v] = words[v] + at;
                for (int m = 0; m < M; ++m) to[m] = rows[m] + k;
                if constexpr (BITS == 4)
                    S::template dot32_nibbles<M, V>(from, to, acc);
                else if constexpr (BITS == 6)
                    S::template dot32_sixes<M, V>(from, to, acc);
                else
                    S::template dot32_bytes<M, V>(from, to, acc);
                at += BITS * BLOCK_ROWS;
            }
            for (int v = 0; v < V; ++v) {
                const std::uint8_t* m48 = meta[v] + static_cast<std::size_t>(g) * A8_META;
                // meta[v] already stands `lane` bytes in: scales are two bytes a lane, zeros one.
                const int lane = (vector + v) % VECTORS * S::WIDTH;
                const F scale = S::load_f16(reinterpret_cast<const std::uint16_t*>(m48 + lane));
                const I zeros = S::load_zeros(m48 + 32);
                for (int m = 0; m < M; ++m) {
                    float x_scale;
                    std::int32_t sum;
                    std::memcpy(&x_scale, rows[m] + inputs + 8 * g, sizeof x_scale);
                    std::memcpy(&sum, rows[m] + inputs + 8 * g + 4, sizeof sum);
                    const F exact = S::to_float(S::minus_product(acc[m][v], zeros, sum));
                    total[m][v] = S::fma(exact, S::mul(scale, S::set1(x_scale)), total[m][v]);
                }
            }
        }
        for (int m = 0; m < M; ++m)
            for (int v = 0; v < V; ++v) S::store(y + m * y_stride + (vector + v) * S::WIDTH, total[m][v]);
    }

    template <int BITS, int M, int V>
    static void tiles(const A8View& w, const std::int8_t* x, std::size_t stride, float* y, std::size_t y_stride, int vector,
                      int end) {
        for (; vector + V <= end; vector += V) tile<BITS, M, V>(w, x, stride, y, y_stride, vector);
        if constexpr (V > 1)
            if (vector < end) tiles<BITS, M, V / 2>(w, x, stride, y, y_stride, vector, end);
    }

    // M rows at a time, then what is left at once.
    template <int BITS, int M = A8_ROWS>
    static void rows(const A8View& w, const std::int8_t* x, std::size_t stride, int m, float* y, std::size_t y_stride, int first,
                     int last) {
        constexpr int V = M == 1 ? S::A8_VECTORS_1 : M == 2 ? S::A8_VECTORS_2 : S::A8_VECTORS_4;
        for (; m >= M; m -= M, x += M * stride, y += M * y_stride) tiles<BITS, M, V>(w, x, stride, y, y_stride, first, last);
        if constexpr (M > 1) rows<BITS, M - 1>(w, x, stride, m, y, y_stride, first, last);
    }

    template <int BITS>
    static void multiply_bits(const A8View& w, const std::int8_t* x, std::size_t stride, int m, float* y,
                              std::size_t y_stride, int begin, int end, std::int8_t* scratch) {
        if constexpr (S::WIDE_ROWS > 0 && BITS != 6)
            if (A8Wide<S>::takes(w)) {
                const int done = A8Wide<S>::template multiply<BITS>(w, x, stride, m, y, y_stride, begin * VECTORS, end * VECTORS, scratch);
                x += done * stride;
                y += done * y_stride;
                m -= done;
            }
        // If there are several tiles of rows, a few blocks stay in L1 while all of them pass.
        const int strip = m > A8_ROWS ? S::A8_BLOCKS : end - begin;
        for (int block = begin; block < end; block += strip)
            rows<BITS>(w, x, stride, m, y, y_stride, block * VECTORS, (block + strip < end ? block + strip : end) * VECTORS);
    }

    static void multiply(const A8View& w, const std::int8_t* x, std::size_t stride, int m, float* y, std::size_t y_stride,
                         int begin, int end, std::int8_t* scratch) {
        if (w.bits == 4)
            multiply_bits<4>(w, x, stride, m, y, y_stride, begin, end, scratch);
        else if (w.bits == 6)
            multiply_bits<6>(w, x, stride, m, y, y_stride, begin, end, scratch);
        else
            multiply_bits<8>(w, x, stride, m, y, y_stride, begin, end, scratch);
    }

    static constexpr A8Product product() { return {quantize, A8Wide<S>::scratch_bytes, multiply}; }
};

}  // namespace
}  // namespace halfbyte
