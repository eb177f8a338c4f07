// What every instruction set offers: plain functions over raw pointers, in one table per ISA.
//
// Contract of all of them: a row's result depends on that row alone. The number of tokens in a call, their order, the
// split of panels over calls and the alignment of pointers never change a bit. Across ISAs results agree up to rounding.
//
// To add an ISA (NEON, AMX): docs/dev/adding-an-isa.md. Its vector type is kernels/vec_<isa>.h; a kernel that wants
// another shape (AMX tiles) replaces its entry in kernels/table.cpp.
#pragma once
#include <cstdint>

#include "kvarn/formats.h"

namespace kvarn {

constexpr int kTileTokens = 8;  // rows of activations that lie together

// One group of 32 k of `tile` rows in int8: x[k] ~ scale * q[k]. Symmetric, scale = max|x| / 127.
template <int tile>
struct QuantGroup {
    int8_t q[tile][kGroup];
    float scale[tile];
    float sum[tile];        // scale * sum of q
    int32_t half[2][tile];  // sums of q over each 16
};

// Rows of int8 activations. A single row is QuantGroup<1>[groups]; more rows are QuantGroup<8>[rows / 8][groups], the
// last tile filled up with anything.
struct QuantRows {
    uint8_t *data;
    int64_t cols;  // a multiple of 32
    bool single;   // one row only

    KVARN_INLINE int64_t groups() const { return cols / kGroup; }
    KVARN_INLINE const QuantGroup<1> *row() const { return reinterpret_cast<const QuantGroup<1> *>(data); }
    KVARN_INLINE const QuantGroup<kTileTokens> *tile(int64_t first_row) const {
        return reinterpret_cast<const QuantGroup<kTileTokens> *>(data) + first_row / kTileTokens * groups();
    }
};
KVARN_INLINE constexpr size_t quant_bytes(int64_t rows, int64_t cols) {
    return round_up(size_t(rows), kTileTokens) * size_t(cols / kGroup) * sizeof(QuantGroup<1>);
}

struct QuantizeArgs {
    const float *x;                   // of row_begin and group_begin
    int64_t x_stride;
    int64_t row_begin, row_end;       // rows of out
    int64_t group_begin, group_end;
    QuantRows out;
};

struct LinearArgs {
    const PackedMatrix *w;
    int64_t panel_begin, panel_end;
    const QuantRows *xq;   // for quantized weights
    const float *xf;       // for float weights, [rows][x_stride]
    int64_t x_stride;
    int64_t row_begin, row_end;  // rows of x and out; row_begin is a multiple of kTileTokens
    float *out;            // out[(row - out_row) * out_stride + feature - out_feature]
    int64_t out_stride, out_row, out_feature;
};

// Rows that should pass over the same weights together: their activations stay in L2.
KVARN_INLINE constexpr int64_t linear_row_span(int64_t cols) {
    const int64_t rows = (int64_t(512) << 10) / (cols * 3 / 2) / kTileTokens * kTileTokens;
    return rows < 32 ? 32 : rows > 256 ? 256 : rows;
}

enum class Function : uint8_t { kSilu, kGelu, kGeluTanh, kRelu };

struct NormArgs {
    const float *x;
    float *out;        // may equal x
    int64_t groups;    // spans of `width` elements, one after the other
    int64_t width;
    const float *weight;
    const float *bias; // or null
    float eps;
    bool layer;        // subtract the mean
};

struct RopeArgs {
    const float *x;
    float *out;        // may equal x
    int64_t heads, head_dim;
    int64_t pairs;     // rotary_dim / 2
    const float *cos_sin;  // of this position: cos[pairs], sin[pairs]
    bool interleaved;
};

enum class KvType : uint8_t { kFloat32, kFloat16, kInt8, kInt4 };
constexpr int kNumKvTypes = 4;
constexpr int64_t kSubBlock = 16;  // tokens whose keys lie together

// What goes with 16 tokens in int4, in fp16. Scales and minima of keys [group][2][16 tokens], the first key [dim], scales
// and minima of values [token][group][2].
struct Int4Scales {
    uint16_t *keys, *reference, *values;
};
KVARN_INLINE constexpr int64_t kv_groups(int64_t dim) { return (dim + kGroup - 1) / kGroup; }

// The KV cache of one layer. A block holds for each head K as sub-blocks of 16 tokens, [dim][16 tokens], then V as
// [token][dim]. int8: then a float scale of each token's key, and of each token's value.
//
// int4: dims are filled up with zeros to groups of 32; x = scale * code + minimum, codes from 0 to 15. Keys are rotated
// (kernels/hadamard.h), and what is coded is their difference from the sub-block's reference: its first key. So a token
// is written after the first one of its sub-block (by position: a draft of a tree has the reference of the sub-block that
// it would be in as a known token). Bytes of K are [dim / 2][16 tokens], of dims 2j and 2j + 1 in the low
// and high nibble; of V [token][group][16], of columns i and i + 16 of the group. Then Int4Scales of each sub-block.
struct KvLayerView {
    uint8_t *data;
    int64_t block_size;     // tokens, a multiple of 16
    int64_t heads, key_dim, value_dim;
    KvType type;

    KVARN_INLINE int64_t element_bytes() const { return type == KvType::kFloat32 ? 4 : type == KvType::kFloat16 ? 2 : 1; }
    // Bytes of a vector's elements or codes.
    KVARN_INLINE int64_t vector_bytes(int64_t dim) const {
        return type == KvType::kInt4 ? kv_groups(dim) * kGroup / 2 : dim * element_bytes();
    }
    KVARN_INLINE int64_t vectors_bytes() const { return block_size * (vector_bytes(key_dim) + vector_bytes(value_dim)); }
    KVARN_INLINE int64_t scales_bytes() const {
        if (type == KvType::kInt8) return 2 * block_size * 4;
        if (type == KvType::kInt4) return block_size * 4 * (2 * kv_groups(key_dim) + kv_groups(value_dim));
        return 0;
    }
    KVARN_INLINE Int4Scales int4_scales(uint8_t *head, int64_t offset) const {
        const int64_t keys = kv_groups(key_dim) * 2 * kSubBlock, reference = kv_groups(key_dim) * kGroup;
        const int64_t each = keys + reference + kv_groups(value_dim) * 2 * kSubBlock;
        uint16_t *at = reinterpret_cast<uint16_t *>(head + vectors_bytes()) + offset / kSubBlock * each;
        return {at, at + keys, at + keys + reference};
    }
    KVARN_INLINE int64_t head_bytes() const { return vectors_bytes() + scales_bytes(); }
    KVARN_INLINE int64_t block_bytes() const { return heads * head_bytes(); }
    KVARN_INLINE uint8_t *head(int64_t block, int64_t h) const { return data + block * block_bytes() + h * head_bytes(); }
};

constexpr int64_t kKeyTile = 64;     // keys that share one softmax maximum; tiles start at multiples of it
constexpr int64_t kSpanTiles = 4;    // tiles merged in order into a span; spans are merged in order into the result
constexpr int64_t kKeySpan = kKeyTile * kSpanTiles;

// Rows of a tree of draft tokens, of one sequence. Keys at positions from `begin` on are a row's own: its ancestors',
// which are where `slots` says. Arrays are a step's, by its rows.
struct TreeRows {
    const int32_t *parents;    // row of a draft's parent
    const int32_t *positions;
    const int64_t *slots;      // of the layer's KV group, `stride` apart
    int64_t stride;
    int64_t row;               // the step's row of a call's first one
    int64_t begin;

    int64_t slot(int64_t r) const { return slots[r * stride]; }
};

// Keys and values that the thread will read after a call: those at positions first … last of one head of a sequence.
struct KeysAfter {
    const int32_t *block_table;
    int64_t kv_head;
    int64_t first;  // of the first sub-block that is seen
    int64_t last;
};

struct AttentionArgs {
    const KvLayerView *kv;
    const int32_t *block_table;  // of this sequence; read from the block of the first key that a row sees on
    int64_t kv_head;
    int64_t group;               // query heads that share kv_head
    const float *q;              // row r, grouped head j: q + r * q_stride + j * key_dim
    int64_t q_stride;
    int64_t rows;                // query rows, at consecutive positions where they are no tree's
    const TreeRows *tree;        // null: none. Else all spans are visited and `out` is written
    int64_t position;            // of the first row
    int64_t window;              // 0: none
    float scale;
    float softcap;               // 0: none
    int64_t span_begin, span_end;  // key spans to visit (clipped to those that any row sees)
    float *partial;              // null: write `out`; else per span, row and head: value_dim sums, m, l
    float *out;                  // row r, head j: out + r * out_stride + j * value_dim
    int64_t out_stride;
    float *scratch;              // attention_scratch_elements floats, 64-byte aligned
    const KeysAfter *after;      // null: not known. Else the first tile of them is asked for beside the call's last one
};
constexpr int64_t kQueryTile = 32;  // query rows of one call at most
// For one row of a tree: its sums, and a tile of keys and values gathered along its path (with room to read past it).
KVARN_INLINE int64_t tree_scratch_elements(int64_t group, int64_t key_dim, int64_t value_dim, KvType type) {
    const int64_t queries = (group + 15) / 16 * 16, dim = (value_dim + 15) / 16 * 16;
    const KvLayerView tile{nullptr, kSubBlock, 1, key_dim, value_dim, type};
    return queries * (kKeyTile + 2 * dim + 8) + kKeyTile / kSubBlock * tile.block_bytes() / 4 + 32;
}
KVARN_INLINE int64_t attention_scratch_elements(int64_t group, int64_t key_dim, int64_t value_dim, KvType type) {
    const int64_t queries = kQueryTile * group;  // a multiple of 16
    const int64_t dim = (value_dim + 15) / 16 * 16;
    const bool rotated = type == KvType::kInt4;  // whose queries and scales are kept
    const int64_t key = rotated ? kv_groups(key_dim) * kGroup : key_dim;
    const int64_t extra = rotated ? queries * key + kKeyTile * (key / kSubBlock + 2 * kv_groups(value_dim)) : 0;
    return kKeyTile * (key + dim) + queries * (kKeyTile + 2 * dim + 8) + 128 + extra +
           tree_scratch_elements(group, key_dim, value_dim, type);
}
KVARN_INLINE constexpr int64_t attention_partial_elements(int64_t value_dim) { return (value_dim + 15) / 16 * 16 + 2; }

struct Kernels {
    const char *name;
    void (*linear)(const LinearArgs &);
    void (*quantize)(const QuantizeArgs &);
    void (*norm)(const NormArgs &);
    void (*rope)(const RopeArgs &);
    // place: the slot of the token's position, which a draft of a tree is not in.
    void (*kv_write)(const KvLayerView &kv, int64_t slot, int64_t place, int64_t head, const float *k, const float *v);
    void (*attention)(const AttentionArgs &);
    void (*attention_merge)(const float *partial, int64_t spans, int64_t span_stride, int64_t value_dim, float *scratch,
                            float *out);
    void (*activation)(Function f, const float *x, float *out, int64_t n);
    void (*gated)(Function f, const float *gate, const float *up, float *out, int64_t n);
    void (*add)(const float *a, const float *b, float *out, int64_t n);
    void (*scale_cap)(float scale, float softcap, float *x, int64_t n);  // softcap 0: none

    // The machine's limits, for measuring. read_sum: of little-endian 32-bit words modulo 2^32, each byte read once, in
    // order; bytes is a multiple of 256. The peaks return how many multiply-adds they did (of an unsigned and a signed
    // byte with integer_peak, of float32 with float_peak); `result` is there so that the work is done.
    uint32_t (*read_sum)(const uint8_t *data, int64_t bytes);
    int64_t (*integer_peak)(int64_t iterations, int32_t *result);
    int64_t (*float_peak)(int64_t iterations, float *result);
};

// One per compiled ISA; the runtime chooses (runtime/isa.cpp).
namespace scalar { const Kernels &kernels(); }
namespace avx2 { const Kernels &kernels(); }
namespace avx512 { const Kernels &kernels(); }

}  // namespace kvarn
