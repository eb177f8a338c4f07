#include "runtime/pack.h"

#include <cstring>
#include <initializer_list>

#include "kvarn/half.h"

namespace kvarn {
namespace {

// The layouts of stored blocks are those of the GGUF specification (ggml's block_q* structures).

void low_then_high(const uint8_t *nibbles, uint8_t *q) {  // 16 bytes: elements 0…15 low, 16…31 high
    for (int i = 0; i < 16; ++i) {
        q[i] = nibbles[i] & 15;
        q[i + 16] = nibbles[i] >> 4;
    }
}

void add_fifth_bits(const uint8_t *bits, uint8_t *q) {
    uint32_t high;
    std::memcpy(&high, bits, 4);
    for (int i = 0; i < 32; ++i) q[i] |= uint8_t((high >> i & 1) << 4);
}

// 32 quants, unsigned, of group g of a stored row.
void read_group(Format f, const uint8_t *row, int64_t g, uint8_t *q) {
    const FormatTraits &t = traits(f);
    if (t.block_size == 32) {
        const uint8_t *b = row + g * t.block_bytes;
        switch (f) {
            case Format::Q4_0: return low_then_high(b + 2, q);
            case Format::Q4_1: return low_then_high(b + 4, q);
            case Format::Q5_0: low_then_high(b + 6, q); return add_fifth_bits(b + 2, q);
            case Format::Q5_1: low_then_high(b + 8, q); return add_fifth_bits(b + 4, q);
            default:  // Q8_0
                for (int i = 0; i < 32; ++i) q[i] = b[2 + i] ^ 0x80;
                return;
        }
    }
    const uint8_t *b = row + g / kSuperGroups * t.block_bytes;
    const int i = int(g % kSuperGroups), pair = i / 2, odd = i % 2, half = i / 4, shift = 2 * (i % 4);
    switch (f) {
        case Format::Q4_K:
            for (int k = 0; k < 32; ++k) q[k] = b[16 + 32 * pair + k] >> 4 * odd & 15;
            return;
        case Format::Q5_K:
            for (int k = 0; k < 32; ++k) q[k] = uint8_t((b[48 + 32 * pair + k] >> 4 * odd & 15) | (b[16 + k] >> i & 1) << 4);
            return;
        case Format::Q2_K:
            for (int k = 0; k < 32; ++k) q[k] = b[16 + 32 * half + k] >> shift & 3;
            return;
        case Format::Q3_K:
            for (int k = 0; k < 32; ++k) q[k] = uint8_t((b[32 + 32 * half + k] >> shift & 3) | (b[k] >> i & 1) << 2);
            return;
        default: {  // Q6_K: 128 elements are 64 bytes of nibbles and 32 bytes of upper pairs
            const int quarter = i % 4;
            const uint8_t *low = b + 64 * half + 32 * (quarter % 2), *high = b + 128 + 32 * half;
            for (int k = 0; k < 32; ++k)
                q[k] = uint8_t((low[k] >> 4 * (quarter / 2) & 15) | (high[k] >> 2 * quarter & 3) << 4);
        }
    }
}

// Writes 32 quants of one row into their places of a packed group: each quad is 4 adjacent bytes of a line.
template <int bits>
void place_group(const uint8_t *q, int lane, uint8_t *group) {
    uint32_t lines[bits] = {};
#pragma GCC unroll 8
    for (int i = 0; i < kQuads; ++i) {
        uint32_t quad;
        std::memcpy(&quad, q + 4 * i, 4);
        const QuadPlaces places = quad_places(bits, i);
        for (const QuadBits &p : {places.lower, places.upper})
            lines[p.line] |= (quad >> p.from & 0x01010101u * ((1u << p.count) - 1)) << p.at;
    }
    for (int j = 0; j < bits; ++j) std::memcpy(group + 64 * j + 4 * lane, &lines[j], 4);
}

// The other way.
template <int bits>
void take_group(const uint8_t *group, int lane, uint8_t *q) {
    uint32_t lines[bits];
    for (int j = 0; j < bits; ++j) std::memcpy(&lines[j], group + 64 * j + 4 * lane, 4);
#pragma GCC unroll 8
    for (int i = 0; i < kQuads; ++i) {
        uint32_t quad = 0;
        const QuadPlaces places = quad_places(bits, i);
        for (const QuadBits &p : {places.lower, places.upper})
            quad |= (lines[p.line] >> p.at & 0x01010101u * ((1u << p.count) - 1)) << p.from;
        std::memcpy(q + 4 * i, &quad, 4);
    }
}

struct Groups {
    void (*place)(const uint8_t *q, int lane, uint8_t *group);
    void (*take)(const uint8_t *group, int lane, uint8_t *q);
};

Groups groups_of(int pack_bits) {
    switch (pack_bits) {
        case 2: return {place_group<2>, take_group<2>};
        case 4: return {place_group<4>, take_group<4>};
        case 5: return {place_group<5>, take_group<5>};
        case 6: return {place_group<6>, take_group<6>};
        default: return {place_group<8>, take_group<8>};
    }
}

// The 6-bit scales and minimums of Q4_K and Q5_K, 8 of each in 12 bytes.
void six_bit_scales(const uint8_t *s, uint8_t *sc, uint8_t *mn) {
    for (int i = 0; i < 4; ++i) {
        sc[i] = s[i] & 63;
        mn[i] = s[i + 4] & 63;
        sc[i + 4] = uint8_t((s[i + 8] & 15) | s[i] >> 6 << 4);
        mn[i + 4] = uint8_t(s[i + 8] >> 4 | s[i + 4] >> 6 << 4);
    }
}

// The 6-bit scales of Q3_K, 16 in 12 bytes, offset by 32.
void q3_scales(const uint8_t *s, int8_t *sc) {
    for (int i = 0; i < 16; ++i) {
        const int low = i < 8 ? s[i] & 15 : s[i - 8] >> 4;
        const int high = s[8 + i % 4] >> 2 * (i / 4) & 3;
        sc[i] = int8_t((low | high << 4) - 32);
    }
}

void copy_half(const uint8_t *from, int lane, uint8_t *to) { std::memcpy(to + 2 * lane, from, 2); }

// Where group g of a panel has its quants, and its unit its scales.
template <class Byte>
Byte *quants_of(Format f, Byte *panel, int64_t g) {
    const int groups = unit_groups(traits(f).scales);
    return panel + size_t(g / groups) * unit_bytes(f) + size_t(g % groups) * quant_group_bytes(traits(f).pack_bits);
}
template <class Byte>
Byte *scales_of(Format f, Byte *panel, int64_t g) {
    const int groups = unit_groups(traits(f).scales);
    return panel + size_t(g / groups) * unit_bytes(f) + size_t(groups) * quant_group_bytes(traits(f).pack_bits);
}

// Scales of a stored row into their lanes of a panel's units.
void place_scales(Format f, const uint8_t *row, int64_t cols, int lane, uint8_t *panel) {
    const FormatTraits &t = traits(f);
    for (int64_t b = 0; b < cols / t.block_size; ++b, row += t.block_bytes) {
        uint8_t *scales = scales_of(f, panel, b * t.block_size / kGroup);
        uint8_t sc[16], mn[16];
        switch (t.scales) {
            case Scales::kSym32: copy_half(row, lane, scales + b % 2 * 32); break;
            case Scales::kAffine32:
                copy_half(row, lane, scales);
                copy_half(row + 2, lane, scales + 32);
                break;
            case Scales::kSuper32:
                copy_half(row, lane, scales);
                copy_half(row + 2, lane, scales + 32);
                six_bit_scales(row + 4, sc, mn);
                for (int i = 0; i < 8; ++i) {
                    scales[64 + 16 * i + lane] = sc[i];
                    scales[64 + 128 + 16 * i + lane] = mn[i];
                }
                break;
            case Scales::kSuper16:  // Q2_K: scale low nibble, minimum high
                copy_half(row + 80, lane, scales);
                copy_half(row + 82, lane, scales + 32);
                for (int i = 0; i < 16; ++i) {
                    scales[64 + 16 * i + lane] = row[i] & 15;
                    scales[64 + 256 + 16 * i + lane] = row[i] >> 4;
                }
                break;
            default: {
                int8_t signed_sc[16];
                if (f == Format::Q3_K)
                    q3_scales(row + 96, signed_sc);
                else
                    std::memcpy(signed_sc, row + 192, 16);
                copy_half(row + (f == Format::Q3_K ? 108 : 208), lane, scales);
                for (int i = 0; i < 16; ++i) scales[32 + 16 * i + lane] = uint8_t(signed_sc[i]);
            }
        }
    }
}

template <class Element>
void pack_float_row(const uint8_t *row, int64_t cols, int lane, uint8_t *panel) {
    for (int64_t k = 0; k < cols; ++k)
        std::memcpy(panel + (k * kPanelRows + lane) * sizeof(Element), row + k * sizeof(Element), sizeof(Element));
}

void pack_quantized_row(Format f, const uint8_t *row, int64_t cols, int lane, uint8_t *panel) {
    const Groups groups = groups_of(traits(f).pack_bits);
    for (int64_t g = 0; g < cols / kGroup; ++g) {
        uint8_t q[kGroup];
        read_group(f, row, g, q);
        groups.place(q, lane, quants_of(f, panel, g));
    }
    place_scales(f, row, cols, lane, panel);
}

float half_at(const uint8_t *p, int lane) {
    uint16_t h;
    std::memcpy(&h, p + 2 * lane, 2);
    return half_to_float(h);
}

// scale and minimum of half of group i of the unit with scales s, such that w = scale * (q - zero) + minimum.
void scales_at(Scales kind, const uint8_t *s, int i, int half, int lane, float &scale, float &minimum) {
    minimum = 0.0f;
    if (kind == Scales::kSym32 || kind == Scales::kAffine32) {
        scale = half_at(s + (kind == Scales::kSym32 ? 32 * i : 0), lane);
        if (kind == Scales::kAffine32) minimum = half_at(s + 32, lane);
        return;
    }
    scale = half_at(s, lane);
    if (kind == Scales::kSuperSym16) {
        scale *= float(int8_t(s[32 + 16 * (2 * i + half) + lane]));
        return;
    }
    const int sub = kind == Scales::kSuper32 ? i : 2 * i + half;
    const int count = kind == Scales::kSuper32 ? 8 : 16;
    scale *= float(s[64 + 16 * sub + lane]);
    minimum = -(half_at(s + 32, lane) * float(s[64 + 16 * (count + sub) + lane]));
}

}  // namespace

void pack_panels(Format f, int64_t rows, int64_t cols, const uint8_t *source, uint8_t *packed, int64_t panel_begin,
                 int64_t panel_end) {
    const size_t row_bytes = stored_row_bytes(f, cols), bytes = panel_bytes(f, cols);
    for (int64_t p = panel_begin; p < panel_end; ++p) {
        uint8_t *panel = packed + size_t(p) * bytes;
        for (int lane = 0; lane < kPanelRows && p * kPanelRows + lane < rows; ++lane) {
            const uint8_t *row = source + size_t(p * kPanelRows + lane) * row_bytes;
            if (f == Format::F32)
                pack_float_row<uint32_t>(row, cols, lane, panel);
            else if (traits(f).scales == Scales::kFloat)
                pack_float_row<uint16_t>(row, cols, lane, panel);
            else
                pack_quantized_row(f, row, cols, lane, panel);
        }
    }
}

void unpack_row(const PackedMatrix &w, int64_t row, float *out) {
    const FormatTraits &t = traits(w.format);
    const uint8_t *panel = w.panel(row / kPanelRows);
    const int lane = int(row % kPanelRows);
    if (t.scales == Scales::kFloat) {
        for (int64_t k = 0; k < w.cols; ++k) {
            const uint8_t *p = panel + (k * kPanelRows + lane) * (t.pack_bits / 8);
            uint32_t bits = 0;
            std::memcpy(&bits, p, size_t(t.pack_bits / 8));
            if (w.format == Format::BF16) bits <<= 16;
            if (w.format == Format::F16)
                out[k] = half_to_float(uint16_t(bits));
            else
                std::memcpy(out + k, &bits, 4);
        }
        return;
    }
    const bool affine = t.scales != Scales::kSym32 && t.scales != Scales::kSuperSym16;
    const Groups groups = groups_of(t.pack_bits);
    for (int64_t g = 0; g < w.groups(); ++g) {
        const uint8_t *scales = scales_of(w.format, panel, g);
        uint8_t q[kGroup];
        groups.take(quants_of(w.format, panel, g), lane, q);
        for (int half = 0; half < 2; ++half) {
            float scale, minimum;
            scales_at(t.scales, scales, int(g % unit_groups(t.scales)), half, lane, scale, minimum);
            for (int k = 16 * half; k < 16 * half + 16; ++k)
                out[g * kGroup + k] = scale * float(q[k] - t.zero);
            if (affine)
                for (int k = 16 * half; k < 16 * half + 16; ++k) out[g * kGroup + k] += minimum;
        }
    }
}

}  // namespace kvarn
