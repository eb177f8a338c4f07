// Linear layers: out[row][feature] = sum over k of w[feature][k] * x[row][k].
//
// One micro-kernel serves GEMV and GEMM: a panel of 16 features times M = 1…8 rows. For each (feature, row) the
// sequence is the same for every M: over groups in order, an exact integer dot product, its conversion to float, one
// multiplication by the activations' scale, one fused multiply-add with the weights' scale, and one with the weights'
// minimum where the format has one. M only decides how often a group is unpacked.
#include <utility>

#include "kvarn/kernels.h"
#include "vec.h"

KVARN_KERNELS_BEGIN
namespace {

template <int rows>
struct Tile {
    const int8_t *q[rows];
    const float *scale[rows];
    const float *sum[rows];
    const int32_t *half[rows];
    const int32_t *start[rows];  // what the integer sums start from: -zero * sum of q
};

// Integer dots of one group (part 0, parts 1) or of one of its halves (part 0 or 1, parts 2) for all rows.
template <int pack_bits, int bits, int rows, int part, int parts>
inline void dots(const uint8_t *w, const Tile<rows> &x, int64_t g, bool symmetric, I (&out)[rows]) {
    Dot<bits> dot[rows];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) dot[r].init(symmetric ? x.start[r][g * parts + part] : 0);
    if constexpr (pack_bits == 4) {
        static_assert(parts == 1);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const B both = load_b(w + 64 * j);
            const B low = low_nibbles(both), high = high_nibbles(both);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                dot[r].step(low, x.q[r] + g * kGroup + 4 * j);
                dot[r].step(high, x.q[r] + g * kGroup + 4 * j + 16);
            }
        }
    } else {
        constexpr int quads = 8 / parts;
#pragma GCC unroll 8
        for (int j = part * quads; j < (part + 1) * quads; ++j) {
            const B line = load_b(w + 64 * j);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) dot[r].step(line, x.q[r] + g * kGroup + 4 * j);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) out[r] = dot[r].finish();
}

inline const uint16_t *halves(const uint8_t *p) { return reinterpret_cast<const uint16_t *>(p); }

// Formats whose scale is for 32 k: acc += d * (scale * dot) [+ m * sum].
template <int pack_bits, int bits, bool affine, int rows>
inline void add_group(const uint8_t *w, F d, F m, const Tile<rows> &x, int64_t g, F (&acc)[rows]) {
    I s[rows];
    dots<pack_bits, bits, rows, 0, 1>(w, x, g, !affine, s);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        acc[r] = fma(mul(to_float(s[r]), set(x.scale[r][g])), d, acc[r]);
        if constexpr (affine) acc[r] = fma(set(x.sum[r][g]), m, acc[r]);
    }
}

// Formats with a scale for each 16 k. The scaled sums of both halves are integers below 2^24, so exact in float.
template <int bits, bool affine, int rows>
inline void add_halves(const uint8_t *w, const uint8_t *sc, const uint8_t *mn, F d, F dmin, const Tile<rows> &x,
                       int64_t g, F (&acc)[rows]) {
    I low[rows], high[rows];
    dots<8, bits, rows, 0, 2>(w, x, g, !affine, low);
    dots<8, bits, rows, 1, 2>(w, x, g, !affine, high);
    const F sc0 = affine ? load_u8(sc) : load_i8(sc), sc1 = affine ? load_u8(sc + 16) : load_i8(sc + 16);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        const F scale = set(x.scale[r][g]);
        acc[r] = fma(mul(fma(to_float(low[r]), sc0, mul(to_float(high[r]), sc1)), scale), d, acc[r]);
        if constexpr (affine) {
            const F sum0 = set(float(x.half[r][2 * g])), sum1 = set(float(x.half[r][2 * g + 1]));
            acc[r] = fma(mul(fma(sum0, load_u8(mn), mul(sum1, load_u8(mn + 16))), scale), dmin, acc[r]);
        }
    }
}

// Weights are read once per call or tile, in one direction: lines are asked for this far ahead of their use. Found by
// measuring (docs/dev/perf-log.md); hardware prefetchers alone reach half of the memory's bandwidth.
constexpr int64_t kPrefetchAhead = 4096;

template <int64_t bytes>
inline void prefetch_ahead(const uint8_t *&next) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < bytes; i += 64) prefetch(next + i);
    next += bytes;
}

template <int pack_bits, int bits, Scales kind, int rows>
inline void panel_times_rows(const uint8_t *w, const uint8_t *scales, int64_t groups, const Tile<rows> &x,
                             F (&acc)[rows]) {
    constexpr size_t group_bytes = quant_group_bytes(pack_bits);
    constexpr size_t unit = scale_unit_bytes(kind);
    constexpr bool plain = kind == Scales::kSym32 || kind == Scales::kAffine32;
    constexpr int64_t bytes_per_group = group_bytes + unit / (plain ? 1 : kSuperGroups);
    const uint8_t *ahead = w + kPrefetchAhead;
    if constexpr (plain) {
        constexpr bool affine = kind == Scales::kAffine32;
        for (int64_t g = 0; g < groups; ++g, w += group_bytes, scales += unit) {
            const F d = load_f16(halves(scales));
            const F m = affine ? load_f16(halves(scales) + 16) : zero();
            prefetch_ahead<bytes_per_group>(ahead);
            add_group<pack_bits, bits, affine, rows>(w, d, m, x, g, acc);
        }
    } else {
        for (int64_t g = 0; g < groups; scales += unit) {
            const F d = load_f16(halves(scales));
            const F minus_dmin = kind == Scales::kSuperSym16 ? zero() : sub(zero(), load_f16(halves(scales) + 16));
            for (int i = 0; i < kSuperGroups; ++i, ++g, w += group_bytes) {
                prefetch_ahead<bytes_per_group>(ahead);
                if constexpr (kind == Scales::kSuper32) {
                    const uint8_t *sc = scales + 64 + 16 * i;
                    add_group<pack_bits, bits, true, rows>(w, mul(d, load_u8(sc)), mul(minus_dmin, load_u8(sc + 128)), x,
                                                           g, acc);
                } else if constexpr (kind == Scales::kSuperSym16) {
                    add_halves<bits, false, rows>(w, scales + 32 + 32 * i, nullptr, d, d, x, g, acc);
                } else {
                    const uint8_t *sc = scales + 64 + 32 * i;
                    add_halves<bits, true, rows>(w, sc, sc + 256, d, minus_dmin, x, g, acc);
                }
            }
        }
    }
}

inline void store_rows(const LinearArgs &a, int64_t panel, int64_t row, F value) {
    const int64_t feature = panel * kPanelRows;
    store_n(a.out + (row - a.out_row) * a.out_stride + feature - a.out_feature, value, a.w->rows - feature);
}

template <int pack_bits, int bits, Scales kind, int rows>
void quantized_tile(const LinearArgs &a, int64_t row) {
    const int64_t groups = a.w->groups();
    Tile<rows> x;
    for (int r = 0; r < rows; ++r) {
        x.q[r] = a.xq->q + (row + r) * a.xq->cols;
        x.scale[r] = a.xq->scale + (row + r) * groups;
        x.sum[r] = a.xq->sum + (row + r) * groups;
        x.half[r] = a.xq->half + (row + r) * 2 * groups;
        x.start[r] = a.scratch + r * 2 * groups;
    }
    for (int64_t p = a.panel_begin; p < a.panel_end; ++p) {
        const uint8_t *w = a.w->panel(p);
        F acc[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) acc[r] = zero();
        panel_times_rows<pack_bits, bits, kind, rows>(w, w + groups * quant_group_bytes(pack_bits), groups, x, acc);
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) store_rows(a, p, row + r, acc[r]);
    }
}

// Where a format subtracts `zero`, the integer sums of a tile's rows start from -zero * sum(q).
void prepare_starts(const LinearArgs &a, int64_t row, int rows) {
    const FormatTraits &t = traits(a.w->format);
    const int64_t groups = a.w->groups();
    for (int r = 0; r < rows; ++r) {
        const int32_t *half = a.xq->half + (row + r) * 2 * groups;
        int32_t *start = a.scratch + r * 2 * groups;
        if (t.scales == Scales::kSym32)
            for (int64_t g = 0; g < groups; ++g) start[g] = -t.zero * (half[2 * g] + half[2 * g + 1]);
        else if (t.scales == Scales::kSuperSym16)
            for (int64_t g = 0; g < 2 * groups; ++g) start[g] = -t.zero * half[g];
    }
}

using TileFunction = void (*)(const LinearArgs &, int64_t row);

template <class Make, int... rows>
constexpr void fill(TileFunction (&table)[kTileTokens], Make make, std::integer_sequence<int, rows...>) {
    ((table[rows] = make.template operator()<rows + 1>()), ...);
}

template <int pack_bits, int bits, Scales kind>
void quantized(const LinearArgs &a) {
    static constexpr auto tiles = [] {
        struct Table { TileFunction f[kTileTokens]; } t{};
        fill(t.f, []<int rows>() { return TileFunction(quantized_tile<pack_bits, bits, kind, rows>); },
             std::make_integer_sequence<int, kTileTokens>());
        return t;
    }();
    for (int64_t row = a.row_begin; row < a.row_end; row += kTileTokens) {
        const int rows = int(a.row_end - row < kTileTokens ? a.row_end - row : kTileTokens);
        prepare_starts(a, row, rows);
        tiles.f[rows - 1](a, row);
    }
}

template <Format format>
inline F load_weights(const uint8_t *panel, int64_t k) {
    if constexpr (format == Format::F32) return load(reinterpret_cast<const float *>(panel) + k * kPanelRows);
    if constexpr (format == Format::F16) return load_f16(halves(panel) + k * kPanelRows);
    return load_bf16(halves(panel) + k * kPanelRows);
}

template <Format format, int rows>
void float_tile(const LinearArgs &a, int64_t row) {
    const float *x[rows];
    for (int r = 0; r < rows; ++r) x[r] = a.xf + (row + r) * a.x_stride;
    for (int64_t p = a.panel_begin; p < a.panel_end; ++p) {
        const uint8_t *w = a.w->panel(p);
        F acc[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) acc[r] = zero();
        for (int64_t k = 0; k < a.w->cols; ++k) {
            const F line = load_weights<format>(w, k);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) acc[r] = fma(line, set(x[r][k]), acc[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) store_rows(a, p, row + r, acc[r]);
    }
}

template <Format format>
void floating(const LinearArgs &a) {
    static constexpr auto tiles = [] {
        struct Table { TileFunction f[kTileTokens]; } t{};
        fill(t.f, []<int rows>() { return TileFunction(float_tile<format, rows>); },
             std::make_integer_sequence<int, kTileTokens>());
        return t;
    }();
    for (int64_t row = a.row_begin; row < a.row_end; row += kTileTokens) {
        const int64_t rows = a.row_end - row < kTileTokens ? a.row_end - row : kTileTokens;
        tiles.f[rows - 1](a, row);
    }
}

}  // namespace

void linear(const LinearArgs &a) {
    switch (a.w->format) {
        case Format::F32: return floating<Format::F32>(a);
        case Format::F16: return floating<Format::F16>(a);
        case Format::BF16: return floating<Format::BF16>(a);
        case Format::Q4_0: return quantized<4, 4, Scales::kSym32>(a);
        case Format::Q4_1: return quantized<4, 4, Scales::kAffine32>(a);
        case Format::Q5_0: return quantized<8, 7, Scales::kSym32>(a);
        case Format::Q5_1: return quantized<8, 7, Scales::kAffine32>(a);
        case Format::Q8_0: return quantized<8, 8, Scales::kSym32>(a);
        case Format::Q2_K: return quantized<8, 7, Scales::kSuper16>(a);
        case Format::Q3_K: return quantized<8, 7, Scales::kSuperSym16>(a);
        case Format::Q4_K: return quantized<4, 4, Scales::kSuper32>(a);
        case Format::Q5_K: return quantized<8, 7, Scales::kSuper32>(a);
        case Format::Q6_K: return quantized<8, 7, Scales::kSuperSym16>(a);
    }
}

KVARN_KERNELS_END
