// Attention of a few query heads over one stretch of the key-value cache, and the layout of that cache.
//
// For each layer, sequence and key-value head, `capacity` positions (a multiple of 16) of head_dim numbers in fp16:
//
//     keys[p / 16][d][p % 16]      sixteen positions side by side: scores need no horizontal sums
//     values[p][d]
//
// Positions are read in spans of SPAN, cut at its multiples wherever a sequence stands, and a query's spans are put together in
// order: its result has the same bits whatever other rows are computed in the same step, for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace halfbyte {

constexpr int KEY_BLOCK = 16;
constexpr int SPAN = 256;
// Query heads that share a key-value head, taken together at most.
constexpr int QUERIES = 4;

struct AttentionSpan {
    const float* queries;  // [count][head_dim], times the scale
    std::size_t query_stride;
    int count;  // at most QUERIES
    int head_dim;
    const std::uint16_t* keys;
    const std::uint16_t* values;
    int span;        // which one: positions [span · SPAN, (span + 1) · SPAN)
    int begin, end;  // positions that count
    float softcap;   // 0 for none
    // For each query: the largest score m, Σ exp(score - m), and Σ exp(score - m) · value [head_dim].
    float* result;
    std::size_t result_stride;
};

}  // namespace halfbyte
