// Error-compensated rounding of a few columns of a weight, one after the other: the part that no matrix product can do.
// Included by tier.hpp only; plain loops, vectorized by the compiler for the tier's instructions.
//
// All matrices are transposed: a row here is a column of W, `stride` floats from the next, and output rows are lanes.
// LANES of them go through all columns while they stay in L1: 64 columns × 32 × 4 bytes = 8 KiB, beside 16 KiB of
// couplings. Operations: 2 · columns² / 2 + about 12 · columns a lane; the rest of the work on a weight is products of
// `columns` × everything else, which the caller leaves to torch.
#pragma once

#include "rounding.hpp"

namespace halfbyte {
namespace {

// Its own type for each tier, so that no tier's instructions are merged into another's.
template <class S>
struct RoundingKernel {
    static constexpr int LANES = 32;

    // x.5 goes to the even neighbour, as in torch; exact for |value| < 2^22.
    static inline float round_even(float value) { return (value + 0x1.8p23f) - 0x1.8p23f; }

    template <bool REVISIT>
    static void round_lanes(const RoundingBlock& b, std::size_t first, int count) {
        float work[RoundingBlock::MAX_COLUMNS][LANES];
        for (int k = 0; k < b.columns; ++k) {
            for (int l = 0; l < LANES; ++l) work[k][l] = 0.0f;
            for (int l = 0; l < count; ++l) work[k][l] = b.work[k * b.stride + first + l];
        }
        for (int i = 0; i < b.columns; ++i) {
            const std::size_t at = i * b.stride + first;
            float scale[LANES], zero[LANES], before[LANES] = {}, moved[LANES], code[LANES] = {};
            for (int l = 0; l < LANES; ++l) scale[l] = 1.0f, zero[l] = 0.0f;
            for (int l = 0; l < count; ++l) scale[l] = b.scales[at + l], zero[l] = b.zeros[at + l];
            if (REVISIT) {
                for (int l = 0; l < count; ++l) code[l] = b.codes[at + l];
                for (int l = 0; l < LANES; ++l) before[l] = (code[l] - zero[l]) * scale[l];
            }
            const float pivot = b.pivots[i], max_code = b.max_code;
            for (int l = 0; l < LANES; ++l) {
                const float target = REVISIT ? before[l] - work[i][l] * pivot : work[i][l];
                float steps = target / scale[l];
                const float low = -zero[l], high = max_code - zero[l];
                steps = steps > low ? steps : low;  // before rounding: the bounds are integers, and a NaN ends here
                steps = steps < high ? steps : high;
                steps = round_even(steps);
                code[l] = steps + zero[l];
                moved[l] = REVISIT ? steps * scale[l] - before[l] : (target - steps * scale[l]) * pivot;
            }
            for (int k = i + 1; k < b.columns; ++k) {
                const float coupling = b.couplings[i * b.columns + k];
                for (int l = 0; l < LANES; ++l) work[k][l] += coupling * moved[l];
            }
            for (int l = 0; l < count; ++l) b.codes[at + l] = code[l], b.moved[at + l] = moved[l];
        }
    }

    static void round_block(const RoundingBlock& b) {
        for (std::size_t first = 0; first < b.rows; first += LANES) {
            const int count = b.rows - first < LANES ? static_cast<int>(b.rows - first) : LANES;
            if (b.revisit)
                round_lanes<true>(b, first, count);
            else
                round_lanes<false>(b, first, count);
        }
    }
};

}  // namespace
}  // namespace halfbyte
