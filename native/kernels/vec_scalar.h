// Plain C++: runs anywhere, and is what the other ISAs are read against.
#pragma once
#include "isa.h"
#include "kvarn/half.h"

KVARN_KERNELS_BEGIN

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct B { uint8_t v[64]; };
struct M { bool v[16]; };

template <class R, class Lane>
inline R each(Lane lane) {
    R r;
    for (int i = 0; i < 16; ++i) r.v[i] = lane(i);
    return r;
}

inline M first(int64_t n) { return each<M>([=](int i) { return i < n; }); }
inline F zero() { return each<F>([](int) { return 0.0f; }); }
inline F set(float x) { return each<F>([=](int) { return x; }); }
inline I set_i(int32_t x) { return each<I>([=](int) { return x; }); }
inline F load(const float *p) { return each<F>([=](int i) { return p[i]; }); }
inline F load_n(const float *p, int64_t n) { return each<F>([=](int i) { return i < n ? p[i] : 0.0f; }); }
inline void store(float *p, F a) { std::memcpy(p, a.v, sizeof a.v); }
inline void store_n(float *p, F a, int64_t n) { std::memcpy(p, a.v, size_t(n < 16 ? n : 16) * 4); }
inline F load_f16(const uint16_t *p) { return each<F>([=](int i) { return half_to_float(p[i]); }); }
inline F load_bf16(const uint16_t *p) {
    return each<F>([=](int i) {
        const uint32_t bits = uint32_t(p[i]) << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    });
}
inline void store_f16(uint16_t *p, F a) {
    for (int i = 0; i < 16; ++i) p[i] = float_to_half(a.v[i]);
}
inline F load_u8(const uint8_t *p) { return each<F>([=](int i) { return float(p[i]); }); }
inline F load_low_u4(const uint8_t *p) { return each<F>([=](int i) { return float(p[i] & 15); }); }
inline F load_high_u4(const uint8_t *p) { return each<F>([=](int i) { return float(p[i] >> 4); }); }
inline F load_i8(const uint8_t *p) { return each<F>([=](int i) { return float(int8_t(p[i])); }); }

inline F add(F a, F b) { return each<F>([&](int i) { return a.v[i] + b.v[i]; }); }
inline F sub(F a, F b) { return each<F>([&](int i) { return a.v[i] - b.v[i]; }); }
inline F mul(F a, F b) { return each<F>([&](int i) { return a.v[i] * b.v[i]; }); }
inline F div(F a, F b) { return each<F>([&](int i) { return a.v[i] / b.v[i]; }); }
inline F fma(F a, F b, F c) { return each<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F max(F a, F b) { return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F min(F a, F b) { return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline F abs(F a) { return each<F>([&](int i) { return std::fabs(a.v[i]); }); }
inline F copy_sign(F a, F sign) { return each<F>([&](int i) { return std::copysign(a.v[i], sign.v[i]); }); }
inline M less(F a, F b) { return each<M>([&](int i) { return a.v[i] < b.v[i]; }); }
inline F select(M m, F a, F b) { return each<F>([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; }); }
inline int32_t round_to_int(float x) {  // as the vector ISAs: nearest even, the least integer where x does not fit
    if (!(std::fabs(x) < 2147483648.0f)) return INT32_MIN;
    return int32_t(std::nearbyint(x));
}
inline I to_int(F a) { return each<I>([&](int i) { return round_to_int(a.v[i]); }); }
inline F to_float(I a) { return each<F>([&](int i) { return float(a.v[i]); }); }
inline F pow2(I n) {
    return each<F>([&](int i) {
        const uint32_t bits = uint32_t(n.v[i] + 127) << 23;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    });
}
inline I abs_bits(F a) {
    I r;
    std::memcpy(r.v, a.v, sizeof r.v);
    return each<I>([&](int i) { return r.v[i] & 0x7fffffff; });
}
inline I max_i(I a, I b) { return each<I>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }

template <class T, class V, class Op>
inline T tree(const V &a, Op op) {
    T t[16];
    for (int i = 0; i < 16; ++i) t[i] = a.v[i];
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) t[i] = op(t[i], t[i + half]);
    return t[0];
}
inline float reduce_add(F a) { return tree<float>(a, [](float x, float y) { return x + y; }); }
inline float reduce_max(F a) { return tree<float>(a, [](float x, float y) { return x > y ? x : y; }); }
inline int32_t reduce_max_i(I a) { return tree<int32_t>(a, [](int32_t x, int32_t y) { return x > y ? x : y; }); }
// Returns the sum of what it stored.
inline int32_t store_i8(int8_t *p, I a) {
    int32_t sum = 0;
    for (int i = 0; i < 16; ++i) sum += p[i] = int8_t(a.v[i] < -128 ? -128 : a.v[i] > 127 ? 127 : a.v[i]);
    return sum;
}

// Pairs (x0, x1), (x2, x3)… of 32 floats into their first and second elements, and back.
inline void deinterleave(F a, F b, F &even, F &odd) {
    for (int i = 0; i < 8; ++i) {
        even.v[i] = a.v[2 * i], odd.v[i] = a.v[2 * i + 1];
        even.v[8 + i] = b.v[2 * i], odd.v[8 + i] = b.v[2 * i + 1];
    }
}
inline void interleave(F even, F odd, F &a, F &b) {
    for (int i = 0; i < 8; ++i) {
        a.v[2 * i] = even.v[i], a.v[2 * i + 1] = odd.v[i];
        b.v[2 * i] = even.v[8 + i], b.v[2 * i + 1] = odd.v[8 + i];
    }
}

inline B load_b(const uint8_t *p) {
    B b;
    std::memcpy(b.v, p, 64);
    return b;
}
// Bits from … from + count - 1 of each byte, moved to bit `to`; all others 0.
template <int from, int count, int to>
inline B field(B b) {
    for (auto &x : b.v) x = uint8_t((x >> from & ((1 << count) - 1)) << to);
    return b;
}
// a, and the field of b, in which a is 0.
template <int from, int count, int to>
inline B with_field(B a, const B &b) {
    const B added = field<from, count, to>(b);
    for (int i = 0; i < 64; ++i) a.v[i] |= added.v[i];
    return a;
}
inline B four_times(const int8_t *p) {
    B b;
    for (int i = 0; i < 16; ++i) std::memcpy(b.v + 4 * i, p, 4);
    return b;
}
inline void prefetch(const void *) {}

constexpr int kBlockPanels = 1;  // panels that a block of rows is multiplied with at once

// Sixteen integer dot products, four k a step.
template <int bits>
struct Dot {
    I acc;
    void init(int32_t start) { acc = set_i(start); }
    void step(const B &w, const int8_t *a) {
        for (int i = 0; i < 16; ++i)
            for (int k = 0; k < 4; ++k) acc.v[i] += int32_t(w.v[4 * i + k]) * a[k];
    }
    // a: the four activations 16 times over.
    void step(const B &w, const B &a) {
        for (int i = 0; i < 64; ++i) acc.v[i / 4] += int32_t(w.v[i]) * int8_t(a.v[i]);
    }
    F finish() const { return to_float(acc); }
};

KVARN_KERNELS_END
