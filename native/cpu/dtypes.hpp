// Conversions between float32 and the 16-bit floats, round to nearest even, NaN kept.
#pragma once

#include <cstdint>
#include <cstring>

#include "w4.hpp"

namespace halfbyte {
namespace {

inline std::uint32_t bits_of(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float from_bf16(std::uint16_t h) { return float_of(static_cast<std::uint32_t>(h) << 16); }

inline std::uint16_t to_bf16(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t quiet_nan = (bits >> 16) | 0x40u, rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}

inline float from_f16(std::uint16_t h) {
    const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000u) << 16;
    const std::uint32_t magnitude = h & 0x7FFFu;
    if (magnitude >= 0x7C00u) return float_of(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
    // Re-biasing by a multiplication also normalises subnormals: 2^112 = 2^(127 - 15).
    return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

inline std::uint16_t to_f16(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);  // rounds to 65536 or more
    if (magnitude < 0x38800000u) {
        // Subnormal in fp16: adding 0.5 lets the FPU round at bit 2^-24.
        return static_cast<std::uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
    }
    const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
    return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// Where element `index` lies.
inline const void* element(const void* data, DType dtype, std::size_t index) {
    return static_cast<const char*>(data) + index * (dtype == DType::f32 ? sizeof(float) : sizeof(std::uint16_t));
}

// `count` neighbours to float32. S::widen_f16 is the tier's own; the loop over bf16 vectorizes by itself.
template <class S>
inline void widen(const void* source, DType dtype, float* target, int count) {
    const auto* halves = static_cast<const std::uint16_t*>(source);
    switch (dtype) {
        case DType::f32: std::memcpy(target, source, sizeof(float) * count); break;
        case DType::bf16:
            for (int i = 0; i < count; ++i) target[i] = from_bf16(halves[i]);
            break;
        default: S::widen_f16(halves, target, count);
    }
}

// Results for output rows [row, row + count) of activation row m: bias added, rows beyond the matrix dropped.
template <class S>
inline void store_run(const Output& out, int m, int row, float* values, int count) {
    if (out.cols - row < count) count = out.cols - row;
    if (count <= 0) return;
    if (out.bias != nullptr)
        for (int r = 0; r < count; ++r) values[r] += out.bias[row + r];
    const std::size_t at = static_cast<std::size_t>(m) * out.stride + row;
    auto* halves = static_cast<std::uint16_t*>(out.data) + at;
    switch (out.dtype) {
        case DType::f32: std::memcpy(static_cast<float*>(out.data) + at, values, sizeof(float) * count); break;
        case DType::bf16:
            for (int r = 0; r < count; ++r) halves[r] = to_bf16(values[r]);
            break;
        default: S::narrow_f16(values, halves, count);
    }
}

}  // namespace
}  // namespace halfbyte
