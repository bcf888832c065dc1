// fp16 by the CPU's own conversions (F16C), for the tiers that have them. Internal linkage, like all of a tier's code.
// Include after the intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

namespace halfbyte {
namespace {

struct F16C {
    static void widen_f16(const std::uint16_t* source, float* target, int count) {
        for (; count >= 8; count -= 8, source += 8, target += 8)
            _mm256_storeu_ps(target, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
        if (count == 0) return;
        std::uint16_t halves[8] = {};
        float floats[8];
        std::memcpy(halves, source, sizeof(std::uint16_t) * count);
        _mm256_storeu_ps(floats, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))));
        std::memcpy(target, floats, sizeof(float) * count);
    }

    static void narrow_f16(const float* source, std::uint16_t* target, int count) {
        for (; count >= 8; count -= 8, source += 8, target += 8)
            _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                             _mm256_cvtps_ph(_mm256_loadu_ps(source), _MM_FROUND_TO_NEAREST_INT));
        if (count == 0) return;
        float floats[8] = {};
        std::uint16_t halves[8];
        std::memcpy(floats, source, sizeof(float) * count);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(halves),
                         _mm256_cvtps_ph(_mm256_loadu_ps(floats), _MM_FROUND_TO_NEAREST_INT));
        std::memcpy(target, halves, sizeof(std::uint16_t) * count);
    }
};

}  // namespace
}  // namespace halfbyte
