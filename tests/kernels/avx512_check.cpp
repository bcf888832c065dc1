// Runs the avx512_vnni tier on the model of its intrinsics against a double-precision reference; prints one line a failure.
#define HALFBYTE_AVX512_INTRINSICS "avx512_model.hpp"
#include "tier_avx512_vnni.cpp"

#include <cstdio>

#include "decoder_check.hpp"
#include "peak_check.hpp"
#include "product_check.hpp"
#include "rejection_check.hpp"

int main() {
    const halfbyte::Tier& tier = *halfbyte::avx512_vnni_tier();
    const int failures = product_check::check_tier(tier) + decoder_check::check_tier(tier) +
                         rejection_check::check_tier(tier) + peak_check::check_tier(tier, true);
    std::printf("%d failures\n", failures);
    return failures != 0;
}
