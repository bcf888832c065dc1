// What a decoder does between matrix products. Included by tier.hpp only; plain loops, vectorized by the compiler for the tier.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "decoder_math.hpp"
#include "dtypes.hpp"

namespace halfbyte {
namespace {

// exp(x) to 2 units in the last place, 0 below -87: x = n·ln 2 + r, |r| <= ln 2 / 2, a polynomial of degree 6 in r.
inline float exp_of(float x) {
    x = x > -87.0f ? x : -87.5f;
    x = x < 88.0f ? x : 88.0f;
    const float n = (x * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const auto exponent = static_cast<std::uint32_t>(static_cast<std::int32_t>(n) + 127) << 23;
    return x < -87.0f ? 0.0f : p * float_of(exponent);
}

inline float tanh_of(float x) { return 1.0f - 2.0f / (exp_of(2.0f * x) + 1.0f); }

template <class S>
struct MathKernel {
    // Sums in a fixed order: LANES chains, then those.
    static constexpr int LANES = 32;

    static void rms_norm(const float* x, const float* weight, int n, float epsilon, float* out) {
        float lanes[LANES] = {};
        int i = 0;
        for (; i + LANES <= n; i += LANES)
            for (int l = 0; l < LANES; ++l) lanes[l] += x[i + l] * x[i + l];
        float sum = 0.0f;
        for (int l = 0; l < LANES; ++l) sum += lanes[l];
        for (; i < n; ++i) sum += x[i] * x[i];
        const float factor = 1.0f / std::sqrt(sum / static_cast<float>(n) + epsilon);
        for (int j = 0; j < n; ++j) out[j] = x[j] * factor * weight[j];
    }

    static void gated(const float* gate, const float* up, int n, Activation activation, float* out) {
        switch (activation) {
            case Activation::silu:
                for (int i = 0; i < n; ++i) out[i] = gate[i] / (1.0f + exp_of(-gate[i])) * up[i];
                break;
            case Activation::gelu_tanh:
                for (int i = 0; i < n; ++i) {
                    const float g = gate[i], inner = 0.7978845608f * (g + 0.044715f * g * g * g);
                    out[i] = 0.5f * g * (1.0f + tanh_of(inner)) * up[i];
                }
                break;
            case Activation::gelu:
                for (int i = 0; i < n; ++i) out[i] = 0.5f * gate[i] * (1.0f + std::erf(gate[i] * 0.70710678f)) * up[i];
                break;
            default:
                for (int i = 0; i < n; ++i) out[i] = (gate[i] > 0.0f ? gate[i] : 0.0f) * up[i];
        }
    }

    // Halves of a head turn together: (x[i], x[i + pairs]) by the angle whose cosine and sine are given.
    static void rotate(float* head, const float* cosines, const float* sines, int pairs) {
        for (int i = 0; i < pairs; ++i) {
            const float a = head[i], b = head[i + pairs];
            head[i] = a * cosines[i] - b * sines[i];
            head[i + pairs] = b * cosines[i] + a * sines[i];
        }
    }

    static void softcap(float* x, int n, float cap) {
        for (int i = 0; i < n; ++i) x[i] = cap * tanh_of(x[i] / cap);
    }

    static void store_key(const float* key, int head_dim, std::uint16_t* block, int lane) {
        for (int d = 0; d < head_dim; d += KEY_BLOCK) {  // head_dim is a multiple of it
            std::uint16_t halves[KEY_BLOCK];
            S::narrow_f16(key + d, halves, KEY_BLOCK);
            for (int i = 0; i < KEY_BLOCK; ++i) block[static_cast<std::size_t>(d + i) * KEY_BLOCK + lane] = halves[i];
        }
    }

    static void store_value(const float* value, int head_dim, std::uint16_t* row) { S::narrow_f16(value, row, head_dim); }

    // Code i goes to codes[i · stride]; returns the scale.
    static float store_int8(const float* x, int n, std::int8_t* codes, int stride) {
        float most = 0.0f;
        for (int i = 0; i < n; ++i) {
            const float magnitude = x[i] < 0 ? -x[i] : x[i];
            most = magnitude > most ? magnitude : most;
        }
        // Below 2^-120 the reciprocal is not finite; such numbers are zero for every purpose.
        const float inverse = most > 0x1p-120f ? 127.0f / most : 0.0f;
        for (int i = 0; i < n; ++i) {
            const float rounded = (x[i] * inverse + 0x1.8p23f) - 0x1.8p23f;
            codes[static_cast<std::size_t>(i) * stride] = static_cast<std::int8_t>(static_cast<std::int32_t>(rounded));
        }
        return most / 127.0f;
    }

    static float store_key_int8(const float* key, int head_dim, std::int8_t* block, int lane) {
        return store_int8(key, head_dim, block + lane, KEY_BLOCK);
    }

    static float store_value_int8(const float* value, int head_dim, std::int8_t* row) {
        return store_int8(value, head_dim, row, 1);
    }

    static constexpr DecoderMath math() {
        return {rms_norm, gated, rotate, softcap, store_key, store_value, store_key_int8, store_value_int8};
    }
};

}  // namespace
}  // namespace halfbyte
