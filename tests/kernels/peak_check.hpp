// The loops that peaks are measured with multiply ones: each must add to its sink as many as it says it multiplies, so that no
// instruction is counted for more, or less, than it does.
#pragma once

#include <cstdio>

#include "w4.hpp"

namespace peak_check {

using namespace halfbyte;

inline int check_loop(const char* name, PeakLoop loop) {
    constexpr int STEPS = 3;
    if (loop == nullptr) return 0;
    float sum = 0.0f;
    const double operations = loop(STEPS, &sum);
    if (operations > 0.0 && 2.0 * sum == operations) return 0;
    std::printf("%s: %g operations, %g products\n", name, operations, sum);
    return 1;
}

// `bf16`: whether the tier's instruction for it can be run, or is modelled.
inline int check_tier(const Tier& tier, bool bf16) {
    return check_loop("int8_dots", tier.int8_dots) + (bf16 ? check_loop("bf16_dots", tier.bf16_dots) : 0);
}

}  // namespace peak_check
