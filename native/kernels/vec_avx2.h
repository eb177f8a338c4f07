// AVX2 with FMA and F16C (Haswell and later, Zen): a vector of 16 lanes is two registers.
#pragma once
#include "vec_x86.h"

KVARN_KERNELS_BEGIN

struct F { __m256 lo, hi; };
struct I { __m256i lo, hi; };
struct B { __m256i lo, hi; };
struct M { __m256i lo, hi; };

inline M first(int64_t n) {
    const __m256i count = _mm256_set1_epi32(int32_t(n < 16 ? n : 16));
    return {_mm256_cmpgt_epi32(count, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)),
            _mm256_cmpgt_epi32(count, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15))};
}
inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline I set_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline F load(const float *p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline F load_n(const float *p, int64_t n) {
    const M m = first(n);
    return {_mm256_maskload_ps(p, m.lo), n > 8 ? _mm256_maskload_ps(p + 8, m.hi) : _mm256_setzero_ps()};
}
inline void store(float *p, F a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
inline void store_n(float *p, F a, int64_t n) {
    const M m = first(n);
    _mm256_maskstore_ps(p, m.lo, a.lo);
    if (n > 8) _mm256_maskstore_ps(p + 8, m.hi, a.hi);
}
inline F load_f16(const uint16_t *p) { return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))}; }
inline F load_bf16(const uint16_t *p) {
    const __m256i lo = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16);
    const __m256i hi = _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p + 8)), 16);
    return {_mm256_castsi256_ps(lo), _mm256_castsi256_ps(hi)};
}
inline void store_f16(uint16_t *p, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm256_cvtps_ph(a.lo, _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p + 8), _mm256_cvtps_ph(a.hi, _MM_FROUND_TO_NEAREST_INT));
}
inline F load_i8(const uint8_t *p) {
    const __m128i b = load_128(p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(b, 8)))};
}
inline F bytes_to_float(__m128i b) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))};
}
inline F load_u8(const uint8_t *p) { return bytes_to_float(load_128(p)); }
inline F load_low_u4(const uint8_t *p) { return bytes_to_float(_mm_and_si128(load_128(p), _mm_set1_epi8(15))); }
inline F load_high_u4(const uint8_t *p) {
    return bytes_to_float(_mm_and_si128(_mm_srli_epi16(load_128(p), 4), _mm_set1_epi8(15)));
}

inline F add(F a, F b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline F sub(F a, F b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
inline F mul(F a, F b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline F div(F a, F b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
inline F max(F a, F b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
inline F min(F a, F b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
inline __m256 sign_mask() { return _mm256_castsi256_ps(_mm256_set1_epi32(int32_t(0x80000000))); }
inline F abs(F a) { return {_mm256_andnot_ps(sign_mask(), a.lo), _mm256_andnot_ps(sign_mask(), a.hi)}; }
inline F copy_sign(F a, F sign) {
    const F bare = abs(a);
    return {_mm256_or_ps(bare.lo, _mm256_and_ps(sign_mask(), sign.lo)),
            _mm256_or_ps(bare.hi, _mm256_and_ps(sign_mask(), sign.hi))};
}
inline M less(F a, F b) {
    return {_mm256_castps_si256(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_castps_si256(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
inline F select(M m, F a, F b) {
    return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(m.lo)),
            _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(m.hi))};
}
inline I to_int(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
inline F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
inline F pow2(I n) {
    const __m256i bias = _mm256_set1_epi32(127);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.lo, bias), 23)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n.hi, bias), 23))};
}
inline I abs_bits(F a) {
    const F bare = abs(a);
    return {_mm256_castps_si256(bare.lo), _mm256_castps_si256(bare.hi)};
}
inline I max_i(I a, I b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }

inline float reduce_add(F a) {
    const __m256 b = _mm256_add_ps(a.lo, a.hi);
    __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_add_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
inline float reduce_max(F a) {
    const __m256 b = _mm256_max_ps(a.lo, a.hi);
    __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
    c = _mm_max_ps(c, _mm_movehl_ps(c, c));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
inline int32_t reduce_max_i(I a) {
    const __m256i b = _mm256_max_epi32(a.lo, a.hi);
    __m128i c = _mm_max_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
    c = _mm_max_epi32(c, _mm_shuffle_epi32(c, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
// Returns the sum of what it stored.
inline int32_t store_i8(int8_t *p, I a) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(p), bytes);
    return sum_i8(bytes);
}

inline void deinterleave_8(__m256 a, __m256 b, __m256 &even, __m256 &odd) {
    const __m256 e = _mm256_shuffle_ps(a, b, 0x88), o = _mm256_shuffle_ps(a, b, 0xdd);
    even = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(e), 0xd8));
    odd = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(o), 0xd8));
}
inline void interleave_8(__m256 even, __m256 odd, __m256 &a, __m256 &b) {
    const __m256 l = _mm256_unpacklo_ps(even, odd), h = _mm256_unpackhi_ps(even, odd);
    a = _mm256_permute2f128_ps(l, h, 0x20);
    b = _mm256_permute2f128_ps(l, h, 0x31);
}
// Pairs (x0, x1), (x2, x3)… of 32 floats into their first and second elements, and back.
inline void deinterleave(F a, F b, F &even, F &odd) {
    deinterleave_8(a.lo, a.hi, even.lo, odd.lo);
    deinterleave_8(b.lo, b.hi, even.hi, odd.hi);
}
inline void interleave(F even, F odd, F &a, F &b) {
    interleave_8(even.lo, odd.lo, a.lo, a.hi);
    interleave_8(even.hi, odd.hi, b.lo, b.hi);
}

inline B load_b(const uint8_t *p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + 32))};
}
// Bytes shifted by n, to the left where it is positive; bits beyond a byte's end come from its neighbour.
template <int n>
inline __m256i shift(__m256i bytes) {
    if constexpr (n > 0) return _mm256_slli_epi16(bytes, n);
    if constexpr (n < 0) return _mm256_srli_epi16(bytes, -n);
    return bytes;
}
// Bits from … from + count - 1 of each byte, moved to bit `to`; all others 0.
template <int from, int count, int to>
inline B field(B b) {
    if constexpr (count == 8) return b;
    const __m256i mask = _mm256_set1_epi8(int8_t(((1 << count) - 1) << to));
    return {_mm256_and_si256(shift<to - from>(b.lo), mask), _mm256_and_si256(shift<to - from>(b.hi), mask)};
}
// a, and the field of b, in which a is 0.
template <int from, int count, int to>
inline B with_field(B a, B b) {
    const B added = field<from, count, to>(b);
    return {_mm256_or_si256(a.lo, added.lo), _mm256_or_si256(a.hi, added.hi)};
}
inline void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

inline __m256i broadcast_four(const int8_t *a) {
    int32_t four;
    std::memcpy(&four, a, 4);
    return _mm256_set1_epi32(four);
}
inline B four_times(const int8_t *a) { return {broadcast_four(a), broadcast_four(a)}; }
inline __m256i pairs_to_int(__m256i words) { return _mm256_madd_epi16(words, _mm256_set1_epi16(1)); }

constexpr int kBlockPanels = 1;  // panels that a block of rows is multiplied with at once

// Sixteen integer dot products of 16 or 32 k, four a step. vpmaddubsw adds pairs in saturating 16 bits, so what a sum
// may hold follows from the weights' bits (activations are within ±127): 8 bits are multiplied as 7 + 1.
template <int bits>
struct Dot {
    __m256i lo, hi;
    void init(int32_t start) { lo = hi = _mm256_set1_epi32(start); }
    void step(B w, const int8_t *a) { step(w, broadcast_four(a)); }
    // a: the four activations 16 times over.
    void step(B w, B a) { step(w, a.lo); }
    void step(B w, __m256i x) {
        const __m256i top = _mm256_set1_epi8(int8_t(0x80));
        const __m256i l0 = pairs_to_int(_mm256_maddubs_epi16(_mm256_andnot_si256(top, w.lo), x));
        const __m256i l1 = pairs_to_int(_mm256_maddubs_epi16(_mm256_and_si256(top, w.lo), x));
        const __m256i h0 = pairs_to_int(_mm256_maddubs_epi16(_mm256_andnot_si256(top, w.hi), x));
        const __m256i h1 = pairs_to_int(_mm256_maddubs_epi16(_mm256_and_si256(top, w.hi), x));
        lo = _mm256_add_epi32(lo, _mm256_add_epi32(l0, l1));
        hi = _mm256_add_epi32(hi, _mm256_add_epi32(h0, h1));
    }
    F finish() const { return to_float(I{lo, hi}); }
};

// 5 and 6 bits: 16 bits hold the sums of 4 steps (4 * 2 * 31 * 127 = 31496) and of 2 (2 * 2 * 63 * 127 = 32004).
template <int bits>
    requires(bits == 5 || bits == 6)
struct Dot<bits> {
    static constexpr int kSteps = bits == 5 ? 4 : 2;
    __m256i lo, hi, words_lo, words_hi;
    int steps;
    void init(int32_t start) {
        lo = hi = _mm256_set1_epi32(start);
        words_lo = words_hi = _mm256_setzero_si256();
        steps = 0;
    }
    void step(B w, const int8_t *a) { step(w, broadcast_four(a)); }
    // a: the four activations 16 times over.
    void step(B w, B a) { step(w, a.lo); }
    void step(B w, __m256i x) {
        words_lo = _mm256_add_epi16(words_lo, _mm256_maddubs_epi16(w.lo, x));
        words_hi = _mm256_add_epi16(words_hi, _mm256_maddubs_epi16(w.hi, x));
        if (++steps % kSteps > 0) return;
        lo = _mm256_add_epi32(lo, pairs_to_int(words_lo));
        hi = _mm256_add_epi32(hi, pairs_to_int(words_hi));
        words_lo = words_hi = _mm256_setzero_si256();
    }
    F finish() const { return to_float(I{lo, hi}); }
};

// Up to 4 bits: |sum| of 8 steps is at most 8 * 2 * 15 * 127 = 30480, within 16 bits.
template <int bits>
    requires(bits <= 4)
struct Dot<bits> {
    __m256i lo, hi;
    int32_t start;
    void init(int32_t value) {
        lo = hi = _mm256_setzero_si256();
        start = value;
    }
    void step(B w, const int8_t *a) { step(w, broadcast_four(a)); }
    // a: the four activations 16 times over.
    void step(B w, B a) { step(w, a.lo); }
    void step(B w, __m256i x) {
        lo = _mm256_add_epi16(lo, _mm256_maddubs_epi16(w.lo, x));
        hi = _mm256_add_epi16(hi, _mm256_maddubs_epi16(w.hi, x));
    }
    F finish() const {
        const __m256i s = _mm256_set1_epi32(start);
        return to_float(I{_mm256_add_epi32(pairs_to_int(lo), s), _mm256_add_epi32(pairs_to_int(hi), s)});
    }
};

KVARN_KERNELS_END
