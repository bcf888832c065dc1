// The rejection sampler of a tier against a plain loop in double precision; returns its failures, one line for each.
#pragma once

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "rejection.hpp"
#include "rejection_row.hpp"
#include "w4.hpp"

namespace rejection_check {

using namespace halfbyte;

inline std::vector<float> distribution(std::mt19937& bits, std::size_t count) {
    std::vector<float> row(count);
    double sum = 0;
    for (auto& value : row) sum += value = std::exp(3 * std::normal_distribution<float>()(bits));
    for (auto& value : row) value = static_cast<float>(value / sum);
    return row;
}

// One draft, as many rows as there are uniform numbers; every count of tokens meets the tails of blocks and vectors.
inline int check_tokens(const Tier& tier, std::size_t count, bool logits, bool certain, const double* settings) {
    std::mt19937 bits(static_cast<unsigned>(count));
    const std::vector<float> p = distribution(bits, count), q = distribution(bits, count);
    int failures = 0;
    for (int trial = 0; trial < 20; ++trial) {
        const float u[2] = {std::uniform_real_distribution<float>(0, 0.999f)(bits), trial / 20.0f};
        const auto x = static_cast<std::int64_t>(bits() % count);
        std::vector<float> target(p);
        if (logits)
            for (auto& value : target) value = std::log(value);
        target.insert(target.end(), target.begin(), target.begin() + count);
        std::int64_t ids[2], number;
        const int faults = reject(tier, {&x, certain ? nullptr : q.data(), target.data(), nullptr, u, settings, 0, logits, 1, 1,
                                         count, ids, &number});
        TargetRow row;
        row.prepare(tier, target.data(), count, logits, settings);
        const double p_of_x = row.at(x), q_of_x = certain ? 1.0 : q[x];
        const bool accepted = u[0] * static_cast<float>(q_of_x) < static_cast<float>(p_of_x);
        std::vector<double> weights(count);
        double total = 0, below = 0;
        for (std::size_t i = 0; i < count; ++i) {
            const double taken = accepted ? 0.0 : certain ? static_cast<double>(i == static_cast<std::size_t>(x)) : q[i];
            total += weights[i] = std::max(row.at(static_cast<std::int64_t>(i)) - taken, 0.0);
        }
        const std::int64_t token = ids[accepted];
        const bool inside = token >= 0 && token < static_cast<std::int64_t>(count);
        for (std::int64_t i = 0; inside && i < token; ++i) below += weights[i];
        // Masses are rounded to 2^-41 each.
        const double point = u[1] * total, slack = 1e-12 * static_cast<double>(count) + 1e-6 * total;
        const bool right = inside && (total <= 1e-9 || (below <= point + slack && below + weights[token] >= point - slack));
        if ((faults || number != 1 + accepted || (accepted && ids[0] != x) || !right) && ++failures)
            std::printf("%s: reject %zu %d %d: token %lld\n", tier.name, count, logits, certain, static_cast<long long>(token));
    }
    return failures;
}

inline int check_tier(const Tier& tier) {
    const double settings[][4] = {{1, 1e9, 1, 0}, {0.7, 1e9, 1, 0}, {1, 5, 1, 0}, {1, 700, 0.9, 0}, {1.3, 1e9, 0.8, 0.01}, {0, 1e9, 1, 0}};
    int failures = 0;
    for (std::size_t count : {1, 3, 17, 255, 256, 257, 1029, 5000})
        for (bool logits : {false, true})
            for (bool certain : {false, true}) {
                failures += check_tokens(tier, count, logits, certain, nullptr);
                for (const auto& chosen : settings) failures += check_tokens(tier, count, logits, certain, chosen);
            }
    return failures;
}

}  // namespace rejection_check
