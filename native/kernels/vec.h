// Sixteen lanes of float32 or int32, the same in every ISA, so that a kernel is written once.
//
// vec_<isa>.h provides the types F (floats), I (int32), M (mask), B (64 bytes) and Dot<bits>, and the functions used
// below. Lane i of a vector never meets lane j, except in reduce_*, whose tree is fixed: i + 8, i + 4, i + 2, i + 1.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__AVX512VNNI__)
#include "vec_avx512.h"
#elif defined(__AVX2__)
#include "vec_avx2.h"
#else
#include "vec_scalar.h"
#endif

KVARN_KERNELS_BEGIN

constexpr int kLanes = 16;

// e^x, 2 ulp on [-87.3, 88]; 0 below (so e^-inf is exactly 0), e^88 above. Range reduction by ln 2 in two parts and the
// polynomial of Moshier's Cephes (expf).
inline F exp(F x) {
    const F low = set(-87.33f);
    const M underflow = less(x, low);
    x = min(max(x, low), set(88.0f));
    const I n = to_int(mul(x, set(1.44269504088896341f)));
    const F nf = to_float(n);
    F r = fma(nf, set(-0.693359375f), x);
    r = fma(nf, set(2.12194440e-4f), r);
    F p = set(1.9875691500e-4f);
    p = fma(p, r, set(1.3981999507e-3f));
    p = fma(p, r, set(8.3334519073e-3f));
    p = fma(p, r, set(4.1665795894e-2f));
    p = fma(p, r, set(1.6666665459e-1f));
    p = fma(p, r, set(5.0000001201e-1f));
    p = fma(p, mul(r, r), add(r, set(1.0f)));
    return select(underflow, zero(), mul(p, pow2(n)));
}

// tanh(x) = sign(x) (1 - t) / (1 + t), t = e^(-2|x|); absolute error below 2e-7.
inline F tanh(F x) {
    const F t = exp(mul(abs(x), set(-2.0f)));
    const F y = div(sub(set(1.0f), t), add(set(1.0f), t));
    return copy_sign(y, x);
}

KVARN_KERNELS_END
