// Checks of a tier's products with packed and 16-bit weights against double precision; each returns its failures and prints one
// line for each.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "dtypes.hpp"
#include "half_multiply.hpp"
#include "w4_matrix.hpp"

namespace product_check {

using namespace halfbyte;

inline std::mt19937& random_bits() {
    static std::mt19937 bits(7);
    return bits;
}
inline float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_bits()); }

struct Shape {
    int rows, cols, group, bits;
    int kept;      // columns in 16 bit
    bool ordered;  // groups that are no neighbours, and a scale on every input
    DType kept_dtype;
};

struct Problem {
    Shape shape;
    int groups;
    std::vector<std::uint8_t> codes;
    std::vector<float> scales, offsets, bias, input_scale;
    std::vector<std::int32_t> group_index, kept_columns;
    std::vector<std::uint16_t> kept_weight;

    explicit Problem(const Shape& s)
        : shape(s), groups((s.cols + s.group - 1) / s.group), codes(s.rows * s.cols), bias(s.rows) {
        for (auto& code : codes) code = random_bits()() % (1u << s.bits);
        for (int i = 0; i < s.rows * groups; ++i) {
            scales.push_back((1.5f + uniform()) / static_cast<float>(8 << s.bits));
            offsets.push_back(-scales.back() * static_cast<float>(random_bits()() % (1u << s.bits)));
        }
        for (auto& b : bias) b = uniform();
        for (int k = 0; k < s.cols; ++k) {
            group_index.push_back(k / s.group);
            input_scale.push_back(s.ordered ? 1.5f + uniform() : 1.0f);
        }
        if (s.ordered) std::shuffle(group_index.begin(), group_index.end(), random_bits());
        for (int j = 0; j < s.kept; ++j) kept_columns.push_back(j * (s.cols / s.kept));
        for (int i = 0; i < s.rows * s.kept; ++i)
            kept_weight.push_back(s.kept_dtype == DType::bf16 ? to_bf16(uniform()) : to_f16(uniform()));
    }

    W4Parts parts() const {
        return {codes.data(),
                scales.data(),
                offsets.data(),
                bias.data(),
                shape.rows,
                shape.cols,
                groups,
                shape.group,
                shape.bits,
                shape.ordered ? group_index.data() : nullptr,
                shape.ordered ? input_scale.data() : nullptr,
                shape.kept,
                kept_columns.data(),
                kept_weight.data(),
                shape.kept_dtype};
    }

    // W, and what its rounding error is measured in.
    std::pair<double, double> weight(int n, int k) const {
        for (int j = 0; j < shape.kept; ++j)
            if (kept_columns[j] == k) {
                const std::uint16_t half = kept_weight[n * shape.kept + j];
                const bool bf16 = shape.kept_dtype == DType::bf16;
                const double value = bf16 ? from_bf16(half) : from_f16(half);
                return {value, std::fabs(value)};
            }
        const int at = n * groups + group_index[k];
        const double code = codes[n * shape.cols + k];
        return {scales[at] * code + offsets[at], scales[at] * code + std::fabs(offsets[at])};
    }
};

// Worst |y - reference| in units of Σ|x|·(scale·code + |offset|), rows of X spread over [-1, 1].
inline double worst_error(const Problem& p, const std::vector<float>& x, const std::vector<float>& y, int m) {
    double worst = 0.0;
    const int rows = p.shape.rows, cols = p.shape.cols;
    for (int n = 0; n < rows; ++n) {
        std::vector<double> sums(m, p.bias[n]), sizes(m, std::fabs(p.bias[n]));
        for (int k = 0; k < cols; ++k) {
            const auto [weight, size] = p.weight(n, k);
            for (int i = 0; i < m; ++i) {
                const double a = static_cast<double>(x[i * cols + k]) * p.input_scale[k];
                sums[i] += a * weight;
                sizes[i] += std::fabs(a) * size;
            }
        }
        for (int i = 0; i < m; ++i) worst = std::fmax(worst, std::fabs(y[i * rows + n] - sums[i]) / sizes[i]);
    }
    return worst;
}

inline int check(const Tier& tier, const Shape& shape) {
    int failures = 0;
    const Problem p(shape);
    const int n = shape.rows, k = shape.cols, g = shape.group;
    const W4Matrix matrix(tier, p.parts());
    constexpr int MOST = 100;
    std::vector<float> x(MOST * k), first;
    for (auto& value : x) value = uniform();
    for (int m : {1, 2, 3, 4, 5, 8, 15, 16, 17, 64, MOST}) {
        std::vector<float> y(m * n);
        matrix.multiply(x.data(), k, y.data(), m, DType::f32);
        const double error = worst_error(p, x, y, m);
        if (!(error < 1e-6) && ++failures)
            std::printf("[%d, %d] group %d, %d bits, %d kept, M = %d: error %g\n", n, k, g, shape.bits, shape.kept, m, error);
        if (m == 1) first = y;
        if (m <= SMALL_M && std::memcmp(first.data(), y.data(), sizeof(float) * n) != 0 && ++failures)
            std::printf("[%d, %d] group %d, M = %d: row 0 has other bits than alone\n", n, k, g, m);
    }
    std::vector<std::uint16_t> half(3 * k), result(3 * n);
    std::vector<float> widened(3 * k), y(3 * n);
    for (int i = 0; i < 3 * k; ++i) {
        half[i] = to_f16(x[i]);
        widened[i] = from_f16(half[i]);
    }
    matrix.multiply(widened.data(), k, y.data(), 3, DType::f32);
    matrix.multiply(half.data(), k, result.data(), 3, DType::f16);
    for (int i = 0; i < 3 * n; ++i)
        if (result[i] != to_f16(y[i]) && ++failures) std::printf("[%d, %d]: fp16 differs at %d\n", n, k, i);
    return failures;
}

// A product with a 16-bit weight whose width is no multiple of the kernel's step.
inline int check_half(const Tier& tier, DType dtype) {
    constexpr int rows = 37, cols = 150;
    int failures = 0;
    std::vector<std::uint16_t> weight(rows * cols);
    constexpr int MOST = HALF_ROWS + 2;
    std::vector<float> x(MOST * cols), bias(rows), first;
    for (auto& w : weight) w = dtype == DType::bf16 ? to_bf16(uniform()) : to_f16(uniform());
    for (auto& value : x) value = uniform();
    for (auto& b : bias) b = uniform();
    for (int m = 1; m <= MOST; ++m) {
        std::vector<float> y(m * rows);
        half_multiply(tier, weight.data(), dtype, rows, cols, bias.data(), x.data(), y.data(), m);
        for (int i = 0; i < m * rows; ++i) {
            double sum = bias[i % rows];
            for (int k = 0; k < cols; ++k) {
                const std::uint16_t w = weight[i % rows * cols + k];
                sum += static_cast<double>(x[i / rows * cols + k]) * (dtype == DType::bf16 ? from_bf16(w) : from_f16(w));
            }
            if (!(std::fabs(y[i] - sum) < 1e-4) && ++failures) std::printf("half, M = %d: %g for %g\n", m, y[i], sum);
        }
        if (m == 1) first = y;
        if (std::memcmp(first.data(), y.data(), sizeof(float) * rows) != 0 && ++failures)
            std::printf("half, M = %d: row 0 has other bits than alone\n", m);
    }
    return failures;
}

inline int check_tier(const Tier& tier) {
    int failures = check_half(tier, DType::bf16) + check_half(tier, DType::f16);
    constexpr auto BF16 = DType::bf16, F16 = DType::f16;
    const Shape shapes[] = {
        {1, 8, 8, 4, 0, false, BF16},     {7, 24, 8, 4, 0, false, BF16},     {16, 64, 32, 4, 0, false, BF16},
        {33, 172, 64, 4, 0, false, BF16}, {33, 64, 64, 4, 0, false, BF16},   {64, 576, 64, 4, 0, false, BF16},
        {48, 576, 128, 4, 0, false, BF16}, {80, 1536, 128, 4, 0, false, BF16},
        {1, 8, 8, 8, 0, false, BF16},     {33, 172, 64, 8, 0, false, BF16},  {64, 576, 64, 8, 0, false, BF16},
        {33, 172, 20, 4, 7, false, BF16}, {33, 172, 32, 4, 86, false, F16},  {48, 576, 64, 4, 300, true, BF16},
        {33, 172, 32, 4, 0, true, BF16},  {33, 172, 32, 8, 9, true, F16},    {16, 24, 8, 4, 24, false, BF16},
    };
    for (const auto& shape : shapes) failures += check(tier, shape);
    return failures;
}

}  // namespace product_check
