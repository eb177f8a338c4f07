// Linear layers: out[row][feature] = sum over k of w[feature][k] * x[row][k].
//
// One kernel for any number of rows: a panel of 16 features times a block of rows, weights unpacked in registers. Few rows
// walk all panels; more rows pass over a panel block by block while it stays in the nearest cache. For each (feature,
// row) the sequence is the same: over groups in order, an exact integer dot product, then GroupScales::apply. Unpacking a
// panel into bytes first, for all rows, is no faster (docs/dev/perf-log.md).
#include <utility>

#include "kernels_internal.h"
#include "linear_scales.h"

KVARN_KERNELS_BEGIN
namespace {

template <int lines>
KVARN_INLINE void prefetch_lines(const uint8_t *first) {
#pragma GCC unroll 16
    for (int i = 0; i < lines; ++i) prefetch(first + 64 * i);
}

KVARN_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline float *result(const LinearArgs &a, int64_t panel, int64_t row) {
    return a.out + (row - a.out_row) * a.out_stride + panel * kPanelRows - a.out_feature;
}
inline int64_t features_from(const LinearArgs &a, int64_t panel) { return a.w->rows - panel * kPanelRows; }

// A packed quantized format as the kernels are instantiated for it. bits: how many a quant can use, 7 standing for
// "fewer than 8" in bytes (see Dot).
template <int pack_bits_, int bits_, Scales kind_>
struct Packed {
    static constexpr int pack_bits = pack_bits_, bits = bits_, parts = kParts<kind_>;
    static constexpr Scales kind = kind_;
    static constexpr uint64_t groups = unit_groups(kind);  // of a unit
    static constexpr int64_t group_bytes = quant_group_bytes(pack_bits), scales_at = groups * group_bytes;
    static constexpr int64_t unit_bytes = scales_at + scale_unit_bytes(kind);
    static constexpr int lines_a_group = int((unit_bytes / 64 + groups - 1) / groups);
};

// ---- quantized weights ----

// Integer sums of one group of one panel for all rows, quads in order.
template <class P, int tile, int rows>
KVARN_INLINE void packed_dots(const uint8_t *w, const Activations<tile> &x, int zero_point,
                              I (&sums)[rows][P::parts]) {
    const Starts<P::kind, rows> start(zero_point, x);
    Dot<P::bits> dot[rows][P::parts];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
        for (int part = 0; part < P::parts; ++part) dot[r][part].init(start.at(part, r));
    if constexpr (P::pack_bits == 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
            const B both = load_b(w + 64 * j);
            const B low = low_nibbles(both), high = high_nibbles(both);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) {
                dot[r][0].step(low, x.quad(r, j));
                dot[r][0].step(high, x.quad(r, j + 4));
            }
        }
    } else {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            const B line = load_b(w + 64 * j);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) dot[r][j * P::parts / 8].step(line, x.quad(r, j));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
        for (int part = 0; part < P::parts; ++part) sums[r][part] = dot[r][part].finish();
}

template <class P, int tile, int rows>
void block_of_rows(const LinearArgs &a, int64_t panel_begin, int64_t panel_end, int64_t row) {
    const QuantGroup<tile> *x = reinterpret_cast<const QuantGroup<tile> *>(a.xq->data) + row / tile * a.w->groups();
    const int64_t groups = a.w->groups();
    const int zero_point = traits(a.w->format).zero;
    for (int64_t p = panel_begin; p < panel_end; ++p) {
        F acc[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) acc[r] = zero();
        const uint8_t *panel = a.w->panel(p);
        for (int64_t g = 0; g < groups; ++g) {
            const uint8_t *unit = panel + uint64_t(g) / P::groups * P::unit_bytes;
            const int i = int(uint64_t(g) % P::groups);
            prefetch_lines<P::lines_a_group>(unit + kPrefetchAhead + 64 * i * P::lines_a_group);
            const Activations<tile> group(x[g]);
            I sums[rows][P::parts];
            packed_dots<P, tile, rows>(unit + i * P::group_bytes, group, zero_point, sums);
            const auto scales = GroupScales<P::kind>::of(unit + P::scales_at, i);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) acc[r] = scales.apply(sums[r], group, r, acc[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) store_n(result(a, p, row + r), acc[r], features_from(a, p));
    }
}

template <class P, int... counts>
void quantized_rows(const LinearArgs &a, std::integer_sequence<int, counts...>) {
    if (a.xq->single) return block_of_rows<P, 1, 1>(a, a.panel_begin, a.panel_end, 0);
    using Function = void (*)(const LinearArgs &, int64_t, int64_t, int64_t);
    static constexpr Function functions[] = {block_of_rows<P, kTileTokens, counts + 1>...};
    if (a.row_end - a.row_begin <= kTileTokens)
        return functions[a.row_end - a.row_begin - 1](a, a.panel_begin, a.panel_end, a.row_begin);
    const int64_t span = linear_row_span(a.w->cols);
    for (int64_t row = a.row_begin; row < a.row_end; row += span) {
        const int64_t row_end = smaller(a.row_end, row + span);
        for (int64_t p = a.panel_begin; p < a.panel_end; ++p)
            for (int64_t r = row; r < row_end; r += kTileTokens) functions[smaller(row_end - r, kTileTokens) - 1](a, p, p + 1, r);
    }
}

template <int pack_bits, int bits, Scales kind>
void quantized(const LinearArgs &a) {
    if (a.row_begin < a.row_end)
        quantized_rows<Packed<pack_bits, bits, kind>>(a, std::make_integer_sequence<int, kTileTokens>());
}

// ---- float weights ----

template <Format format>
KVARN_INLINE F load_weights(const uint8_t *panel, int64_t k) {
    const auto *halves = reinterpret_cast<const uint16_t *>(panel);
    if constexpr (format == Format::F32) return load(reinterpret_cast<const float *>(panel) + k * kPanelRows);
    if constexpr (format == Format::F16) return load_f16(halves + k * kPanelRows);
    return load_bf16(halves + k * kPanelRows);
}

template <Format format, int rows>
void float_rows(const LinearArgs &a, int64_t row) {
    constexpr int64_t line = kPanelRows * (format == Format::F32 ? 4 : 2);
    const float *x[rows];
    for (int r = 0; r < rows; ++r) x[r] = a.xf + (row + r) * a.x_stride;
    for (int64_t p = a.panel_begin; p < a.panel_end; ++p) {
        const uint8_t *w = a.w->panel(p);
        F acc[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) acc[r] = zero();
        for (int64_t k = 0; k < a.w->cols; ++k) {
            prefetch(w + k * line + kPrefetchAhead);
            const F weights = load_weights<format>(w, k);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) acc[r] = fma(weights, set(x[r][k]), acc[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) store_n(result(a, p, row + r), acc[r], features_from(a, p));
    }
}

template <Format format, int... counts>
void float_blocks(const LinearArgs &a, std::integer_sequence<int, counts...>) {
    static constexpr void (*functions[])(const LinearArgs &, int64_t) = {float_rows<format, counts + 1>...};
    for (int64_t row = a.row_begin; row < a.row_end; row += kTileTokens)
        functions[smaller(a.row_end - row, kTileTokens) - 1](a, row);
}

template <Format format>
void floating(const LinearArgs &a) {
    float_blocks<format>(a, std::make_integer_sequence<int, kTileTokens>());
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
