// What the vectors of x86's ISAs share: parts of 128 bits.
#pragma once
#include <immintrin.h>

#include "isa.h"

KVARN_KERNELS_BEGIN

inline __m128i load_128(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
inline int32_t sum_i8(__m128i bytes) {  // vpsadbw adds unsigned bytes: 128 more each
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(int8_t(0x80))), _mm_setzero_si128());
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi16(sums, 4) - 16 * 128;
}

KVARN_KERNELS_END
