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

// A packed quantized format as the kernels are instantiated for it.
template <int pack_bits_, Scales kind_>
struct Packed {
    static constexpr int pack_bits = pack_bits_, parts = kParts<kind_>;
    static constexpr Scales kind = kind_;
    static constexpr uint64_t groups = unit_groups(kind);  // of a unit
    static constexpr int64_t group_bytes = quant_group_bytes(pack_bits), scales_at = groups * group_bytes;
    static constexpr int64_t unit_bytes = scales_at + scale_unit_bytes(kind);
    static constexpr int lines_a_group = int((unit_bytes / 64 + groups - 1) / groups);
};

// ---- quantized weights ----

// Quad q of a packed group.
template <int pack_bits, int q>
KVARN_INLINE B quad(const uint8_t *group) {
    constexpr QuadBits lower = quad_places(pack_bits, q).lower, upper = quad_places(pack_bits, q).upper;
    const B quants = field<lower.at, lower.count, 0>(load_b(group + 64 * lower.line));
    if constexpr (upper.count == 0)
        return quants;
    else
        return with_field<upper.at, upper.count, upper.from>(quants, load_b(group + 64 * upper.line));
}

// One quad of a row against the weights of `panels` panels, dot(p) being panel p's.
template <int panels, class Dots>
KVARN_INLINE void step_all(const B (&w)[panels], const int8_t *quad, Dots dot) {
    if constexpr (panels == 1) {
        dot(0).step(w[0], quad);
    } else {
        const B x = four_times(quad);
#pragma GCC unroll 2
        for (int p = 0; p < panels; ++p) dot(p).step(w[p], x);
    }
}

// Two quads of one group of `panels` panels for all rows.
template <class P, int q0, int q1, int tile, int panels, int rows>
KVARN_INLINE void two_quads(const uint8_t *const (&w)[panels], const Activations<tile> &x,
                            Dot<P::pack_bits> (&dot)[panels][rows][P::parts]) {
    B first[panels], second[panels];
    for (int p = 0; p < panels; ++p) {
        first[p] = quad<P::pack_bits, q0>(w[p]);
        second[p] = quad<P::pack_bits, q1>(w[p]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
        step_all(first, x.quad(r, q0), [&](int p) -> auto & { return dot[p][r][q0 * P::parts / kQuads]; });
        step_all(second, x.quad(r, q1), [&](int p) -> auto & { return dot[p][r][q1 * P::parts / kQuads]; });
    }
}

// Integer sums, as floats, of one group of `panels` panels for all rows. Quads j and j + 4, which share a line, are
// taken together where they belong to one sum.
template <class P, int tile, int panels, int rows, int... j>
KVARN_INLINE void packed_dots(const uint8_t *const (&w)[panels], const Activations<tile> &x, int zero_point,
                              F (&sums)[panels][rows][P::parts], std::integer_sequence<int, j...>) {
    const Starts<P::kind, rows> start(zero_point, x);
    Dot<P::pack_bits> dot[panels][rows][P::parts];
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
        for (int p = 0; p < panels; ++p)
            for (int part = 0; part < P::parts; ++part) dot[p][r][part].init(start.at(part, r));
    if constexpr (P::parts == 1)
        (two_quads<P, j, j + 4>(w, x, dot), ...);
    else
        (two_quads<P, 2 * j, 2 * j + 1>(w, x, dot), ...);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
        for (int p = 0; p < panels; ++p)
            for (int part = 0; part < P::parts; ++part) sums[p][r][part] = dot[p][r][part].finish();
}

// Panels `panel` … of rows `row` …, which lie in one tile.
template <class P, int tile, int panels, int rows>
void block(const LinearArgs &a, int64_t panel, int64_t row) {
    const QuantGroup<tile> *x = reinterpret_cast<const QuantGroup<tile> *>(a.xq->data) + row / tile * a.w->groups();
    const int first_row = int(row % tile);
    const int64_t groups = a.w->groups();
    const int zero_point = traits(a.w->format).zero;
    const uint64_t panel_bytes = uint64_t(a.w->panel(1) - a.w->panel(0));
    F acc[panels][rows];
    const uint8_t *first[panels];
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p) {
        first[p] = a.w->panel(panel + p);
        for (int r = 0; r < rows; ++r) acc[p][r] = zero();
    }
    for (int64_t g = 0; g < groups; ++g) {
        const uint64_t at = uint64_t(g) / P::groups * P::unit_bytes;
        const int i = int(uint64_t(g) % P::groups);
        const uint64_t ahead = at + kPrefetchAhead + 64 * uint64_t(i) * P::lines_a_group;
        // What comes after the end of a panel is the next block's, not the next panel's.
        const uint64_t skip = ahead >= panel_bytes ? (panels - 1) * panel_bytes : 0;
        const uint8_t *w[panels];
        for (int p = 0; p < panels; ++p) {
            w[p] = first[p] + at + i * P::group_bytes;
            prefetch_lines<P::lines_a_group>(first[p] + ahead + skip);
        }
        const Activations<tile> group(x[g], first_row);
        F sums[panels][rows][P::parts];
        packed_dots<P>(w, group, zero_point, sums, std::make_integer_sequence<int, kQuads / 2>());
#pragma GCC unroll 2
        for (int p = 0; p < panels; ++p) {
            const auto scales = GroupScales<P::kind>::of(first[p] + at + P::scales_at, i);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) acc[p][r] = scales.apply(sums[p][r], group, r, acc[p][r]);
        }
    }
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p)
        for (int r = 0; r < rows; ++r)
            store_n(result(a, panel + p, row + r), acc[p][r], features_from(a, panel + p));
}

// Rows of an item pass over its panels block by block while the panels stay in the nearest cache.
template <class P, int... counts>
void quantized_rows(const LinearArgs &a, std::integer_sequence<int, counts...>) {
    if (a.xq->single) {
        for (int64_t p = a.panel_begin; p < a.panel_end; ++p) block<P, 1, 1, 1>(a, p, 0);
        return;
    }
    using Function = void (*)(const LinearArgs &, int64_t, int64_t);
    static constexpr Function one[] = {block<P, kTileTokens, 1, counts + 1>...};
    static constexpr Function several[] = {block<P, kTileTokens, kBlockPanels, counts + 1>...};
    const int64_t span = linear_row_span(a.w->cols);
    for (int64_t row = a.row_begin; row < a.row_end; row += span) {
        const int64_t row_end = smaller(a.row_end, row + span);
        const bool many = row_end - row > kTileTokens;  // for one tile memory bounds, which two panels read as two streams
        for (int64_t p = a.panel_begin; p < a.panel_end;) {
            const bool all = many && p + kBlockPanels <= a.panel_end;
            for (int64_t r = row; r < row_end; r += kTileTokens)
                (all ? several : one)[smaller(row_end - r, kTileTokens) - 1](a, p, r);
            p += all ? kBlockPanels : 1;
        }
    }
}

template <Format format>
void quantized(const LinearArgs &a) {
    using P = Packed<traits(format).pack_bits, traits(format).scales>;
    if (a.row_begin < a.row_end) quantized_rows<P>(a, std::make_integer_sequence<int, kTileTokens>());
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
        case Format::Q4_0: return quantized<Format::Q4_0>(a);
        case Format::Q4_1: return quantized<Format::Q4_1>(a);
        case Format::Q5_0: return quantized<Format::Q5_0>(a);
        case Format::Q5_1: return quantized<Format::Q5_1>(a);
        case Format::Q8_0: return quantized<Format::Q8_0>(a);
        case Format::Q2_K: return quantized<Format::Q2_K>(a);
        case Format::Q3_K: return quantized<Format::Q3_K>(a);
        case Format::Q4_K: return quantized<Format::Q4_K>(a);
        case Format::Q5_K: return quantized<Format::Q5_K>(a);
        case Format::Q6_K: return quantized<Format::Q6_K>(a);
    }
}

KVARN_KERNELS_END
