// Runs the amx tier on the model of its intrinsics: every row must have the bits that the avx512_vnni tier, whose own check holds it
// against double precision, gives it alone. Prints one line a failure.
#define HALFBYTE_AVX512_INTRINSICS "amx_model.hpp"
#define HALFBYTE_AMX_INTRINSICS "amx_model.hpp"
#include "tier_amx.cpp"
#include "tier_avx512_vnni.cpp"

#include <cstdio>

#include "decoder_check.hpp"
#include "peak_check.hpp"

namespace {

using namespace halfbyte;

// Tile products a call with m rows should take: those of each 64 inputs of a group, or 32, for each block and 16 rows.
std::int64_t expected_products(int rows, int groups, int size, int bits, int m) {
    return bits == 4 ? static_cast<std::int64_t>(rows / 16) * groups * ((size + 63) / 64) * (m / 16) : 0;
}

int check(int rows, int groups, int size, int bits) {
    constexpr int MOST = 150;
    int failures = 0;
    const int cols = groups * size;
    std::vector<std::uint8_t> codes(rows * cols), zeros(rows * groups);
    std::vector<float> scales(rows * groups), x(MOST * cols), alone(MOST * rows);
    for (auto& c : codes) c = decoder_check::random_bits()() % (1u << bits);
    for (auto& z : zeros) z = decoder_check::random_bits()() % (1u << bits);
    for (auto& s : scales) s = from_f16(to_f16(1.5f + decoder_check::uniform()));
    for (auto& value : x) value = decoder_check::uniform();
    const auto linear = [&](const Tier& tier) {
        return A8Linear(tier, codes.data(), scales.data(), zeros.data(), nullptr, rows, cols, groups, bits);
    };
    const A8Linear vnni = linear(*avx512_vnni_tier()), amx = linear(*amx_tier());
    decoder_check::Rows prepared(MOST * amx.prepared_bytes());
    auto* bytes = static_cast<std::int8_t*>(prepared.data());
    for (int m = 0; m < MOST; ++m) amx.prepare(&x[m * cols], bytes + m * amx.prepared_bytes());
    for (int m = 0; m < MOST; ++m)
        vnni.multiply(bytes + m * amx.prepared_bytes(), 1, &alone[m * rows], rows, 0, vnni.blocks());
    for (const int m : {1, 15, 16, 17, 31, 32, 48, 64, 70, 128, MOST}) {
        std::vector<float> y(m * rows, -7.0f);
        TileModel::products = 0;
        amx.multiply(bytes, m, y.data(), rows, 0, 1);
        amx.multiply(bytes, m, y.data(), rows, 1, amx.blocks());
        if (std::memcmp(y.data(), alone.data(), sizeof(float) * y.size()) != 0 && ++failures)
            std::printf("[%d, %d · %d] %d bits, M = %d: other bits than a row alone\n", rows, groups, size, bits, m);
        if (TileModel::products != expected_products(rows, groups, size, bits, m) && ++failures)
            std::printf("[%d, %d · %d] %d bits, M = %d: %lld tile products\n", rows, groups, size, bits, m,
                        static_cast<long long>(TileModel::products));
    }
    return failures;
}

}  // namespace

int main() {
    int failures = 0;
    for (const int size : {32, 64, 96, 128, 320})
        failures += check(16, 2, size, 4) + check(53, 1, size, 4);
    failures += check(48, 9, 64, 4) + check(32, 2, 64, 8);
    failures += decoder_check::check_tier(*amx_tier()) + peak_check::check_tier(*amx_tier(), true);
    std::printf("%d failures\n", failures);
    return failures != 0;
}
