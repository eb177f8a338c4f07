// The rotation of int4 keys and of the queries that meet them.
//
// A Hadamard matrix spreads a large element over all of a vector, so that it does not coarsen the scale of its group,
// and leaves dot products of rotated vectors what they were (QuaRot, Ashkboos et al. 2024, section 4). A vector is cut
// into parts of a power of two, at most kMostRotated, and each part is transformed: log2(n) times (sums, differences) of
// neighbours. Factors are powers of two, which round nothing: those of keys and queries make 1 / n together.
#pragma once
#include "vec.h"

KVARN_KERNELS_BEGIN

constexpr int64_t kMostRotated = 256;

// Elements of the part that begins `rest` (a multiple of 32) before the vector's end.
inline int64_t rotated_part(int64_t rest) {
    int64_t n = kMostRotated;
    while (n > rest) n /= 2;
    return n;
}

// Transforms n elements in place, n a power of two from 32 to kMostRotated.
inline void rotate_part(float *x, int64_t n, bool query) {
    float other[kMostRotated];
    float *from = x, *to = other;
    float factor = 1.0f;
    int stage = 0;
    for (int64_t span = n; span > 1; span /= 2, ++stage) {
        if (stage % 2 != int(query)) factor *= 0.5f;  // of the stages keys halve every second, queries the others
        for (int64_t i = 0; i < n; i += 2 * kLanes) {
            F even, odd;
            deinterleave(load(from + i), load(from + i + kLanes), even, odd);
            store(to + i / 2, add(even, odd));
            store(to + (n + i) / 2, sub(even, odd));
        }
        float *done = to;
        to = from;
        from = done;
    }
    for (int64_t i = 0; i < n; i += kLanes) store(x + i, mul(load(from + i), set(factor)));
}

KVARN_KERNELS_END
