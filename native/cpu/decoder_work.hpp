// What the parts of a step share. Private to decoder.cpp and decoder_attention.cpp.
#pragma once

#include <vector>

#include "decoder.hpp"

namespace halfbyte {

// Largest score and sum of a span, before its values.
constexpr int SPAN_HEADER = 2;

// One chunk of rows on its way through the layers.
struct Decoder::Work {
    KvCache& cache;
    const DecoderStep& step;
    int first, rows;  // of the step
    std::vector<int> wanted;
    float* logits;
    std::size_t qkv_stride, wide_stride, result_stride;
    // [rows][...], 64-byte aligned
    std::vector<float> memory;
    float *x, *qkv, *y, *wide, *results;
    std::vector<std::uint8_t> shared;                // prepared rows for all
    std::vector<std::vector<std::uint8_t>> prepared;  // prepared rows of each thread
    std::vector<std::vector<float>> scratch;          // of each thread: one row
    int most_spans = 1;

    int position(int row) const { return step.positions[first + row]; }
    int sequence(int row) const { return step.sequences[first + row]; }
    void lap(int id, StepProfile::Part part) const {
        if (id == 0 && step.profile) step.profile->lap(part);
    }
};

}  // namespace halfbyte
