// The error of a candidate range for every group of a weight: x · G · x with G of group size × group size.
// Included by tier.hpp only.
//
// Output rows are lanes: 2 vectors of them (16 with AVX2) go through one group while its x (64 × 16 × 4 bytes = 4 KiB) and
// its G (16 KiB) stay in L1. G is symmetric, so only what lies left of the diagonal is read, four rows of it at a time:
// 8 products of vectors for 4 broadcasts and 2 loads. Operations: size² / 2 products a lane, and about 10 · size to find the
// codes. Floor for 64 weights of 16 rows: 4096 products of vectors, 2048 cycles at two a cycle.
#pragma once

#include <cstring>

#include "range.hpp"

namespace halfbyte {
namespace {

template <class S>
struct RangeKernel {
    using F = typename S::F;
    static constexpr int WIDTH = S::WIDTH, LANES = 2 * WIDTH, TILE = 4;

    struct Lanes {
        alignas(64) float x[RangeTrial::MAX_SIZE][LANES];
        alignas(64) float linear[LANES];
    };

    template <bool PROJECTED>
    static void find(const RangeTrial& t, std::size_t group, std::size_t first, int count, Lanes& out) {
        alignas(64) float padded[LANES];
        const std::size_t at = group * t.rows + first;
        const auto vectors = [&](const float* from, F (&to)[2]) {
            if (count < LANES) {
                std::memset(padded, 0, sizeof padded);
                std::memcpy(padded, from, count * sizeof(float));
                from = padded;
            }
            to[0] = S::load(from), to[1] = S::load(from + WIDTH);
        };
        const F magic = S::set1(0x1.8p23f), no_magic = S::set1(-0x1.8p23f), minus = S::set1(-1.0f);
        F scale[2], low[2], high[2], linear[2];
        vectors(t.scales + at, scale);
        vectors(t.zeros + at, low);
        for (int v = 0; v < 2; ++v) {
            scale[v] = S::max(scale[v], S::set1(1e-30f));  // of the lanes that are not there
            low[v] = S::mul(low[v], minus);
            high[v] = S::add(low[v], S::set1(t.max_code));
            linear[v] = S::set1(0.0f);
        }
        for (int i = 0; i < t.size; ++i) {
            F weight[2], along[2];
            vectors(t.weights + (group * t.size + i) * t.rows + first, weight);
            if (PROJECTED) vectors(t.projections + (group * t.size + i) * t.rows + first, along);
            for (int v = 0; v < 2; ++v) {
                // Clamped before it is rounded: the bounds are integers. x.5 goes to the even neighbour, as in torch.
                F steps = S::min(S::max(S::div(weight[v], scale[v]), low[v]), high[v]);
                steps = S::add(S::add(steps, magic), no_magic);
                if (PROJECTED) linear[v] = S::fma(steps, along[v], linear[v]);
                S::store(out.x[i] + v * WIDTH, PROJECTED ? steps : S::fma(scale[v], steps, S::mul(weight[v], minus)));
            }
        }
        for (int v = 0; v < 2; ++v) S::store(out.linear + v * WIDTH, linear[v]);
    }

    // Adds x_i · (Σ_{j < i} G_ij x_j + G_ii x_i / 2) for ROWS rows i from `i` on; the whole is half of x · G · x.
    template <int ROWS>
    static inline void rows(const float* gram, int size, int i, const Lanes& lanes, F (&total)[2]) {
        F acc[ROWS][2];
        for (int r = 0; r < ROWS; ++r) acc[r][0] = acc[r][1] = S::set1(0.0f);
        for (int j = 0; j < i; ++j) {
            const F x0 = S::load(lanes.x[j]), x1 = S::load(lanes.x[j] + WIDTH);
            for (int r = 0; r < ROWS; ++r) {
                const F g = S::set1(gram[(i + r) * size + j]);
                acc[r][0] = S::fma(g, x0, acc[r][0]);
                acc[r][1] = S::fma(g, x1, acc[r][1]);
            }
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int j = 0; j <= r; ++j) {
                const F g = S::set1(j == r ? 0.5f * gram[(i + r) * size + i + j] : gram[(i + r) * size + i + j]);
                acc[r][0] = S::fma(g, S::load(lanes.x[i + j]), acc[r][0]);
                acc[r][1] = S::fma(g, S::load(lanes.x[i + j] + WIDTH), acc[r][1]);
            }
            total[0] = S::fma(acc[r][0], S::load(lanes.x[i + r]), total[0]);
            total[1] = S::fma(acc[r][1], S::load(lanes.x[i + r] + WIDTH), total[1]);
        }
    }

    static void try_range(const RangeTrial& t, int begin, int end) {
        Lanes lanes;
        for (int group = begin; group < end; ++group) {
            const float* gram = t.grams + static_cast<std::size_t>(group) * t.size * t.size;
            for (std::size_t first = 0; first < t.rows; first += LANES) {
                const int count = t.rows - first < LANES ? static_cast<int>(t.rows - first) : LANES;
                if (t.projections)
                    find<true>(t, group, first, count, lanes);
                else
                    find<false>(t, group, first, count, lanes);
                F total[2] = {S::set1(0.0f), S::set1(0.0f)};
                int i = 0;
                for (; i + TILE <= t.size; i += TILE) rows<TILE>(gram, t.size, i, lanes, total);
                for (; i < t.size; ++i) rows<1>(gram, t.size, i, lanes, total);
                float found[LANES];
                S::store(found, total[0]);
                S::store(found + WIDTH, total[1]);
                for (int l = 0; l < count; ++l) t.quadratic[group * t.rows + first + l] = 2.0f * found[l];
                if (t.projections)
                    for (int l = 0; l < count; ++l) t.linear[group * t.rows + first + l] = lanes.linear[l];
            }
        }
    }
};

}  // namespace
}  // namespace halfbyte
