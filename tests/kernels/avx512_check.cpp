// Runs the avx512_vnni tier on the model of its intrinsics against a double-precision reference; prints one line a failure.
#define HALFBYTE_AVX512_INTRINSICS "avx512_model.hpp"
#include "tier_avx512_vnni.cpp"

#include <cstdio>
#include <random>
#include <vector>

#include "half_multiply.hpp"
#include "w4_matrix.hpp"

namespace {

std::mt19937 random_bits(7);

float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_bits); }

struct Problem {
    int rows, cols, group;
    std::vector<std::uint8_t> codes;
    std::vector<float> scales, offsets, bias;

    Problem(int n, int k, int g) : rows(n), cols(k), group(g), codes(n * k), bias(n) {
        const int groups = (k + g - 1) / g;
        for (auto& code : codes) code = random_bits() % 16;
        for (int i = 0; i < n * groups; ++i) {
            scales.push_back(0.01f * (1.5f + uniform()));
            offsets.push_back(-scales.back() * static_cast<float>(random_bits() % 16));
        }
        for (auto& b : bias) b = uniform();
    }

    double weight(int n, int k) const {
        const int at = n * ((cols + group - 1) / group) + k / group;
        return static_cast<double>(scales[at]) * codes[n * cols + k] + offsets[at];
    }
};

// Worst |y - reference| in units of Σ|x|·(scale·15 + |offset|), rows of X spread over [-1, 1].
double worst_error(const Problem& p, const std::vector<float>& x, const std::vector<float>& y, int m) {
    double worst = 0.0;
    for (int i = 0; i < m; ++i)
        for (int n = 0; n < p.rows; ++n) {
            double sum = p.bias[n], size = std::fabs(p.bias[n]);
            for (int k = 0; k < p.cols; ++k) {
                const double a = x[i * p.cols + k];
                const int at = n * ((p.cols + p.group - 1) / p.group) + k / p.group;
                sum += a * p.weight(n, k);
                size += std::fabs(a) * (15.0 * p.scales[at] + std::fabs(p.offsets[at]));
            }
            worst = std::fmax(worst, std::fabs(y[i * p.rows + n] - sum) / size);
        }
    return worst;
}

int check(int n, int k, int g) {
    int failures = 0;
    const Problem p(n, k, g);
    const halfbyte::W4Matrix matrix(*halfbyte::avx512_vnni_tier(), p.codes.data(), p.scales.data(), p.offsets.data(),
                                    p.bias.data(), n, k, g);
    constexpr int MOST = 100;
    std::vector<float> x(MOST * k), first;
    for (auto& value : x) value = uniform();
    for (int m : {1, 2, 3, 4, 5, 8, 15, 16, 17, 64, MOST}) {
        std::vector<float> y(m * n);
        matrix.multiply(x.data(), k, y.data(), m, halfbyte::DType::f32);
        const double error = worst_error(p, x, y, m);
        if (!(error < 1e-6) && ++failures) std::printf("[%d, %d] group %d, M = %d: error %g\n", n, k, g, m, error);
        if (m == 1) first = y;
        if (m <= halfbyte::SMALL_M && std::memcmp(first.data(), y.data(), sizeof(float) * n) != 0 && ++failures)
            std::printf("[%d, %d] group %d, M = %d: row 0 has other bits than alone\n", n, k, g, m);
    }
    std::vector<std::uint16_t> half(3 * k), result(3 * n);
    std::vector<float> widened(3 * k), y(3 * n);
    for (int i = 0; i < 3 * k; ++i) {
        half[i] = halfbyte::to_f16(x[i]);
        widened[i] = halfbyte::from_f16(half[i]);
    }
    matrix.multiply(widened.data(), k, y.data(), 3, halfbyte::DType::f32);
    matrix.multiply(half.data(), k, result.data(), 3, halfbyte::DType::f16);
    for (int i = 0; i < 3 * n; ++i)
        if (result[i] != halfbyte::to_f16(y[i]) && ++failures) std::printf("[%d, %d]: fp16 differs at %d\n", n, k, i);
    return failures;
}

// A product with a 16-bit weight whose width is no multiple of the kernel's step.
int check_half(halfbyte::DType dtype) {
    constexpr int rows = 37, cols = 150;
    int failures = 0;
    std::vector<std::uint16_t> weight(rows * cols);
    constexpr int MOST = halfbyte::HALF_ROWS + 2;
    std::vector<float> x(MOST * cols), bias(rows), first;
    for (auto& w : weight) w = dtype == halfbyte::DType::bf16 ? halfbyte::to_bf16(uniform()) : halfbyte::to_f16(uniform());
    for (auto& value : x) value = uniform();
    for (auto& b : bias) b = uniform();
    for (int m = 1; m <= MOST; ++m) {
        std::vector<float> y(m * rows);
        halfbyte::half_multiply(*halfbyte::avx512_vnni_tier(), weight.data(), dtype, rows, cols, bias.data(), x.data(),
                                y.data(), m);
        for (int i = 0; i < m * rows; ++i) {
            double sum = bias[i % rows];
            for (int k = 0; k < cols; ++k) {
                const std::uint16_t w = weight[i % rows * cols + k];
                sum += static_cast<double>(x[i / rows * cols + k]) *
                       (dtype == halfbyte::DType::bf16 ? halfbyte::from_bf16(w) : halfbyte::from_f16(w));
            }
            if (!(std::fabs(y[i] - sum) < 1e-4) && ++failures) std::printf("half, M = %d: %g for %g\n", m, y[i], sum);
        }
        if (m == 1) first = y;
        if (std::memcmp(first.data(), y.data(), sizeof(float) * rows) != 0 && ++failures)
            std::printf("half, M = %d: row 0 has other bits than alone\n", m);
    }
    return failures;
}

}  // namespace

int main() {
    int failures = check_half(halfbyte::DType::bf16) + check_half(halfbyte::DType::f16);
    const int shapes[][3] = {{1, 8, 8}, {7, 24, 8}, {16, 64, 32}, {33, 172, 64}, {33, 64, 64}, {64, 576, 64}, {48, 576, 128},
                             {80, 1536, 128}};
    for (const auto& shape : shapes) failures += check(shape[0], shape[1], shape[2]);
    std::printf("%d failures\n", failures);
    return failures != 0;
}
