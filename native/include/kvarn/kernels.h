// What every instruction set offers: plain functions over raw pointers, in one table per ISA.
//
// Contract of all of them: a row's result depends on that row alone. The number of tokens in a call, their order, the
// split of panels over calls and the alignment of pointers never change a bit. Across ISAs results agree up to rounding.
//
// To add an ISA (NEON, AMX): write kernels/vec_<isa>.h with the vector type of vec.h, and list it in CMakeLists.txt and
// runtime/isa.cpp. A kernel that wants another shape (AMX tiles) replaces its entry in kernels/table.cpp.
#pragma once
#include <cstdint>

#include "kvarn/formats.h"

namespace kvarn {

// Rows of activations in int8: x[k] ~ scale[k / 32] * q[k]. Symmetric, scale = max|x| / 127 over each group of 32.
struct QuantRows {
    int8_t *q;        // [rows][cols]
    float *scale;     // [rows][groups]
    float *sum;       // [rows][groups]: scale * sum of the group's q
    int32_t *half;    // [rows][2 * groups]: sums of q over 16
    int64_t cols;     // a multiple of 32

    KVARN_INLINE int64_t groups() const { return cols / kGroup; }
};

struct LinearArgs {
    const PackedMatrix *w;
    int64_t panel_begin, panel_end;
    const QuantRows *xq;   // for quantized weights
    const float *xf;       // for float weights, [rows][x_stride]
    int64_t x_stride;
    int64_t row_begin, row_end;  // rows of x and out
    float *out;            // out[(row - out_row) * out_stride + feature - out_feature]
    int64_t out_stride, out_row, out_feature;
    int32_t *scratch;      // linear_scratch_elements(cols) elements
};
constexpr int kTileTokens = 8;  // tokens that share one pass over a panel
KVARN_INLINE constexpr int64_t linear_scratch_elements(int64_t cols) { return kTileTokens * (cols / 16 + 2); }

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

// The KV cache of one layer. A block holds for each head K as sub-blocks of 16 tokens, [dim][16 tokens], then V as
// [token][dim]; elements are fp16 or fp32.
struct KvLayerView {
    uint8_t *data;
    int64_t block_size;     // tokens, a multiple of 16
    int64_t heads, key_dim, value_dim;
    bool half;              // fp16, else fp32

    KVARN_INLINE int64_t element_bytes() const { return half ? 2 : 4; }
    KVARN_INLINE int64_t head_bytes() const { return block_size * (key_dim + value_dim) * element_bytes(); }
    KVARN_INLINE int64_t block_bytes() const { return heads * head_bytes(); }
    KVARN_INLINE uint8_t *head(int64_t block, int64_t h) const { return data + block * block_bytes() + h * head_bytes(); }
};

constexpr int64_t kKeyTile = 64;     // keys that share one softmax maximum; tiles start at multiples of it
constexpr int64_t kSpanTiles = 4;    // tiles merged in order into a span; spans are merged in order into the result
constexpr int64_t kKeySpan = kKeyTile * kSpanTiles;

struct AttentionArgs {
    const KvLayerView *kv;
    const int32_t *block_table;  // of this sequence
    int64_t kv_head;
    int64_t group;               // query heads that share kv_head
    const float *q;              // row r, grouped head j: q + r * q_stride + j * key_dim
    int64_t q_stride;
    int64_t rows;                // query rows, at consecutive positions
    int64_t position;            // of the first row
    int64_t window;              // 0: none
    float scale;
    float softcap;               // 0: none
    int64_t span_begin, span_end;  // key spans to visit (clipped to those that any row sees)
    float *partial;              // null: write `out`; else per span, row and head: value_dim sums, m, l
    float *out;                  // row r, head j: out + r * out_stride + j * value_dim
    int64_t out_stride;
    float *scratch;              // attention_scratch_elements floats, 64-byte aligned
};
constexpr int64_t kQueryTile = 16;  // query rows of one call at most
KVARN_INLINE constexpr int64_t attention_scratch_elements(int64_t group, int64_t key_dim, int64_t value_dim) {
    const int64_t queries = kQueryTile * group;
    const int64_t dim = (value_dim + 15) / 16 * 16;
    return kKeyTile * (key_dim + dim) + queries * (kKeyTile + 3 * dim + 8) + 64;
}
KVARN_INLINE constexpr int64_t attention_partial_elements(int64_t value_dim) { return (value_dim + 15) / 16 * 16 + 2; }

struct Kernels {
    const char *name;
    void (*linear)(const LinearArgs &);
    void (*quantize)(const float *x, int64_t x_stride, int64_t rows, int64_t row_begin, const QuantRows &out);
    void (*quantize_groups)(const float *x, int64_t row, int64_t group_begin, int64_t group_end, const QuantRows &out);
    void (*norm)(const NormArgs &);
    void (*rope)(const RopeArgs &);
    void (*kv_write)(const KvLayerView &kv, int64_t slot, int64_t head, const float *k, const float *v);
    void (*attention)(const AttentionArgs &);
    void (*attention_merge)(const float *partial, int64_t spans, int64_t span_stride, int64_t value_dim, float *scratch,
                            float *out);
    void (*activation)(Function f, const float *x, float *out, int64_t n);
    void (*gated)(Function f, const float *gate, const float *up, float *out, int64_t n);
    void (*add)(const float *a, const float *b, float *out, int64_t n);
    void (*scale_cap)(float scale, float softcap, float *x, int64_t n);  // softcap 0: none
};

// One per compiled ISA; the runtime chooses (runtime/isa.cpp).
namespace scalar { const Kernels &kernels(); }
namespace avx2 { const Kernels &kernels(); }
namespace avx512 { const Kernels &kernels(); }

}  // namespace kvarn
