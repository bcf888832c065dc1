// All that a tier provides, from one small vector type S. Included by tier_*.cpp only.
#pragma once

#include "a8_kernel.hpp"
#include "attention_kernel.hpp"
#include "half_kernel.hpp"
#include "math_kernel.hpp"
#include "range_kernel.hpp"
#include "rejection_kernel.hpp"
#include "rounding_kernel.hpp"
#include "w4_kernel.hpp"

namespace halfbyte {
namespace {

// The products for both widths of codes, the one with 16-bit weights, ranges, rounding, rejection, and the rooflines.
template <class S>
struct TierOf {
    using F = typename S::F;

    static float read(const void* data, std::size_t n, int passes) {
        const auto* floats = static_cast<const float*>(data);
        constexpr int LANES = 256 / (4 * S::WIDTH);
        F sums[LANES];
        for (int i = 0; i < LANES; ++i) sums[i] = S::set1(0.0f);
        for (int pass = 0; pass < passes; ++pass)
            for (std::size_t at = 0; at + 256 <= n; at += 256)
                for (int i = 0; i < LANES; ++i) sums[i] = S::add(sums[i], S::load(floats + at / 4 + i * S::WIDTH));
        float total = 0.0f, lanes[S::WIDTH];
        for (int i = 0; i < LANES; ++i) {
            S::store(lanes, sums[i]);
            for (float lane : lanes) total += lane;
        }
        return total;
    }

    static double fma(std::int64_t steps, float* sink) {
        constexpr int CHAINS = 12;  // latency 4 × 2 a cycle = 8; a few more cost nothing
        F acc[CHAINS];
        for (int i = 0; i < CHAINS; ++i) acc[i] = S::set1(static_cast<float>(i));
        const F a = S::set1(0.999f), b = S::set1(1e-3f);
        for (std::int64_t step = 0; step < steps; ++step)
            for (int i = 0; i < CHAINS; ++i) acc[i] = S::fma(acc[i], a, b);
        float lanes[S::WIDTH];
        for (int i = 0; i < CHAINS; ++i) {
            S::store(lanes, acc[i]);
            *sink += lanes[0];
        }
        return 2.0 * CHAINS * S::WIDTH * static_cast<double>(steps);
    }

    static double int8_dots(std::int64_t steps, float* sink) {
        // The compiler must not know what is multiplied.
        volatile std::uint32_t one = 0x01010101;
        alignas(64) std::uint32_t words[S::WIDTH];
        for (auto& word : words) word = one;
        const auto ones = S::load_words(words);
        typename S::I acc[S::DOT_CHAINS];
        for (auto& sums : acc) sums = S::zero();
        for (std::int64_t step = 0; step < steps; ++step)
            for (auto& sums : acc) sums = S::add_dots(sums, ones, ones);
        float lanes[S::WIDTH];
        for (const auto& sums : acc) {
            S::store(lanes, S::to_float(sums));
            for (const float lane : lanes) *sink += lane;
        }
        return 2.0 * S::DOT_CHAINS * S::DOT_BYTES * S::WIDTH * static_cast<double>(steps);
    }

    static constexpr Tier tier(const char* name) {
        PeakLoop bytes = nullptr;
        if constexpr (S::DOT_BYTES > 0) bytes = int8_dots;
        return {name,
                S::GEMV_BLOCKS,
                S::TILE_ROWS,
                S::PANEL_BLOCKS,
                W4Kernel<S, 4>::product(),
                W4Kernel<S, 8>::product(),
                HalfKernel<S>::multiply,
                A8Kernel<S>::product(),
                AttentionKernel<S>::attend,
                MathKernel<S>::math(),
                RoundingKernel<S>::round_block,
                RangeKernel<S>::try_range,
                RejectionKernel<S>::math(),
                read,
                fma,
                bytes,
                S::BF16_DOTS};
    }
};

}  // namespace
}  // namespace halfbyte
