// What attention works on: the views of a call, and tiles of 64 keys and values as the cache has them or in float32.
#pragma once
#include "hadamard.h"
#include "kernels_internal.h"
#include "kvarn/kv_token.h"
#include "vec.h"

KVARN_KERNELS_BEGIN
namespace {

constexpr float kNoScore = -INFINITY;
constexpr int kSub = int(kSubBlock);         // keys of a sub-block
constexpr int kSubs = int(kKeyTile) / kSub;  // sub-blocks of a tile

template <KvType type>
constexpr int64_t kElementBytes = type == KvType::kFloat32 ? 4 : type == KvType::kFloat16 ? 2 : 1;
template <KvType type>
KVARN_INLINE F load_elements(const uint8_t *p, int64_t index) {
    if constexpr (type == KvType::kFloat16) return load_f16(reinterpret_cast<const uint16_t *>(p) + index);
    if constexpr (type == KvType::kInt8) return load_i8(p + index);
    return load(reinterpret_cast<const float *>(p) + index);
}

// Sums of weights l under maximum m, and weighted values o, of all queries. Factors of the last merge: old, now.
struct State {
    float *m, *l, *o;  // [queries], [queries], [queries][dim]
    int64_t dim;

    void reset(int64_t queries) const {
        for (int64_t i = 0; i < queries; ++i) m[i] = kNoScore;
        std::memset(l, 0, size_t(queries) * sizeof(float));
        std::memset(o, 0, size_t(queries * dim) * sizeof(float));
    }
    // The first `count` queries become those of `from` from query `first` on.
    void copy(const State &from, int64_t first, int64_t count) const {
        reset((count + 15) / 16 * 16);
        std::memcpy(m, from.m + first, size_t(count) * sizeof(float));
        std::memcpy(l, from.l + first, size_t(count) * sizeof(float));
        std::memcpy(o, from.o + first * dim, size_t(count * dim) * sizeof(float));
    }
};

// The views of one call: scratch cut into its parts.
struct Work {
    const AttentionArgs &a;
    int64_t queries;
    int64_t key_dim;      // as keys are stored: int4 fills groups up
    int64_t dim;          // value_dim rounded up to 16
    float *keys;          // [kSubs][key_dim][16]
    float *values;        // [kKeyTile][dim]
    float *weights;       // [queries][kKeyTile]: scores, then exponentials
    float *tile_m, *tile_l, *old_factor, *now_factor;
    State span, total;
    // Of int4: rotated queries [queries][key_dim], a tile's references [kSubs][key_dim], scales and minima of its values
    // [kKeyTile][groups][2]. Else null.
    float *rotated, *references, *value_scales;
    float *rest;  // of scratch: what one row of a tree needs beside

    explicit Work(const AttentionArgs &args) : a(args), rest(args.scratch) {
        const bool int4 = a.kv->type == KvType::kInt4;
        queries = a.rows * a.group;
        key_dim = int4 ? kv_groups(a.kv->key_dim) * kGroup : a.kv->key_dim;
        dim = (a.kv->value_dim + 15) / 16 * 16;
        keys = take(kKeyTile * key_dim);
        values = take(kKeyTile * dim);
        take_states();
        rotated = references = value_scales = nullptr;
        if (!int4) return;
        rotated = take(padded() * key_dim);
        references = take(kSubs * key_dim);
        value_scales = take(kKeyTile * 2 * kv_groups(a.kv->value_dim));
        rotate_queries();
    }

    // One row of `all`, with its sums so far. args: that row's. Shares the scratch in which tiles are converted.
    Work(const AttentionArgs &args, const Work &all, int64_t row)
        : a(args), queries(a.group), key_dim(all.key_dim), dim(all.dim), keys(all.keys), values(all.values),
          rotated(all.rotated ? all.rotated + row * a.group * key_dim : nullptr), references(all.references),
          value_scales(all.value_scales), rest(all.rest) {
        take_states();
        span.copy(all.span, row * queries, queries);
        total.copy(all.total, row * queries, queries);
    }

    int64_t padded() const { return (queries + 15) / 16 * 16; }
    int64_t position(int64_t query) const {
        return a.tree ? a.tree->positions[a.tree->row + query / a.group] : a.position + query / a.group;
    }
    int64_t first_key(int64_t position) const {
        return a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
    }
    const float *q(int64_t query) const { return rotated ? rotated + query * key_dim : given(query); }

private:
    float *take(int64_t n) { return (rest += n) - n; }
    State take_state() {
        float *m = take(padded()), *l = take(padded());
        return {m, l, take(padded() * dim), dim};
    }
    void take_states() {
        weights = take(padded() * kKeyTile);
        tile_m = take(padded());
        tile_l = take(padded());
        old_factor = take(padded());
        now_factor = take(padded());
        span = take_state();
        total = take_state();
        for (int64_t i = queries; i < padded(); ++i) tile_m[i] = kNoScore, tile_l[i] = 0.0f;
    }
    const float *given(int64_t query) const {
        return a.q + query / a.group * a.q_stride + query % a.group * a.kv->key_dim;
    }
    void rotate_queries() const {
        for (int64_t query = 0; query < queries; ++query) {
            float *to = rotated + query * key_dim;
            for (int64_t i = 0; i < key_dim; ++i) to[i] = i < a.kv->key_dim ? given(query)[i] : 0.0f;
            for (int64_t i = 0; i < key_dim; i += rotated_part(key_dim - i))
                rotate_part(to + i, rotated_part(key_dim - i), true);
        }
    }
};

// A tile's sub-blocks: keys [key_dim][16], values [16][value_stride]. Those that no row sees, beyond the sequence or before
// the first row's window, repeat the first one that is seen: their scores are masked, their values not read, and the block
// table may have anything there.
struct Tile {
    const uint8_t *keys[kSubs], *values[kSubs];
    int64_t value_stride;
    int64_t first;  // position of the first sub-block that is seen
    int64_t count;  // tokens that the sequence has
    // Where the tile after this one is, to ask for it in time: its blocks lie anywhere. After the call's last tile that is
    // what the thread reads after the call, or, not known, the tile itself.
    const uint8_t *next_keys[kSubs], *next_values[kSubs];
    const float *key_scales[kSubs], *value_scales[kSubs];  // of int8 elements; else null
    Int4Scales scales[kSubs], next_scales[kSubs];          // of int4
};

// A token of a head: where its block is, and its place in it.
struct Place {
    uint8_t *head;
    int64_t offset;
};

Place place_of(const KvLayerView &kv, const int32_t *block_table, int64_t kv_head, int64_t position) {
    return {kv.head(block_table[position / kv.block_size], kv_head), position % kv.block_size};
}

// Sub-block s of the tile after the one at `start`. first, last: seen of the tile at `start`, and of the call.
Place place_after(const AttentionArgs &a, int64_t start, int64_t s, int64_t first, int64_t last) {
    const int64_t end = last < a.span_end * kKeySpan ? last : a.span_end * kKeySpan - 1;
    if (start + kKeyTile > end && a.after) {
        const KeysAfter &after = *a.after;
        const int64_t position = after.first / kKeyTile * kKeyTile + s * kSub;
        const bool is_seen = position >= after.first && position <= after.last;
        return place_of(*a.kv, after.block_table, after.kv_head, is_seen ? position : after.first);
    }
    const int64_t position = start + kKeyTile + s * kSub;
    return place_of(*a.kv, a.block_table, a.kv_head, position <= end ? position : first);
}

// Keys and values from position `start` on, as far as `last`. first_key: the first one that any of the rows sees.
Tile cached_tile(const Work &w, int64_t start, int64_t first_key, int64_t last) {
    const KvLayerView &kv = *w.a.kv;
    const int64_t key_bytes = kv.vector_bytes(kv.key_dim), value_bytes = kv.vector_bytes(kv.value_dim);
    const int64_t values_at = kv.block_size * key_bytes, scales_at = values_at + kv.block_size * value_bytes;
    const auto locate = [&](const Place &at, const uint8_t *&keys, const uint8_t *&values) {
        keys = at.head + at.offset * key_bytes;
        values = at.head + values_at + at.offset * value_bytes;
    };
    Tile tile;
    const int64_t seen = first_key / kSub * kSub;
    tile.value_stride = kv.value_dim;
    tile.first = seen > start ? seen : start;
    tile.count = last + 1 - start < kKeyTile ? last + 1 - start : kKeyTile;
    for (int64_t s = 0; s < kSubs; ++s) {
        const int64_t position = start + s * kSub;
        const bool is_seen = position >= tile.first && position <= last;
        const Place at = place_of(kv, w.a.block_table, w.a.kv_head, is_seen ? position : tile.first);
        const Place next = place_after(w.a, start, s, tile.first, last);
        locate(at, tile.keys[s], tile.values[s]);
        locate(next, tile.next_keys[s], tile.next_values[s]);
        const float *scales = reinterpret_cast<const float *>(at.head + scales_at) + at.offset;
        tile.key_scales[s] = kv.type == KvType::kInt8 ? scales : nullptr;
        tile.value_scales[s] = kv.type == KvType::kInt8 ? scales + kv.block_size : nullptr;
        if (kv.type != KvType::kInt4) continue;
        tile.scales[s] = kv.int4_scales(at.head, at.offset);
        tile.next_scales[s] = kv.int4_scales(next.head, next.offset);
    }
    return tile;
}

// The same for one row of a tree (`row` of the step), whose keys from tree.begin on are where its ancestors were written:
// gathered in `scratch`, sub-blocks whole, since what the tree begins in has known tokens and an int4 reference.
Tile tile_of_path(const Work &w, const TreeRows &tree, int64_t row, int64_t start, float *scratch) {
    const KvLayerView &kv = *w.a.kv;
    const KvLayerView own{reinterpret_cast<uint8_t *>(scratch), kSub, 1, kv.key_dim, kv.value_dim, kv.type};
    const int64_t last = w.a.position;
    Tile tile = cached_tile(w, start, w.first_key(last), last);
    const int64_t begin = tree.begin > start ? tree.begin : start;
    for (int64_t s = (begin - start) / kSub; s < kSubs && start + s * kSub <= last; ++s) {
        const int64_t position = start + s * kSub, block = w.a.block_table[position / kv.block_size];
        copy_sub_block(kv, block * kv.block_size + position % kv.block_size, w.a.kv_head, own, s * kSub, 0);
        const KvToken at(own, s * kSub, 0);
        tile.keys[s] = at.key;
        tile.values[s] = at.value;
        if (kv.type == KvType::kInt8) tile.key_scales[s] = at.key_scale, tile.value_scales[s] = at.value_scale;
        if (kv.type == KvType::kInt4) tile.scales[s] = at.scales;
    }
    for (int64_t position; (position = tree.positions[row]) >= begin; row = tree.parents[row])
        if (position < start + kKeyTile) copy_token(kv, tree.slot(row), w.a.kv_head, own, position - start, 0);
    return tile;
}

// What the elements of an int4 tile need of scales and references, in float32. Asks for those of the next one.
void prepare_int4(const Work &w, const Tile &tile) {
    const KvLayerView &kv = *w.a.kv;
    const int64_t value_scales = kv_groups(kv.value_dim) * 2 * kSub;
    for (int64_t s = 0; s < kSubs; ++s) {
        const Int4Scales &next = tile.next_scales[s];
        for (int64_t i = 0; i < w.key_dim; i += kGroup) {
            prefetch(next.keys + i);
            prefetch(next.reference + i);
        }
        for (int64_t i = 0; i < value_scales; i += kGroup) prefetch(next.values + i);
        for (int64_t i = 0; i < w.key_dim; i += kLanes)
            store(w.references + s * w.key_dim + i, load_f16(tile.scales[s].reference + i));
        for (int64_t i = 0; i < value_scales && s * kSub < tile.count; i += kLanes)
            store(w.value_scales + s * value_scales + i, load_f16(tile.scales[s].values + i));
    }
}

KVARN_INLINE F int4_key(F codes, F scale, F least, float reference) {
    return fma(codes, scale, add(least, set(reference)));
}

// Calls body(d, keys) for each dimension of a sub-block, in order.
template <class Body>
KVARN_INLINE void int4_keys(const Work &w, const Tile &tile, int64_t s, Body body) {
    const float *reference = w.references + s * w.key_dim;
    for (int64_t d = 0; d < w.key_dim; d += 2) {
        const uint16_t *group = tile.scales[s].keys + d / kGroup * 2 * kSub;
        const F scale = load_f16(group), least = load_f16(group + kSub);
        const uint8_t *row = tile.keys[s] + d / 2 * kSub;
        body(d, int4_key(load_low_u4(row), scale, least, reference[d]));
        body(d + 1, int4_key(load_high_u4(row), scale, least, reference[d + 1]));
    }
}

// 16 columns of an int4 value: the first or the second half of a group.
KVARN_INLINE F int4_value(const uint8_t *codes, const float *scale, bool high) {
    return fma(high ? load_high_u4(codes) : load_low_u4(codes), set(scale[0]), set(scale[1]));
}

// An int4 tile in float32, converted into scratch.
Tile converted_int4(const Work &w, const Tile &from) {
    const int64_t groups = kv_groups(w.a.kv->value_dim);
    Tile tile = from;
    tile.value_stride = w.dim;
    for (int64_t s = 0; s < kSubs; ++s) {
        float *keys = w.keys + s * w.key_dim * kSub, *values = w.values + s * kSub * w.dim;
        tile.keys[s] = reinterpret_cast<const uint8_t *>(s * kSub < from.count ? keys : w.keys);
        tile.values[s] = reinterpret_cast<const uint8_t *>(values);
        if (s * kSub >= from.count) continue;
        int4_keys(w, from, s, [&](int64_t d, F k) {
            prefetch(from.next_keys[s] + d / 2 * kSub);
            store(keys + d * kSub, k);
        });
        const int64_t end = from.count < (s + 1) * kSub ? from.count : (s + 1) * kSub;
        for (int64_t t = s * kSub; t < end; ++t)
            for (int64_t i = 0; i < w.dim; i += kLanes) {
                const int64_t in_block = t % kSub * groups + i / kGroup, in_tile = t * groups + i / kGroup;
                const uint8_t *codes = from.values[s] + in_block * (kGroup / 2);
                prefetch(from.next_values[s] + in_block * (kGroup / 2));
                store(values + t % kSub * w.dim + i, int4_value(codes, w.value_scales + in_tile * 2, i % kGroup > 0));
            }
    }
    return tile;
}

// The same in float32, converted into scratch; int8 elements still without their scales.
template <KvType type>
Tile converted_tile(const Work &w, const Tile &from) {
    const int64_t kd = w.a.kv->key_dim, vd = w.a.kv->value_dim;
    Tile tile = from;
    tile.value_stride = w.dim;
    for (int64_t s = 0; s < kSubs; ++s) {
        float *keys = w.keys + s * kd * kSub, *values = w.values + s * kSub * w.dim;
        tile.keys[s] = reinterpret_cast<const uint8_t *>(s * kSub < from.count ? keys : w.keys);
        tile.values[s] = reinterpret_cast<const uint8_t *>(values);
        if (s * kSub >= from.count) continue;
        for (int64_t i = 0; i < kd; ++i) {
            prefetch(from.next_keys[s] + i * kSub * kElementBytes<type>);
            store(keys + i * kSub, load_elements<type>(from.keys[s], i * kSub));
        }
        const int64_t tokens = from.count - s * kSub < kSub ? from.count - s * kSub : kSub;
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < w.dim; i += kLanes) {
                // The last vector of a row may run into the next one, or past the cache's end, which is padded.
                prefetch(from.next_values[s] + (t * vd + i) * kElementBytes<type>);
                const F x = load_elements<type>(from.values[s], t * vd + i);
                store(values + t * w.dim + i, vd - i >= kLanes ? x : select(first(vd - i), x, zero()));
            }
    }
    return tile;
}

}  // namespace
KVARN_KERNELS_END
