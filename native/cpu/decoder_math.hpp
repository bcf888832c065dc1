// What a tier provides to the decoder beside products with weights.
#pragma once

#include <cstddef>
#include <cstdint>

#include "attention.hpp"

namespace halfbyte {

enum class Activation : int { silu = 0, gelu_tanh = 1, gelu = 2, relu = 3 };

struct DecoderMath {
    void (*rms_norm)(const float* x, const float* weight, int n, float epsilon, float* out);
    void (*gated)(const float* gate, const float* up, int n, Activation, float* out);
    void (*rotate)(float* head, const float* cosines, const float* sines, int pairs);
    void (*softcap)(float* x, int n, float cap);
    // To the cache, in fp16: a key to one of the sixteen places of a block, a value to its row.
    void (*store_key)(const float* key, int head_dim, std::uint16_t* block, int lane);
    void (*store_value)(const float* value, int head_dim, std::uint16_t* row);
    // In int8; these return the scale.
    float (*store_key_int8)(const float* key, int head_dim, std::int8_t* block, int lane);
    float (*store_value_int8)(const float* value, int head_dim, std::int8_t* row);
};

}  // namespace halfbyte
