// Runs the avx_vnni tier on the model of its dot product against a double-precision reference; prints one line a failure.
#define HALFBYTE_AVX_VNNI_INTRINSICS "avx_vnni_model.hpp"
#include "tier_avx_vnni.cpp"

#include <cstdio>

#include "decoder_check.hpp"
#include "peak_check.hpp"
#include "product_check.hpp"

int main() {
    const halfbyte::Tier& tier = *halfbyte::avx_vnni_tier();
    const int failures = product_check::check_tier(tier) + decoder_check::check_tier(tier) +
                         peak_check::check_tier(tier, true);
    std::printf("%d failures\n", failures);
    return failures != 0;
}
