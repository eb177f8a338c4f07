// fp16 and float32 without hardware support.
#pragma once
#include <cstdint>
#include <cstring>

#include "kvarn/formats.h"

namespace kvarn {

KVARN_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
    uint32_t bits;
    if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000 : 0);
    } else if (rest >= 0x400) {
        bits = sign | ((rest << 13) + (112u << 23));
    } else {
        const float tiny = float(rest) * 5.9604644775390625e-8f;  // 2^-24, exact
        std::memcpy(&bits, &tiny, 4);
        bits |= sign;
    }
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Rounds to nearest, ties to even.
KVARN_INLINE uint16_t float_to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return uint16_t(sign | 0x7e00);
    if (bits >= 0x47800000) return uint16_t(sign | 0x7c00);
    if (bits < 0x38800000) {  // subnormal: adding 0.5 aligns the last bit of the result with 2^-24
        float magnitude;
        std::memcpy(&magnitude, &bits, 4);
        const float shifted = magnitude + 0.5f;
        uint32_t r;
        std::memcpy(&r, &shifted, 4);
        return uint16_t(sign | (r - 0x3f000000));
    }
    const uint32_t odd = bits >> 13 & 1;
    return uint16_t(sign | (bits - (112u << 23) + 0xfff + odd) >> 13);
}

}  // namespace kvarn
