// Scales of one group of a panel as floats, and how they turn integer sums into additions to the result.
//
// Every path that multiplies quantized weights ends in `apply` with the same numbers, so results do not depend on the
// path. A group has one integer sum, or two (of 16 k each) where the format scales 16 k.
#pragma once
#include "kvarn/kernels.h"
#include "vec.h"

KVARN_KERNELS_BEGIN

template <Scales kind>
constexpr bool kAffine = kind == Scales::kAffine32 || kind == Scales::kSuper32 || kind == Scales::kSuper16;
template <Scales kind>
constexpr int kParts = kind == Scales::kSuperSym16 || kind == Scales::kSuper16 ? 2 : 1;

// One group of the rows of a QuantGroup.
template <int tile>
struct Activations {
    const int8_t *q;  // row r: q + 32 * r
    const float *scale, *sum;
    const int32_t *half[2];

    KVARN_INLINE Activations(const QuantGroup<tile> &g, int first_row)
        : q(g.q[first_row]), scale(g.scale + first_row), sum(g.sum + first_row),
          half{g.half[0] + first_row, g.half[1] + first_row} {}
    KVARN_INLINE const int8_t *quad(int row, int j) const { return q + kGroup * row + 4 * j; }
};

// d for all; m (what the sum of activations is multiplied with) for affine formats; for two parts also the sub-scales
// sc of both and, for kSuper16, the sub-minimums mn.
template <Scales kind>
struct GroupScales {
    F d, m, sc[2], mn[2];

    // unit: the scales of the unit in which this is group i.
    KVARN_INLINE static GroupScales of(const uint8_t *unit, int i) {
        const auto halves = [&](int at) { return load_f16(reinterpret_cast<const uint16_t *>(unit + at)); };
        GroupScales s;
        s.d = halves(kind == Scales::kSym32 ? 32 * i : 0);
        if constexpr (kind == Scales::kAffine32) s.m = halves(32);
        if constexpr (kind == Scales::kSuper32) {
            s.d = mul(s.d, load_u8(unit + 64 + 16 * i));
            s.m = mul(sub(zero(), halves(32)), load_u8(unit + 64 + 128 + 16 * i));
        }
        if constexpr (kind == Scales::kSuperSym16)
            for (int h = 0; h < 2; ++h) s.sc[h] = load_i8(unit + 32 + 32 * i + 16 * h);
        if constexpr (kind == Scales::kSuper16) {
            s.m = sub(zero(), halves(32));
            for (int h = 0; h < 2; ++h) {
                s.sc[h] = load_u8(unit + 64 + 32 * i + 16 * h);
                s.mn[h] = load_u8(unit + 64 + 256 + 32 * i + 16 * h);
            }
        }
        return s;
    }

    // acc + d * scale * sums + m * sum of activations. Products of sums and sub-scales are integers below 2^24: exact.
    template <int tile>
    KVARN_INLINE F apply(const F (&sums)[kParts<kind>], const Activations<tile> &x, int row, F acc) const {
        const F scale = set(x.scale[row]);
        if constexpr (kParts<kind> == 1) {
            acc = fma(mul(sums[0], scale), d, acc);
            if constexpr (kAffine<kind>) acc = fma(set(x.sum[row]), m, acc);
            return acc;
        } else {
            const F scaled = fma(sums[0], sc[0], mul(sums[1], sc[1]));
            acc = fma(mul(scaled, scale), d, acc);
            if constexpr (kAffine<kind>) {
                const F half0 = set(float(x.half[0][row])), half1 = set(float(x.half[1][row]));
                acc = fma(mul(fma(half0, mn[0], mul(half1, mn[1])), scale), m, acc);
            }
            return acc;
        }
    }
};

// What integer sums of `rows` rows start from: -zero * sum of activations where the format subtracts a zero.
template <Scales kind, int rows>
struct Starts {
    int32_t value[kParts<kind>][kAffine<kind> ? 1 : rows];

    template <int tile>
    KVARN_INLINE Starts(int zero_point, const Activations<tile> &x) {
        if constexpr (!kAffine<kind>)
            for (int r = 0; r < rows; ++r) {
                if constexpr (kParts<kind> == 1)
                    value[0][r] = -zero_point * (x.half[0][r] + x.half[1][r]);
                else
                    for (int h = 0; h < 2; ++h) value[h][r] = -zero_point * x.half[h][r];
            }
    }
    KVARN_INLINE int32_t at(int part, int row) const {
        if constexpr (kAffine<kind>) return 0;
        return value[part][row];
    }
};

KVARN_KERNELS_END
