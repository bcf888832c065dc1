// What the rounding kernel of a tier takes.
#pragma once

#include <cstddef>

namespace halfbyte {

// A few columns of a weight, transposed: every matrix here is [columns][rows] with `stride` floats from one column to the
// next, but `couplings`, which is [columns][columns], contiguous.
//
// To round for the first time, `work` is what is left of the weights: column i goes to its nearest code, it loses
// moved[i] = (work[i] - value) · pivots[i], and work[k] += couplings[i][k] · moved[i] for every k > i.
// To revisit, `work` is the slope of the error and `codes` hold what was chosen: column i goes to the code nearest to
// value - work[i] · pivots[i], which moves it by moved[i], and work[k] changes likewise. `work` itself is not written.
struct RoundingBlock {
    static constexpr int MAX_COLUMNS = 64;

    const float* work;
    const float* couplings;
    const float* pivots;  // [columns]
    const float* scales;
    const float* zeros;
    float* codes;
    float* moved;
    std::size_t rows, stride;
    int columns;
    float max_code;
    bool revisit;
};

}  // namespace halfbyte
