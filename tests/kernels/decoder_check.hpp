// Checks of a tier's part in the decoder against double precision; each returns its failures and prints one line for each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "decoder.hpp"
#include "dtypes.hpp"

namespace decoder_check {

using namespace halfbyte;

inline std::mt19937& random_bits() {
    static std::mt19937 bits(11);
    return bits;
}
inline float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_bits()); }

struct Rows {
    explicit Rows(std::size_t bytes) : memory(bytes + 64) {}
    void* data() { return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64); }
    std::vector<std::uint8_t> memory;
};

// Codes times activations in 8 bits: exact but for the last few roundings, given the quantized activations.
inline int check_a8(const Tier& tier, int rows, int cols, int groups, int bits) {
    constexpr int MOST = 9;
    int failures = 0;
    const int size = cols / groups;
    std::vector<std::uint8_t> codes(rows * cols), zeros(rows * groups);
    std::vector<float> scales(rows * groups), bias(rows), x(MOST * cols), first;
    for (auto& c : codes) c = random_bits()() % (1u << bits);
    for (auto& z : zeros) z = random_bits()() % (1u << bits);
    for (auto& s : scales) s = from_f16(to_f16(1.5f + uniform()));
    for (auto& b : bias) b = uniform();
    for (auto& value : x) value = 3 * uniform();
    std::fill_n(x.begin() + cols, size, 0.0f);  // a group of zeros
    const A8Linear linear(tier, codes.data(), scales.data(), zeros.data(), bias.data(), rows, cols, groups, bits);
    Rows prepared(MOST * linear.prepared_bytes());
    auto* bytes = static_cast<std::int8_t*>(prepared.data());
    for (int m = 0; m < MOST; ++m) linear.prepare(&x[m * cols], bytes + m * linear.prepared_bytes());
    for (int m : {1, 2, 3, 4, 5, 8, MOST}) {
        std::vector<float> y(m * rows, -7.0f);
        linear.multiply(bytes, m, y.data(), rows, 0, 1);
        linear.multiply(bytes, m, y.data(), rows, 1, linear.blocks());
        for (int i = 0; i < m; ++i) {
            const std::int8_t* row = bytes + i * linear.prepared_bytes();
            for (int n = 0; n < rows; ++n) {
                double sum = bias[n], most = std::fabs(bias[n]);
                for (int k = 0; k < cols; ++k) {
                    const int g = k / size;
                    float scale;
                    std::memcpy(&scale, row + cols + 8 * g, sizeof scale);
                    if (std::fabs(scale * row[k] - x[i * cols + k]) > 0.501f * scale + 1e-6f && ++failures)
                        std::printf("a8: input %d is quantized to %d\n", k, row[k]);
                    const double weight = scales[n * groups + g] * (codes[n * cols + k] - zeros[n * groups + g]);
                    sum += weight * row[k] * static_cast<double>(scale);
                    most += std::fabs(weight * x[i * cols + k]);
                }
                if (!(std::fabs(y[i * rows + n] - sum) <= 1e-5 * most) && ++failures)
                    std::printf("a8 [%d, %d] %d bits, M = %d: %g for %g\n", rows, cols, bits, m, y[i * rows + n], sum);
            }
        }
        if (m == 1) first = y;
        if (std::memcmp(first.data(), y.data(), sizeof(float) * rows) != 0 && ++failures)
            std::printf("a8 [%d, %d] %d bits, M = %d: row 0 has other bits than alone\n", rows, cols, bits, m);
    }
    return failures;
}

// Keys and values of one span, as a cache holds them, and as the numbers they stand for.
struct Span {
    Span(const Tier& tier, CacheType cache_type, int width)
        : type(cache_type), head_dim(width), cache({0}, 1, 1, width, SPAN, cache_type), at(cache.head(0, 0, 0)) {
        std::vector<float> key(head_dim), value(head_dim);
        for (int p = 0; p < SPAN; ++p) {
            for (auto& k : key) k = uniform();
            for (auto& v : value) v = 3 * uniform();
            if (p == 3) std::fill(key.begin(), key.end(), 0.0f);  // a scale of nothing
            const int lane = p % KEY_BLOCK, block = (p - lane) * head_dim;
            if (type == CacheType::int8) {
                at.key_scales[p] = tier.math.store_key_int8(key.data(), head_dim, int8(at.keys) + block, lane);
                at.value_scales[p] = tier.math.store_value_int8(value.data(), head_dim, int8(at.values) + p * head_dim);
            } else {
                tier.math.store_key(key.data(), head_dim, fp16(at.keys) + block, lane);
                tier.math.store_value(value.data(), head_dim, fp16(at.values) + p * head_dim);
            }
            for (int d = 0; d < head_dim; ++d) {
                const double step = type == CacheType::int8 ? 3.0 / 254 + 1e-6 : 3.0 / 2048;
                if (!(std::fabs(this->key(p, d) - key[d]) <= step) || !(std::fabs(this->value(p, d) - value[d]) <= step))
                    wrong = true;
            }
        }
    }
    static std::int8_t* int8(std::uint8_t* p) { return reinterpret_cast<std::int8_t*>(p); }
    static std::uint16_t* fp16(std::uint8_t* p) { return reinterpret_cast<std::uint16_t*>(p); }
    double number(std::uint8_t* from, const float* scales, int p, int index) const {
        return type == CacheType::int8 ? static_cast<double>(scales[p]) * int8(from)[index] : from_f16(fp16(from)[index]);
    }
    double key(int p, int d) const {
        return number(at.keys, at.key_scales, p, p / KEY_BLOCK * KEY_BLOCK * head_dim + d * KEY_BLOCK + p % KEY_BLOCK);
    }
    double value(int p, int d) const { return number(at.values, at.value_scales, p, p * head_dim + d); }
    CacheType type;
    int head_dim;
    KvCache cache;
    KvHead at;
    bool wrong = false;
};

// One span of attention, positions [begin, end) of it.
inline int check_attention(const Tier& tier, CacheType type, int count, int head_dim, int begin, int end, float softcap) {
    int failures = 0;
    const Span span(tier, type, head_dim);
    if (span.wrong && ++failures) std::printf("cache: numbers are stored wrongly\n");
    std::vector<float> queries(count * head_dim), results(count * (head_dim + 16));
    for (auto& q : queries) q = uniform();
    tier.attend({queries.data(), static_cast<std::size_t>(head_dim), count, head_dim, type, span.at.keys, span.at.values,
                 span.at.key_scales, span.at.value_scales, begin, end, softcap, results.data(),
                 static_cast<std::size_t>(head_dim) + 16});
    for (int q = 0; q < count; ++q) {
        std::vector<double> scores;
        for (int p = begin; p < end; ++p) {
            double score = 0.0;
            for (int d = 0; d < head_dim; ++d)
                score += static_cast<double>(queries[q * head_dim + d]) * span.key(p, d);
            scores.push_back(softcap != 0.0f ? softcap * std::tanh(score / softcap) : score);
        }
        const double most = *std::max_element(scores.begin(), scores.end());
        double sum = 0.0;
        std::vector<double> out(head_dim);
        for (int p = begin; p < end; ++p) {
            const double weight = std::exp(scores[p - begin] - most);
            sum += weight;
            for (int d = 0; d < head_dim; ++d) out[d] += weight * span.value(p, d);
        }
        const float* found = &results[q * (head_dim + 16)];
        bool right = std::fabs(found[0] - most) < 1e-4 && std::fabs(found[1] - sum) < 1e-4 * sum;
        for (int d = 0; d < head_dim; ++d) right = right && std::fabs(found[2 + d] - out[d]) < 3e-4 * sum;
        if (!right && ++failures) std::printf("attention: query %d of %d, [%d, %d)\n", q, count, begin, end);
    }
    return failures;
}

// A whole small model in 16 bit, for the sanitizers and for agreement between chunks, and between a ring and a whole cache:
// several sequences, one of them long.
inline int check_decoder(const Tier& tier) {
    DecoderConfig config;
    config.hidden = 48, config.heads = 6, config.kv_heads = 2, config.head_dim = 16, config.intermediate = 72;
    config.vocabulary = 37, config.rotary_pairs = 6, config.attention_scale = 0.25f, config.logits_softcap = 5.0f;
    std::vector<std::vector<std::uint16_t>> weights;
    const auto linear = [&](int rows, int cols) {
        weights.emplace_back(static_cast<std::size_t>(rows) * cols);
        for (auto& w : weights.back()) w = to_bf16(0.3f * uniform());
        return std::make_shared<HalfLinear>(tier, weights.back().data(), DType::bf16, nullptr, rows, cols, true);
    };
    weights.reserve(20);
    std::vector<DecoderLayer> layers(2);
    for (auto& layer : layers) {
        layer.qkv = {linear(96, 48), linear(32, 48), linear(32, 48)};
        layer.output = linear(48, 96);
        layer.gate_up = {linear(72, 48), linear(72, 48)};
        layer.down = linear(48, 72);
        layer.attention_norm.assign(48, 1.0f);
        layer.mlp_norm.assign(48, 1.0f);
    }
    layers[1].window = 20;
    const auto head = linear(37, 48);
    Decoder decoder(tier, config, layers, std::vector<float>(48, 1.0f), head, weights.back().data(), DType::bf16);
    constexpr int TOKENS = 600;
    std::vector<float> cosines(TOKENS * 6), sines(TOKENS * 6);
    for (int i = 0; i < TOKENS * 6; ++i) cosines[i] = std::cos(0.1f * i), sines[i] = std::sin(0.1f * i);
    decoder.set_rotation(0, cosines.data(), sines.data(), TOKENS);

    std::vector<std::int32_t> ids(TOKENS), sequences(TOKENS, 1), positions(TOKENS), wanted(TOKENS);
    for (int i = 0; i < TOKENS; ++i) ids[i] = random_bits()() % 37, positions[i] = wanted[i] = i;
    std::vector<float> whole(TOKENS * 37), parts(TOKENS * 37);
    int failures = 0;
    for (const CacheType type : {CacheType::fp16, CacheType::int8}) {
        KvCache cache({0, 0}, 2, 2, 16, TOKENS, type), ring({0, 20}, 2, 2, 16, TOKENS, type);
        if (!(ring.slots(1) < TOKENS && decoder.takes(ring)) && ++failures) std::printf("decoder: no ring\n");
        decoder.step(cache, {ids.data(), sequences.data(), positions.data(), TOKENS, wanted.data(), TOKENS, whole.data()});
        for (int at = 0, count = 1; at < TOKENS; at += count, count = std::min(count % 7 + 1, TOKENS - at))
            decoder.step(ring, {&ids[at], &sequences[at], &positions[at], count, wanted.data(), count, &parts[at * 37]});
        const int back = TOKENS - SLACK;
        decoder.step(ring, {&ids[back], &sequences[back], &positions[back], SLACK, wanted.data(), SLACK, &parts[back * 37]});
        for (const float logit : whole)
            if (!(std::fabs(logit) <= 5.0f) && ++failures) std::printf("decoder: logit %g\n", logit);
        if (std::memcmp(whole.data(), parts.data(), sizeof(float) * whole.size()) != 0 && ++failures)
            std::printf("decoder: other bits in steps and on a ring than at once\n");
    }
    return failures;
}

// The error of a range, and the two forms of a refit.
inline int check_range(const Tier& tier, int groups, int size, int rows, bool projected) {
    int failures = 0;
    const int all = groups * size * rows;
    std::vector<float> weights(all), projections(all), grams(groups * size * size), scales(groups * rows),
        zeros(groups * rows), quadratic(groups * rows, -7.0f), linear(groups * rows, -7.0f);
    for (auto& w : weights) w = uniform();
    for (auto& p : projections) p = uniform();
    for (auto& s : scales) s = 0.2f + 0.1f * uniform();
    for (auto& z : zeros) z = static_cast<float>(random_bits()() % 8);
    for (int g = 0; g < groups; ++g)
        for (int i = 0; i < size; ++i)
            for (int j = 0; j <= i; ++j)
                grams[(g * size + i) * size + j] = grams[(g * size + j) * size + i] = uniform();
    const RangeTrial trial{weights.data(), grams.data(),     projected ? projections.data() : nullptr,
                           scales.data(),  zeros.data(),     quadratic.data(),
                           linear.data(),  std::size_t(rows), size,
                           7.0f};
    tier.try_range(trial, 0, 1);
    tier.try_range(trial, 1, groups);
    for (int g = 0; g < groups; ++g)
        for (int r = 0; r < rows; ++r) {
            const float scale = scales[g * rows + r], zero = zeros[g * rows + r];
            std::vector<double> x(size);
            double expected = 0.0, along = 0.0, most = 0.0;
            for (int i = 0; i < size; ++i) {
                const int at = (g * size + i) * rows + r;
                const float code = std::min(std::max(std::nearbyint(weights[at] / scale), -zero), 7.0f - zero);
                x[i] = projected ? code : static_cast<double>(scale) * code - weights[at];
                along += code * projections[at];
            }
            for (int i = 0; i < size; ++i)
                for (int j = 0; j < size; ++j) {
                    expected += x[i] * grams[(g * size + i) * size + j] * x[j];
                    most += std::fabs(x[i] * x[j]);
                }
            const int at = g * rows + r;
            if (!(std::fabs(quadratic[at] - expected) <= 1e-5 * most + 1e-6) && ++failures)
                std::printf("range %d %d: %g, not %g\n", size, r, quadratic[at], expected);
            if (projected && !(std::fabs(linear[at] - along) <= 1e-4 * size) && ++failures)
                std::printf("range %d %d: along %g, not %g\n", size, r, linear[at], along);
        }
    return failures;
}

inline int check_tier(const Tier& tier) {
    int failures = 0;
    for (const bool projected : {false, true})
        failures += check_range(tier, 2, 64, 37, projected) + check_range(tier, 3, 18, 32, projected);
    for (const int bits : {4, 6, 8}) {
        failures += check_a8(tier, 37, 64, 2, bits) + check_a8(tier, 48, 192, 3, bits);
        failures += check_a8(tier, 16, 128, 1, bits) + check_a8(tier, 83, 256, 2, bits);
    }
    for (const CacheType type : {CacheType::fp16, CacheType::int8})
        for (int count = 1; count <= QUERIES; ++count) {
            failures += check_attention(tier, type, count, 16, 0, 1, 0.0f);
            failures += check_attention(tier, type, count, 48, 5, 70, 0.0f);
            failures += check_attention(tier, type, count, 80, 0, SPAN, 2.0f);
        }
    return failures + check_decoder(tier);
}

}  // namespace decoder_check
