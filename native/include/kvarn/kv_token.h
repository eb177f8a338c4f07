// One token's key and value of one head, copied as they are stored. For kernels of any instruction set and the runtime.
#pragma once
#include <cstring>

#include "kvarn/kernels.h"

namespace kvarn {

// Where a token's parts are: a key's element or row of codes every kSubBlock elements from `key` on; int8: a scale each;
// int4: halves every kSubBlock from `scales.keys` on, and those of its value together.
struct KvToken {
    uint8_t *key, *value;
    float *key_scale, *value_scale;
    Int4Scales scales;  // without a reference: that belongs to the place of the token's position

    KVARN_INLINE KvToken(const KvLayerView &kv, int64_t slot, int64_t head) {
        const int64_t offset = slot % kv.block_size, token = offset % kSubBlock;
        const int64_t element = kv.type == KvType::kInt4 ? 1 : kv.element_bytes();
        uint8_t *base = kv.head(slot / kv.block_size, head);
        key = base + (offset - token) * kv.vector_bytes(kv.key_dim) + token * element;
        value = base + kv.block_size * kv.vector_bytes(kv.key_dim) + offset * kv.vector_bytes(kv.value_dim);
        key_scale = reinterpret_cast<float *>(base + kv.vectors_bytes()) + offset;
        value_scale = key_scale + kv.block_size;
        scales = kv.int4_scales(base, offset);
        scales.keys += token;
        scales.values += token * 2 * kv_groups(kv.value_dim);
    }
};

template <class Element>
KVARN_INLINE void copy_column(const void *from, void *to, int64_t count) {
    const auto *source = static_cast<const Element *>(from);
    auto *target = static_cast<Element *>(to);
    for (int64_t i = 0; i < count * kSubBlock; i += kSubBlock) target[i] = source[i];
}

// `from` and `to` are layers of one shape and type, but for the size of their blocks and the number of their heads. Of
// int4 the copy means the same if the references of both tokens' sub-blocks are the same.
KVARN_INLINE void copy_token(const KvLayerView &from, int64_t from_slot, int64_t from_head, const KvLayerView &to,
                             int64_t to_slot, int64_t to_head) {
    const KvToken a(from, from_slot, from_head), b(to, to_slot, to_head);
    std::memcpy(b.value, a.value, size_t(from.vector_bytes(from.value_dim)));
    switch (from.type) {
        case KvType::kFloat32: return copy_column<uint32_t>(a.key, b.key, from.key_dim);
        case KvType::kFloat16: return copy_column<uint16_t>(a.key, b.key, from.key_dim);
        case KvType::kInt8:
            *b.key_scale = *a.key_scale;
            *b.value_scale = *a.value_scale;
            return copy_column<uint8_t>(a.key, b.key, from.key_dim);
        case KvType::kInt4: {
            const int64_t groups = kv_groups(from.value_dim);
            copy_column<uint16_t>(a.scales.keys, b.scales.keys, 2 * kv_groups(from.key_dim));
            std::memcpy(b.scales.values, a.scales.values, size_t(groups) * 2 * sizeof(uint16_t));
            return copy_column<uint8_t>(a.key, b.key, kv_groups(from.key_dim) * kGroup / 2);
        }
    }
}

// All 16 tokens of the sub-blocks that begin at two slots, an int4 reference included.
KVARN_INLINE void copy_sub_block(const KvLayerView &from, int64_t from_slot, int64_t from_head, const KvLayerView &to,
                                 int64_t to_slot, int64_t to_head) {
    const KvToken a(from, from_slot, from_head), b(to, to_slot, to_head);
    std::memcpy(b.key, a.key, size_t(kSubBlock * from.vector_bytes(from.key_dim)));
    std::memcpy(b.value, a.value, size_t(kSubBlock * from.vector_bytes(from.value_dim)));
    if (from.type == KvType::kInt8) {
        std::memcpy(b.key_scale, a.key_scale, kSubBlock * sizeof(float));
        std::memcpy(b.value_scale, a.value_scale, kSubBlock * sizeof(float));
    }
    if (from.type == KvType::kInt4)
        std::memcpy(b.scales.keys, a.scales.keys, size_t(from.scales_bytes() / from.block_size * kSubBlock));
}

}  // namespace kvarn
