// Linear layers: out[row][feature] = sum over k of w[feature][k] * x[row][k].
//
// Up to 8 rows read packed weights directly, a panel of 16 features at a time. More rows first unpack a slice of one or
// two panels into L1, as bytes with float scales, and pass all rows over it; K is cut into slices, and sums wait in the
// result between them. For each (feature, row) the sequence is the same in both: over groups in order, an exact integer
// dot product, then GroupScales::apply. The path only decides how often a group is unpacked.
#include <utility>

#include "kernels_internal.h"
#include "linear_scales.h"

KVARN_KERNELS_BEGIN
namespace {

// Weights are read in one direction: lines are asked for this far ahead of their use. Found by measuring
// (docs/dev/perf-log.md); hardware prefetchers alone reach half of the memory's bandwidth.
constexpr int64_t kPrefetchAhead = 4096;

template <int64_t bytes>
KVARN_INLINE void prefetch_ahead(const uint8_t *&next) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < bytes; i += 64) prefetch(next + i);
    next += bytes;
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
    static constexpr int64_t group_bytes = quant_group_bytes(pack_bits), unit = scale_unit_bytes(kind);
    static constexpr int groups_per_unit = kPlain<kind> ? 1 : kSuperGroups;
    static constexpr int64_t bytes_per_group = group_bytes + unit / groups_per_unit;
    using Group = GroupScales<kind>;

    static const uint8_t *scales(const uint8_t *panel, int64_t groups, int64_t g) {
        return panel + groups * group_bytes + g / groups_per_unit * unit;
    }
    static Group group_scales(const uint8_t *panel, int64_t groups, int64_t g) {
        return Group::of(scales(panel, groups, g), int(g % groups_per_unit));
    }
};

// ---- up to 8 rows ----

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
                dot[r][0].step_once(low, x.quad(r, j));
                dot[r][0].step_once(high, x.quad(r, j + 4));
            }
        }
    } else {
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j) {
            const B line = load_b(w + 64 * j);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) dot[r][j * P::parts / 8].step_once(line, x.quad(r, j));
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
        for (int part = 0; part < P::parts; ++part) sums[r][part] = dot[r][part].finish();
}

template <class P, int tile, int rows>
void few_rows(const LinearArgs &a, const QuantGroup<tile> *x, int64_t row) {
    const int64_t groups = a.w->groups();
    const int zero_point = traits(a.w->format).zero;
    for (int64_t p = a.panel_begin; p < a.panel_end; ++p) {
        const uint8_t *panel = a.w->panel(p);
        const uint8_t *ahead = panel + kPrefetchAhead;
        F acc[rows];
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) acc[r] = zero();
        for (int64_t g = 0; g < groups; ++g) {
            prefetch_ahead<P::bytes_per_group>(ahead);
            const Activations<tile> group(x[g]);
            I sums[rows][P::parts];
            packed_dots<P, tile, rows>(panel + g * P::group_bytes, group, zero_point, sums);
            const auto scales = P::group_scales(panel, groups, g);
#pragma GCC unroll 8
            for (int r = 0; r < rows; ++r) acc[r] = scales.apply(sums[r], group, r, acc[r]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; ++r) store_n(result(a, p, row + r), acc[r], features_from(a, p));
    }
}

// ---- many rows ----

constexpr int64_t kSliceGroups = 20;  // groups of a slice at most: two panels of bytes are 20 KiB
constexpr int64_t kByteGroup = quant_group_bytes(8);

// A slice of `panels` panels: where its bytes are, group after group, its scales as floats.
template <class P, int panels>
struct Slice {
    const uint8_t *bytes[panels];
    const float *scales[panels];
    int64_t groups;
    bool first;          // sums start from zero
    int64_t features;    // of the last panel; the others are full
    int64_t out_stride;
    int zero_point;

    static constexpr int64_t group_floats = P::Group::kVectors * 16;
    static_assert(kGemmPanels * kSliceGroups * (kByteGroup + group_floats * 4) <= int64_t(kLinearScratch));
};

template <class P, int panels>
Slice<P, panels> unpack_slice(const LinearArgs &a, int64_t panel, int64_t begin, int64_t end) {
    Slice<P, panels> slice;
    slice.groups = end - begin;
    slice.first = begin == 0;
    slice.features = features_from(a, panel + panels - 1);
    slice.out_stride = a.out_stride;
    slice.zero_point = traits(a.w->format).zero;
    uint8_t *bytes = a.scratch;
    float *scales = reinterpret_cast<float *>(a.scratch + panels * kSliceGroups * kByteGroup);
    for (int p = 0; p < panels; ++p) {
        const uint8_t *w = a.w->panel(panel + p);
        slice.bytes[p] = P::pack_bits == 4 ? bytes : w + begin * P::group_bytes;
        slice.scales[p] = scales;
        for (int64_t g = begin; g < end; ++g) {
            P::group_scales(w, a.w->groups(), g).store_to(scales);
            scales += Slice<P, panels>::group_floats;
            if constexpr (P::pack_bits == 4) {
                for (int j = 0; j < 4; ++j) {
                    const B both = load_b(w + g * P::group_bytes + 64 * j);
                    store_b(bytes + 64 * j, low_nibbles(both));
                    store_b(bytes + 64 * (j + 4), high_nibbles(both));
                }
                bytes += kByteGroup;
            }
        }
    }
    return slice;
}

// `rows` rows from `lane` of a tile times a slice, added to what `out` holds, or to zero for the first slice.
template <class P, int panels, int rows>
void slice_times_rows(const Slice<P, panels> &slice, const QuantGroup<kTileTokens> *x, int lane, float *out) {
    F acc[panels][rows];
    const auto valid = [&](int p) { return p + 1 < panels ? int64_t(kPanelRows) : slice.features; };
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p)
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r)
            acc[p][r] = slice.first ? zero() : load_n(out + r * slice.out_stride + p * kPanelRows, valid(p));
    for (int64_t g = 0; g < slice.groups; ++g) {
        const Activations<kTileTokens> group(x[g], lane);
        const Starts<P::kind, rows> start(slice.zero_point, group);
        Dot<P::bits> dot[panels][rows][P::parts];
#pragma GCC unroll 2
        for (int p = 0; p < panels; ++p)
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r)
                for (int part = 0; part < P::parts; ++part) dot[p][r][part].init(start.at(part, r));
#pragma GCC unroll 8
        for (int j = 0; j < 8; ++j)
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
                for (int p = 0; p < panels; ++p)
                    dot[p][r][j * P::parts / 8].step(load_b(slice.bytes[p] + g * kByteGroup + 64 * j), group.quad(r, j));
#pragma GCC unroll 2
        for (int p = 0; p < panels; ++p) {
            const auto scales = P::Group::load_from(slice.scales[p] + g * Slice<P, panels>::group_floats);
#pragma GCC unroll 4
            for (int r = 0; r < rows; ++r) {
                I sums[P::parts];
                for (int part = 0; part < P::parts; ++part) sums[part] = dot[p][r][part].finish();
                acc[p][r] = scales.apply(sums, group, r, acc[p][r]);
            }
        }
    }
#pragma GCC unroll 2
    for (int p = 0; p < panels; ++p)
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) store_n(out + r * slice.out_stride + p * kPanelRows, acc[p][r], valid(p));
}

// Passes rows over one slice; meanwhile asks for the weights that come next.
template <class P, int panels>
void pass_rows(const LinearArgs &a, int64_t panel, int64_t begin, int64_t end, int64_t row_begin, int64_t row_end) {
    const Slice<P, panels> slice = unpack_slice<P, panels>(a, panel, begin, end);
    const uint8_t *next = a.w->panel(panel) + (end < a.w->groups() ? end : panels * a.w->groups()) * P::group_bytes;
    int64_t row = row_begin;
    const auto activations = [&] { return a.xq->tile(row) + begin; };
    for (; row + kGemmRows <= row_end; row += kGemmRows) {
        prefetch_ahead<256>(next);
        slice_times_rows<P, panels, kGemmRows>(slice, activations(), int(row % kTileTokens), result(a, panel, row));
    }
    for (; row < row_end; ++row)
        slice_times_rows<P, panels, 1>(slice, activations(), int(row % kTileTokens), result(a, panel, row));
}

template <class P>
void many_rows(const LinearArgs &a) {
    const int64_t groups = a.w->groups(), span = linear_row_span(a.w->cols);
    const int64_t slices = (groups + kSliceGroups - 1) / kSliceGroups;
    for (int64_t row = a.row_begin; row < a.row_end; row += span) {
        const int64_t row_end = smaller(a.row_end, row + span);
        for (int64_t p = a.panel_begin; p < a.panel_end;) {
            const int panels = p + kGemmPanels <= a.panel_end ? kGemmPanels : 1;
            for (int64_t s = 0; s < slices; ++s) {
                const int64_t begin = groups * s / slices, end = groups * (s + 1) / slices;
                if (panels == kGemmPanels)
                    pass_rows<P, kGemmPanels>(a, p, begin, end, row, row_end);
                else
                    pass_rows<P, 1>(a, p, begin, end, row, row_end);
            }
            p += panels;
        }
    }
}

template <class P, int... counts>
void quantized_rows(const LinearArgs &a, std::integer_sequence<int, counts...>) {
    const int64_t rows = a.row_end - a.row_begin;
    if (a.xq->single) return few_rows<P, 1, 1>(a, a.xq->row(), 0);
    if (rows > kTileTokens) return many_rows<P>(a);
    using Function = void (*)(const LinearArgs &, const QuantGroup<kTileTokens> *, int64_t);
    static constexpr Function functions[] = {few_rows<P, kTileTokens, counts + 1>...};
    if (rows > 0) functions[rows - 1](a, a.xq->tile(a.row_begin), a.row_begin);
}

template <int pack_bits, int bits, Scales kind>
void quantized(const LinearArgs &a) {
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
