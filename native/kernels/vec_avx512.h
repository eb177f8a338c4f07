// AVX-512 F, BW, VL, DQ and VNNI (Cascade Lake and later, Zen 4 and later).
#pragma once
#include "vec_x86.h"

KVARN_KERNELS_BEGIN

struct F { __m512 v; };
struct I { __m512i v; };
struct B { __m512i v; };
using M = __mmask16;

inline M first(int64_t n) { return n >= 16 ? M(0xffff) : M((1u << n) - 1); }
inline F zero() { return {_mm512_setzero_ps()}; }
inline F set(float x) { return {_mm512_set1_ps(x)}; }
inline I set_i(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline F load(const float *p) { return {_mm512_loadu_ps(p)}; }
inline F load_n(const float *p, int64_t n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
inline void store(float *p, F a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float *p, F a, int64_t n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
inline F load_f16(const uint16_t *p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)))};
}
inline F load_bf16(const uint16_t *p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline void store_f16(uint16_t *p, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline F load_u8(const uint8_t *p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load_128(p)))}; }
inline F load_i8(const uint8_t *p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_128(p)))}; }
// A permutation looks at the low four bits of an index: it turns nibbles into floats, as a table does.
inline F nibbles_to_float(__m512i indices) {
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return {_mm512_permutexvar_ps(indices, table)};
}
inline __m512i load_bytes(const uint8_t *p) { return _mm512_cvtepu8_epi32(load_128(p)); }
inline F load_low_u4(const uint8_t *p) { return nibbles_to_float(load_bytes(p)); }
inline F load_high_u4(const uint8_t *p) { return nibbles_to_float(_mm512_srli_epi32(load_bytes(p), 4)); }

inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
inline F copy_sign(F a, F sign) {
    const __m512i mask = _mm512_set1_epi32(int32_t(0x80000000));
    return {_mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(mask, _mm512_castps_si512(sign.v), _mm512_castps_si512(a.v), 0xca))};
}
inline M less(F a, F b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline F select(M m, F a, F b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
inline I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }
inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline F pow2(I n) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(n.v, _mm512_set1_epi32(127)), 23))};
}
inline I abs_bits(F a) { return {_mm512_castps_si512(_mm512_abs_ps(a.v))}; }
inline I max_i(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }

inline float reduce_add(F a) {
    const __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
inline float reduce_max(F a) { return _mm512_reduce_max_ps(a.v); }
inline int32_t reduce_max_i(I a) { return _mm512_reduce_max_epi32(a.v); }
// Returns the sum of what it stored.
inline int32_t store_i8(int8_t *p, I a) {
    const __m128i bytes = _mm512_cvtsepi32_epi8(a.v);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), bytes);
    return sum_i8(bytes);
}

// Pairs (x0, x1), (x2, x3)… of 32 floats into their first and second elements, and back.
inline void deinterleave(F a, F b, F &even, F &odd) {
    const __m512i e = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i o = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    even = {_mm512_permutex2var_ps(a.v, e, b.v)};
    odd = {_mm512_permutex2var_ps(a.v, o, b.v)};
}
inline void interleave(F even, F odd, F &a, F &b) {
    const __m512i l = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i h = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    a = {_mm512_permutex2var_ps(even.v, l, odd.v)};
    b = {_mm512_permutex2var_ps(even.v, h, odd.v)};
}

inline B load_b(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
// Bytes shifted by n, to the left where it is positive; bits beyond a byte's end come from its neighbour.
template <int n>
inline __m512i shift(__m512i bytes) {
    if constexpr (n > 0) return _mm512_slli_epi16(bytes, n);
    if constexpr (n < 0) return _mm512_srli_epi16(bytes, -n);
    return bytes;
}
// Bits from … from + count - 1 of each byte, moved to bit `to`; all others 0.
template <int from, int count, int to>
inline B field(B b) {
    if constexpr (count == 8) return b;
    return {_mm512_and_si512(shift<to - from>(b.v), _mm512_set1_epi8(int8_t(((1 << count) - 1) << to)))};
}
// a, and the field of b, in which a is 0.
template <int from, int count, int to>
inline B with_field(B a, B b) {
    const __m512i mask = _mm512_set1_epi8(int8_t(((1 << count) - 1) << to));
    return {_mm512_ternarylogic_epi32(a.v, shift<to - from>(b.v), mask, 0xf8)};  // a | (b & mask)
}
// Four bytes sixteen times over.
inline B four_times(const int8_t *p) {
    int32_t four;
    __builtin_memcpy(&four, p, 4);
    return {_mm512_set1_epi32(four)};
}
inline void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

// Sums of 2 panels x 8 rows keep the multipliers busy through the latency of a dot product.
constexpr int kBlockPanels = 2;

// Sixteen integer dot products, four k a step. bits: of a packed quant.
template <int bits>
struct Dot {
    __m512i acc;
    void init(int32_t start) { acc = _mm512_set1_epi32(start + kOffset); }
    // The broadcast is folded into the instruction; compilers make two of it.
    void step(B w, const int8_t *a) {
        asm("vpdpbusd %2%{1to16%}, %1, %0"
            : "+v"(acc)
            : "v"(w.v), "m"(*reinterpret_cast<const int32_t *>(a)));
    }
    // a: the four activations 16 times over.
    void step(B w, B a) { acc = _mm512_dpbusd_epi32(acc, w.v, a.v); }
    F finish() const { return {_mm512_sub_ps(_mm512_castsi512_ps(acc), _mm512_set1_ps(12582912.0f))}; }

    // Bits of 1.5 * 2^23: a float that has n in its last 22 bits is that number + n. Subtracting it, which is exact,
    // leaves the units that multiply alone, as a conversion would not.
    static constexpr int32_t kOffset = 0x4b400000;
};

KVARN_KERNELS_END
