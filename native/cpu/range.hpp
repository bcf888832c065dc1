// What the range kernel of a tier takes.
#pragma once

#include <cstddef>

namespace halfbyte {

// One candidate grid for each group of a weight, and how well it fits. Rows are innermost: [groups][size][rows] for the
// weights, [groups][rows] for everything there is one of a group. With codes c = clamp(round(w / scale) + zero):
//   quadratic = x · G · x,  x = scale · (c - zero) - w   if there are no projections: the error of the candidate;
//                           x = c - zero                 otherwise, and
//   linear    = x · projection, the projection being G · w.
struct RangeTrial {
    static constexpr int MAX_SIZE = 256;

    const float* weights;
    const float* grams;        // [groups][size][size], symmetric
    const float* projections;  // [groups][size][rows], or null
    const float* scales;
    const float* zeros;
    float* quadratic;
    float* linear;  // null where there are no projections
    std::size_t rows;
    int size;
    float max_code;
};

}  // namespace halfbyte
