// One row of target probabilities or logits: how a warp reads it, and what a token of it weighs after temperature,
// top-k, top-p and min-p. Nothing of that is written down: a weight is a function of a number, its place and a few
// thresholds, computed anew in every pass.
#pragma once

#include "machine_blocks.cuh"

namespace halfbyte {

constexpr int LANES = 32;
// Tokens whose masses are summed into one number; what a warp reads at a time.
constexpr int SEGMENT = 512;
// A probability, what softmax rounds forgiven.
constexpr float MOST = 1.0009765625f;
// Below and above any difference of fp32 logits that matters.
constexpr double LEAST_TEMPERATURE = 1e-30, MOST_TEMPERATURE = 1e38;

// 16 bytes hold UNIT numbers of the target.
struct Fp32 {
    static constexpr int BYTES = 4, UNIT = 4;
    DEVICE static float load(const char* row, int id) { return load_constant<float>(row + 4LL * id); }
    DEVICE static void unpack(const uint4& words, float* values) {
        values[0] = bits_float(words.x), values[1] = bits_float(words.y);
        values[2] = bits_float(words.z), values[3] = bits_float(words.w);
    }
};
struct Fp16 {
    static constexpr int BYTES = 2, UNIT = 8;
    DEVICE static float load(const char* row, int id) { return low_f16(load_constant<unsigned short>(row + 2LL * id)); }
    DEVICE static void unpack(const uint4& words, float* values) {
        const u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) values[2 * i] = low_f16(pairs[i]), values[2 * i + 1] = high_f16(pairs[i]);
    }
};
struct Bf16 {
    static constexpr int BYTES = 2, UNIT = 8;
    DEVICE static float load(const char* row, int id) {
        return bits_float(static_cast<u32>(load_constant<unsigned short>(row + 2LL * id)) << 16);
    }
    DEVICE static void unpack(const uint4& words, float* values) {
        const u32 pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            values[2 * i] = bits_float(pairs[i] << 16), values[2 * i + 1] = bits_float(pairs[i] & 0xFFFF0000u);
        }
    }
};

// A warp calls use(id, number of the target, number of the draft) for each token of a segment, each lane for its own.
// TOGETHER numbers of a lane are under way before the first is used: in loads of 128 bits where rows begin at a
// multiple of 16 bytes and the segment is whole, else one by one, neighbours by neighbouring lanes. What is missing of
// the last segment are tokens that weigh nothing: `nothing` as the target's number, 0 as the draft's.
template <class Type, bool DRAFT, int TOGETHER, class Use>
DEVICE void read_segment(const char* target, const float* draft, int segment, int vocabulary, float nothing, Use&& use) {
    constexpr int UNIT = Type::UNIT, LOADS = TOGETHER / UNIT;
    const int lane = thread_index() % LANES, begin = segment * SEGMENT;
    const int end = begin + SEGMENT < vocabulary ? begin + SEGMENT : vocabulary;
    u64 addresses = reinterpret_cast<u64>(target);
    if (DRAFT) addresses |= reinterpret_cast<u64>(draft);
    const bool wide = addresses % 16 == 0 && end == begin + SEGMENT;
#pragma unroll 1
    for (int first = begin + (wide ? lane * UNIT : lane); first < end; first += TOGETHER * LANES) {
        float values[TOGETHER], others[TOGETHER] = {};
        if (wide) {
            uint4 words[LOADS];
#pragma unroll
            for (int i = 0; i < LOADS; ++i) {
                const int id = first + i * LANES * UNIT;
                words[i] = load_constant<uint4>(target + static_cast<long long>(id) * Type::BYTES);
#pragma unroll
                for (int j = 0; DRAFT && j < UNIT; j += 4) {
                    const float4 four = load_constant<float4>(draft + id + j);
                    others[i * UNIT + j] = four.x, others[i * UNIT + j + 1] = four.y;
                    others[i * UNIT + j + 2] = four.z, others[i * UNIT + j + 3] = four.w;
                }
            }
#pragma unroll
            for (int i = 0; i < LOADS; ++i) Type::unpack(words[i], values + i * UNIT);
        } else {
#pragma unroll
            for (int i = 0; i < TOGETHER; ++i) {
                const int id = first + i * LANES;
                values[i] = id < end ? Type::load(target, id) : nothing;
                if (DRAFT) others[i] = id < end ? load_constant<float>(draft + id) : 0.0f;
            }
        }
#pragma unroll
        for (int i = 0; i < TOGETHER; ++i) {
            const int id = first + (wide ? i / UNIT * LANES * UNIT + i % UNIT : i * LANES);
            use(id, values[i], others[i]);
        }
    }
}

// Comparisons are false for a NaN.
DEVICE bool is_probability(float value) { return value >= 0.0f && value <= MOST; }
DEVICE float infinity() { return bits_float(0x7F800000); }

// round(weight · 2^40), ties to even, as high · 2^20 + low, in 32 bits each: high = round(weight · 2^20), and low is
// what the rest, which is exact, times 2^40 rounds to. Rounding is the addition of 1.5 · 2^23, whose bits then hold the
// integer; high · 2^20 is even, so ties go where they would. Sums of 512 fit: high < 2^21, |low| <= 2^19.
struct Mass {
    u32 high, low;  // low is signed
};
DEVICE Mass mass_of(float weight) {
    constexpr float MAGIC = 12582912.0f;
    constexpr u32 MAGIC_BITS = 0x4B400000u;
    const float high = fused(weight, 1048576.0f, MAGIC);
    const float rest = fused(subtract(high, MAGIC), -1.0f / 1048576.0f, weight);
    const float low = fused(rest, 1099511627776.0f, MAGIC);
    return {float_bits(high) - MAGIC_BITS, float_bits(low) - MAGIC_BITS};
}
DEVICE u64 joined(Mass mass) {
    return (static_cast<u64>(mass.high) << 20) + static_cast<u64>(static_cast<long long>(static_cast<int>(mass.low)));
}

// exp(x) to 2 units in the last place, 0 below -87: native/cpu/math_kernel.hpp's, with fused operations throughout, so
// that the model of the GPU computes the same bits.
DEVICE float exp_of(float x) {
    x = x < 88.0f ? x : 88.0f;
    if (!(x >= -87.0f)) return 0.0f;
    constexpr float MAGIC = 12582912.0f;
    const float n = subtract(fused(x, 1.44269504f, MAGIC), MAGIC);
    const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = fused(p, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    p = fused(multiply(p, r), r, r) + 1.0f;
    return multiply(p, bits_float(static_cast<u32>(static_cast<int>(n) + 127) << 23));
}

// Tokens in the order in which filters keep them, as integers: by number, ties to the lower ids. No two are equal.
constexpr int ID_BITS = 22, RANK_BITS = 32 + ID_BITS;
constexpr u32 LAST_ID = (1u << ID_BITS) - 1;
DEVICE u32 ordered(float value) {
    const u32 bits = float_bits(value + 0.0f);  // -0 equals 0
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float restored(u32 order) { return bits_float(order >> 31 ? order & 0x7FFFFFFFu : ~order); }
DEVICE u64 rank_of(float value, int id) {
    return static_cast<u64>(ordered(value)) << ID_BITS | (LAST_ID - static_cast<u32>(id));
}
constexpr u64 NO_RANK = ~0ull;  // above every rank: that of a damaged number

// What a token weighs.
struct Distribution {
    bool as_it_is, logits, scored, greedy;
    float highest, divisor;          // score: (logit or ln p - highest) / divisor; else p itself
    u64 least_score, least_weight;  // ranks of the last that top-k and top-p keep
    float least, factor;            // min-p; 1 / Σ of what is kept

    DEVICE float score(float value) const {
        if (!scored) return value;
        const float distance = subtract(logits ? value : logarithm(value), highest);
        return divisor == 1.0f ? distance : divide(distance, divisor);
    }
    DEVICE float weight_of_score(float score) const { return scored ? exp_of(score) : score; }
    // 0 for what was filtered out.
    DEVICE float weight(float value, int id) const {
        const float score = this->score(value);
        if (rank_of(score, id) < least_score) return 0.0f;
        const float weight = weight_of_score(score);
        return rank_of(weight, id) >= least_weight && weight >= least ? weight : 0.0f;
    }
    DEVICE float probability(float value, int id) const {
        if (as_it_is) return value;
        if (greedy) return rank_of(score(value), id) >= least_score ? 1.0f : 0.0f;
        return multiply(weight(value, id), factor);
    }
    // What a token weighs nothing with, and ranks below every other.
    DEVICE float nothing() const { return logits ? -infinity() : 0.0f; }
    DEVICE bool is_valid(float value) const { return logits ? value < infinity() : is_probability(value); }
};

}  // namespace halfbyte
