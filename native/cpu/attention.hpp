// Attention of a few query heads over one stretch of the key-value cache (its layout: kv_cache.hpp).
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

enum class CacheType : int { fp16 = 0, int8 = 1 };

struct AttentionSpan {
    const float* queries;  // [count][head_dim], times the scale
    std::size_t query_stride;
    int count;  // at most QUERIES
    int head_dim;
    // From the span's first position on.
    CacheType type;
    const void* keys;
    const void* values;
    const float* key_scales;  // with int8 only
    const float* value_scales;
    int begin, end;  // positions that count, from the span's first
    float softcap;   // 0 for none
    // For each query: the largest score m, Σ exp(score - m), and Σ exp(score - m) · value [head_dim].
    float* result;
    std::size_t result_stride;
};

}  // namespace halfbyte
