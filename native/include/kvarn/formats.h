// Packed matrices: the one form in which kernels read weights.
//
// A matrix of R rows (output features) and K columns is cut into panels of 16 rows; rows beyond R are zero. Within a
// panel K runs in one direction, in groups of 32, so a row's sum has one order whatever the number of tokens.
//
// Quantized panel = units, one after the other, so that a kernel reads memory in one direction. A unit is the quants of
// its groups, then their scales, in whole lines of 64 bytes:
//   quants  A quad is 4 consecutive k of 16 rows, byte 4 * row + k % 4; a group has 8. With b bits a quant it is b lines,
//           and each byte of a line holds bits of quants in the same place of their quads, from its lowest bit up:
//             2, 4  line j: quads j, j + b, j + 2b…
//             5, 6  line j < 4: quad j, then the highest 8 - b bits of quad j + 4. Lines from 4 on: what is left of
//                   quads 4…7, pairs of bits for b = 5 and nibbles for b = 6.
//             8     line j: quad j.
//           All quants are unsigned; `zero` is what a signed format subtracts.
//   scales  kSym32      2 groups: d fp16[2][16]                                   w = d * (q - zero)
//           kAffine32   1 group: d fp16[16], m fp16[16]                           w = d * q + m
//           kSuper32    8 groups: d fp16[16], dmin fp16[16], sc u8[8][16], mn u8[8][16]
//                                                                                 w = d * sc * q - dmin * mn
//           kSuperSym16 8 groups: d fp16[16], sc i8[16][16], 32 bytes of nothing; a sub-block is 16 k
//                                                                                 w = d * sc * (q - zero)
//           kSuper16    8 groups: d fp16[16], dmin fp16[16], sc u8[16][16], mn u8[16][16]
// Float panel = elements [k][16 rows] in the stored type.
//
// Nothing of the file's numbers is lost: every field is the file's own, moved.
//
// Packed matrices are kept on disk between runs, whatever instruction set packed them: a change of any of the above needs a
// higher kPackedLayout.
#pragma once
#include <cstddef>
#include <cstdint>

// Kernels are compiled once per ISA: a function in a shared header must never be emitted out of line, or the linker
// might keep a copy with instructions the machine lacks.
#define KVARN_INLINE [[gnu::always_inline]] inline

namespace kvarn {

constexpr int kPackedLayout = 3;

// Same names and numbers as kvarn.tensors.DType's order in bindings/formats.cpp.
enum class Format : uint8_t { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K };
constexpr int kNumFormats = 13;

enum class Scales : uint8_t { kFloat, kSym32, kAffine32, kSuper32, kSuperSym16, kSuper16 };

struct FormatTraits {
    const char *name;
    int block_size;   // elements of a stored block
    int block_bytes;  // bytes of a stored block
    int pack_bits;    // bits of a packed quant; of a packed element for floats
    Scales scales;
    int zero;
};

constexpr FormatTraits kTraits[kNumFormats] = {
    {"F32", 1, 4, 32, Scales::kFloat, 0},         {"F16", 1, 2, 16, Scales::kFloat, 0},
    {"BF16", 1, 2, 16, Scales::kFloat, 0},        {"Q4_0", 32, 18, 4, Scales::kSym32, 8},
    {"Q4_1", 32, 20, 4, Scales::kAffine32, 0},    {"Q5_0", 32, 22, 5, Scales::kSym32, 16},
    {"Q5_1", 32, 24, 5, Scales::kAffine32, 0},    {"Q8_0", 32, 34, 8, Scales::kSym32, 128},
    {"Q2_K", 256, 84, 2, Scales::kSuper16, 0},    {"Q3_K", 256, 110, 4, Scales::kSuperSym16, 4},
    {"Q4_K", 256, 144, 4, Scales::kSuper32, 0},   {"Q5_K", 256, 176, 5, Scales::kSuper32, 0},
    {"Q6_K", 256, 210, 6, Scales::kSuperSym16, 32},
};

KVARN_INLINE constexpr const FormatTraits &traits(Format f) { return kTraits[static_cast<int>(f)]; }

constexpr int kPanelRows = 16;
constexpr int kGroup = 32;
constexpr int kSuperGroups = 8;  // groups of 32 in a super-block of 256
constexpr int kQuads = 8;        // quads in a group

KVARN_INLINE constexpr size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

// Groups of a unit.
KVARN_INLINE constexpr int unit_groups(Scales s) {
    switch (s) {
        case Scales::kSym32: return 2;
        case Scales::kAffine32: return 1;
        default: return kSuperGroups;
    }
}

// Bytes of the scales of one unit, whole lines.
KVARN_INLINE constexpr size_t scale_unit_bytes(Scales s) {
    switch (s) {
        case Scales::kSym32: return 2 * 32;
        case Scales::kAffine32: return 64;
        case Scales::kSuper32: return 64 + 2 * 8 * 16;
        case Scales::kSuperSym16: return 32 + 16 * 16 + 32;
        case Scales::kSuper16: return 64 + 2 * 16 * 16;
        default: return 0;
    }
}

KVARN_INLINE constexpr size_t quant_group_bytes(int pack_bits) { return size_t(kPanelRows) * kGroup * pack_bits / 8; }

// Bits from … from + count - 1 of quants, which lie in the bytes of a line from bit `at` on.
struct QuadBits {
    int line, at, count, from;
};

// Where a quad has its bits: in one place, or in two.
struct QuadPlaces {
    QuadBits lower, upper;  // upper.count is 0 where there is one
};

KVARN_INLINE constexpr QuadPlaces quad_places(int pack_bits, int quad) {
    if (pack_bits <= 4) return {{quad % pack_bits, quad / pack_bits * pack_bits, pack_bits, 0}, {0, 0, 0, 0}};
    if (quad < 4 || pack_bits == 8) return {{quad, 0, pack_bits, 0}, {0, 0, 0, 0}};
    const int j = quad - 4, upper = 8 - pack_bits, lower = pack_bits - upper, in_a_line = 8 / lower;
    return {{4 + j / in_a_line, j % in_a_line * lower, lower, 0}, {j, pack_bits, upper, lower}};
}

KVARN_INLINE constexpr size_t unit_bytes(Format f) {
    return unit_groups(traits(f).scales) * quant_group_bytes(traits(f).pack_bits) + scale_unit_bytes(traits(f).scales);
}

KVARN_INLINE constexpr size_t panel_bytes(Format f, int64_t cols) {
    const FormatTraits &t = traits(f);
    if (t.scales == Scales::kFloat) return round_up(size_t(cols) * kPanelRows * t.pack_bits / 8, 64);
    const size_t groups = unit_groups(t.scales);
    return (size_t(cols) / kGroup + groups - 1) / groups * unit_bytes(f);
}

KVARN_INLINE constexpr int64_t num_panels(int64_t rows) { return (rows + kPanelRows - 1) / kPanelRows; }

// A view of a packed matrix; `data` is 64-byte aligned and followed by at least 64 readable bytes.
struct PackedMatrix {
    Format format;
    int64_t rows;
    int64_t cols;
    const uint8_t *data;

    KVARN_INLINE int64_t panels() const { return num_panels(rows); }
    KVARN_INLINE int64_t groups() const { return cols / kGroup; }
    KVARN_INLINE const uint8_t *panel(int64_t p) const { return data + size_t(p) * panel_bytes(format, cols); }
};

}  // namespace kvarn
