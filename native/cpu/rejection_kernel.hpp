// The passes of the rejection sampler over a vocabulary. Included by tier.hpp only.
//
// `masses` is the one that counts: it reads p and q once, 8 bytes a token, and works on vectors held in registers:
//
//     w = max(p - q, 0)            t = round(w · 2^20)      high += t
//     rest = w - t · 2^-20         l = round(rest · 2^40)   low  += l        mass = high · 2^20 + low
//
// Rounding is the addition of 1.5 · 2^23, whose bits then hold the integer, so no conversion to 64 bits is needed. The rest is
// exact: a multiple of w's last place, at most 2^-21. t · 2^20 is even, so ties go where round(w · 2^40) takes them.
// Ranges: w <= 1.001, so t < 2^21 and |l| <= 2^19; sums over a block of 256 stay below 2^29 in 32 bits.
// Products are with powers of two, hence exact: S::fma gives the same bits whether it rounds once or twice.
// A value is in [0, MOST] if neither its bits nor MOST's less its bits have the sign bit: three integer operations.
#pragma once

#include <cstring>
#include <limits>

#include "math_kernel.hpp"
#include "rejection.hpp"

namespace halfbyte {
namespace {

// Spelled out: GCC 12 takes a vector whose size depends on a template parameter for a scalar.
template <int WIDTH>
struct Words;
template <>
struct Words<4> {
    typedef std::uint32_t type __attribute__((vector_size(16)));
};
template <>
struct Words<8> {
    typedef std::uint32_t type __attribute__((vector_size(32)));
};
template <>
struct Words<16> {
    typedef std::uint32_t type __attribute__((vector_size(64)));
};

template <class S>
struct RejectionKernel {
    using F = typename S::F;
    using U = typename Words<S::WIDTH>::type;
    static constexpr int WIDTH = S::WIDTH, BLOCK = RejectionMath::BLOCK, LANES = 32;
    static constexpr std::uint32_t MAGIC_BITS = 0x4B400000u, MOST_BITS = 0x3F802000u;

    // Not returned: for its model a tier's vectors are wider than the registers the compiler may use.
    static inline void take_bits(const F& f, U& bits) { std::memcpy(&bits, &f, sizeof bits); }

    struct Sums {
        U high{}, low{}, bad{};
        std::uint32_t vectors = 0;
    };

    static inline void note_range(const F& f, Sums& sums) {
        U bits;
        take_bits(f, bits);
        sums.bad |= bits | (MOST_BITS - bits);
    }

    template <bool RESIDUAL>
    static inline void add(const float* p, const float* q, Sums& sums) {
        const F magic = S::set1(0x1.8p23f), minus_magic = S::set1(-0x1.8p23f);
        F w = S::load(p);
        note_range(w, sums);
        if constexpr (RESIDUAL) {
            const F other = S::load(q);
            note_range(other, sums);
            w = S::max(S::fma(other, S::set1(-1.0f), w), S::set1(0.0f));
        }
        const F high = S::fma(w, S::set1(0x1p20f), magic);
        const F rest = S::fma(S::add(high, minus_magic), S::set1(-0x1p-20f), w);
        const F low = S::fma(rest, S::set1(0x1p40f), magic);
        U high_bits, low_bits;
        take_bits(high, high_bits);
        take_bits(low, low_bits);
        sums.high += high_bits;  // with the bits of 1.5 · 2^23, taken off at the end; unsigned numbers wrap
        sums.low += low_bits;
        ++sums.vectors;
    }

    template <bool RESIDUAL>
    static bool blocks(const float* p, const float* q, std::size_t count, std::size_t begin, std::size_t end,
                       std::int64_t* masses) {
        U bad{};
        for (std::size_t block = begin; block < end; ++block) {
            const std::size_t at = block * BLOCK, size = count - at < BLOCK ? count - at : BLOCK;
            Sums sums;
            std::size_t i = 0;
            for (; i + WIDTH <= size; i += WIDTH) add<RESIDUAL>(p + at + i, RESIDUAL ? q + at + i : nullptr, sums);
            if (i < size) {
                float rest_p[WIDTH] = {}, rest_q[WIDTH] = {};
                std::memcpy(rest_p, p + at + i, (size - i) * sizeof(float));
                if constexpr (RESIDUAL) std::memcpy(rest_q, q + at + i, (size - i) * sizeof(float));
                add<RESIDUAL>(rest_p, rest_q, sums);
            }
            std::uint32_t high = 0 - MAGIC_BITS * WIDTH * sums.vectors, low = high;
            for (int l = 0; l < WIDTH; ++l) high += sums.high[l], low += sums.low[l];
            masses[block] = static_cast<std::int64_t>(high) * (1 << 20) + static_cast<std::int32_t>(low);
            bad |= sums.bad;
        }
        std::uint32_t any = 0;
        for (int l = 0; l < WIDTH; ++l) any |= bad[l];
        return any >> 31 == 0;
    }

    static bool masses(const float* p, const float* q, std::size_t count, std::size_t begin, std::size_t end,
                       std::int64_t* out) {
        return q ? blocks<true>(p, q, count, begin, end, out) : blocks<false>(p, q, count, begin, end, out);
    }

    static bool group_maxima(const float* z, std::size_t count, float* maxima) {
        constexpr std::size_t GROUPS = RejectionMath::GROUPS;
        constexpr float INFINITE = std::numeric_limits<float>::infinity();
        int bad[LANES] = {};
        for (std::size_t g = 0; g < GROUPS; ++g) maxima[g] = -INFINITE;
        std::size_t at = 0;
        for (; at + GROUPS <= count; at += GROUPS)
            for (std::size_t g = 0; g < GROUPS; g += LANES)
                for (int l = 0; l < LANES; ++l) {
                    const float value = z[at + g + l];
                    bad[l] |= value < INFINITE ? 0 : 1;
                    maxima[g + l] = value > maxima[g + l] ? value : maxima[g + l];
                }
        int any = 0;
        for (std::size_t g = 0; at + g < count; ++g) {
            any |= z[at + g] < INFINITE ? 0 : 1;
            maxima[g] = z[at + g] > maxima[g] ? z[at + g] : maxima[g];
        }
        for (int l = 0; l < LANES; ++l) any |= bad[l];
        return any == 0;
    }

    static void score(const float* z, std::size_t count, float highest, float temperature, float* scores) {
        if (temperature == 1.0f)
            for (std::size_t i = 0; i < count; ++i) scores[i] = z[i] - highest;
        else
            for (std::size_t i = 0; i < count; ++i) scores[i] = (z[i] - highest) / temperature;
    }

    static void weigh(float* scores, std::size_t count) {
        for (std::size_t i = 0; i < count; ++i) scores[i] = exp_of(scores[i]);
    }

    static bool weigh_blocks(const float* z, std::size_t count, float highest, float temperature, float* weights,
                             std::int64_t* masses_of) {
        bool good = true;
        for (std::size_t at = 0; at < count; at += BLOCK) {
            const std::size_t size = count - at < BLOCK ? count - at : BLOCK;
            score(z + at, size, highest, temperature, weights + at);
            weigh(weights + at, size);
            good &= blocks<false>(weights + at, nullptr, size, 0, 1, masses_of + at / BLOCK);
        }
        return good;
    }

    static void keep_from(float* weights, std::size_t count, float least) {
        for (std::size_t i = 0; i < count; ++i) weights[i] = weights[i] >= least ? weights[i] : 0.0f;
    }

    static void scale(float* weights, std::size_t count, float factor) {
        for (std::size_t i = 0; i < count; ++i) weights[i] *= factor;
    }

    static std::size_t gather(const float* z, std::size_t count, float least, std::int32_t* indices, std::size_t room) {
        std::size_t found = 0;
        const auto look = [&](std::size_t begin, std::size_t end) {
            for (std::size_t i = begin; i < end; ++i)
                if (z[i] >= least) {
                    if (found < room) indices[found] = static_cast<std::int32_t>(i);
                    ++found;
                }
        };
        std::size_t at = 0;
        for (; at + LANES <= count; at += LANES) {
            int any = 0;
            for (int l = 0; l < LANES; ++l) any |= z[at + l] >= least ? 1 : 0;
            if (any) look(at, at + LANES);
        }
        look(at, count);
        return found;
    }

    static constexpr RejectionMath math() { return {masses, group_maxima, score, weigh, weigh_blocks, keep_from, scale, gather}; }
};

}  // namespace
}  // namespace halfbyte
