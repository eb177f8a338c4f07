// Attention of the query heads that share one KV head over the paged cache, with an online softmax.
//
// The arithmetic of a (query row, head) is fixed by its position alone. Keys are cut into tiles of 64 at absolute
// positions; a tile has its own maximum, its exponentials are summed by lanes and then by a fixed tree, and values are
// added in token order. Tiles merge in order into spans of 256 keys, spans merge in order into the result. So prefill
// in any chunking, decode, and decode with spans on several threads give the same bits.
//
// Many queries convert a tile to float32 once, in scratch; few read the cache as it is. A "query" below is one head of
// one row: query i is row i / group, head i % group.
#include "attention_tiles.h"

KVARN_KERNELS_BEGIN
namespace {

constexpr int kBlockQueries = 6;             // register tiles: 4 vectors × 6 queries

// Merges maxima and sums (m, l), which come after `to` in position, 16 queries at a time; leaves the factors that the
// values of both are to be multiplied with. A query without keys on either side gives factors 1 and 0: nothing changes.
void merge_sums(const State &to, const float *m, const float *l, int64_t queries, float *old_factor, float *now_factor) {
    for (int64_t i = 0; i < queries; i += kLanes) {
        const F before = load(to.m + i), after = load(m + i), largest = max(before, after);
        const F base = select(less(set(kNoScore), largest), largest, zero());
        const F old = exp(sub(before, base)), now = exp(sub(after, base));
        store(to.l + i, fma(load(l + i), now, mul(load(to.l + i), old)));
        store(to.m + i, largest);
        store(old_factor + i, old);
        store(now_factor + i, now);
    }
}

// Values of one query: o = o * old + values * now. Adding +0 turns -0 into +0, so that a zero does not tell how many
// masked keys were multiplied with it.
KVARN_INLINE F merged(F o, F old, F values, F now) { return add(fma(values, now, mul(o, old)), zero()); }

// Adds dimension d of the products of queries and keys.
template <int queries>
KVARN_INLINE void add_products(const float *const *q, int64_t d, const F *k, F (*acc)[queries]) {
#pragma GCC unroll 6
    for (int i = 0; i < queries; ++i) {
        const F x = set(q[i][d]);
#pragma GCC unroll 4
        for (int s = 0; s < kSubs; ++s) acc[s][i] = fma(x, k[s], acc[s][i]);
    }
}

// The dimensions of one group of an int4 tile that is read in place.
template <int queries>
KVARN_INLINE void add_int4_group(const Work &w, const Tile &tile, const float *const *q, int64_t start,
                                 F (*acc)[queries]) {
    F scale[kSubs], least[kSubs];
#pragma GCC unroll 4
    for (int s = 0; s < kSubs; ++s) {
        for (int64_t i = 0; i < kGroup / 2; i += 4) prefetch(tile.next_keys[s] + (start / 2 + i) * kSub);
        scale[s] = load_f16(tile.scales[s].keys + start);
        least[s] = load_f16(tile.scales[s].keys + start + kSub);
    }
    for (int64_t d = start; d < start + kGroup; d += 2) {
        F even[kSubs], odd[kSubs];
#pragma GCC unroll 4
        for (int s = 0; s < kSubs; ++s) {
            const uint8_t *row = tile.keys[s] + d / 2 * kSub;
            const float *reference = w.references + s * w.key_dim + d;
            even[s] = int4_key(load_low_u4(row), scale[s], least[s], reference[0]);
            odd[s] = int4_key(load_high_u4(row), scale[s], least[s], reference[1]);
        }
        add_products<queries>(q, d, even, acc);
        add_products<queries>(q, d + 1, odd, acc);
    }
}

// Scores of `queries` queries and all 64 keys: a chain over dimensions for each. By itself: inlined, compilers spill.
template <KvType type, bool ahead, int queries>
[[gnu::noinline]] void score_block(const Work &w, const Tile &tile, int64_t query) {
    const int64_t kd = w.key_dim;
    const float *q[queries];
    F acc[kSubs][queries];
    for (int i = 0; i < queries; ++i) q[i] = w.q(query + i);
#pragma GCC unroll 4
    for (int s = 0; s < kSubs; ++s)
#pragma GCC unroll 6
        for (int i = 0; i < queries; ++i) acc[s][i] = zero();
    if constexpr (type == KvType::kInt4) {
        for (int64_t start = 0; start < kd; start += kGroup) add_int4_group<queries>(w, tile, q, start, acc);
    } else {
        for (int64_t d = 0; d < kd; ++d) {
            F k[kSubs];
#pragma GCC unroll 4
            for (int s = 0; s < kSubs; ++s) {
                if constexpr (ahead) prefetch(tile.next_keys[s] + d * kSub * kElementBytes<type>);
                k[s] = load_elements<type>(tile.keys[s], d * kSub);
            }
            add_products<queries>(q, d, k, acc);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < queries; ++i)
#pragma GCC unroll 4
        for (int s = 0; s < kSubs; ++s) store(w.weights + (query + i) * kKeyTile + s * kSub, acc[s][i]);
}

// Scores of one query become exp(score - max), times the scale of the value where there is one; keys outside [from, to)
// of the tile get weight 0.
void softmax_tile(const Work &w, const Tile &tile, int64_t query, int64_t from, int64_t to) {
    const bool scaled = tile.key_scales[0] != nullptr;
    float *row = w.weights + query * kKeyTile;
    F s[kSubs];
    F largest = set(kNoScore);
#pragma GCC unroll 4
    for (int i = 0; i < kSubs; ++i) {
        s[i] = load(row + i * kSub);
        if (scaled) s[i] = mul(s[i], load(tile.key_scales[i]));
        s[i] = mul(s[i], set(w.a.scale));
        if (w.a.softcap > 0) s[i] = mul(tanh(div(s[i], set(w.a.softcap))), set(w.a.softcap));
        const int64_t begin = from - i * kSub, end = to - i * kSub;
        if (end < kSub) s[i] = end <= 0 ? set(kNoScore) : select(first(end), s[i], set(kNoScore));
        if (begin > 0) s[i] = begin >= kSub ? set(kNoScore) : select(first(begin), set(kNoScore), s[i]);
        largest = max(largest, s[i]);
    }
    const float m = reduce_max(largest);
    F p[kSubs];
#pragma GCC unroll 4
    for (int i = 0; i < kSubs; ++i) {
        p[i] = exp(sub(s[i], set(m)));
        store(row + i * kSub, scaled ? mul(p[i], load(tile.value_scales[i])) : p[i]);
    }
    w.tile_m[query] = m;
    w.tile_l[query] = reduce_add(add(add(p[0], p[1]), add(p[2], p[3])));
}

// Merges into the span, for some columns: sums over tokens, in order, of weight * value.
template <KvType type, bool ahead, int queries, int vectors>
[[gnu::noinline]] void value_block(const Work &w, const Tile &tile, int64_t query, int64_t column, int64_t from) {
    F acc[vectors][queries];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
#pragma GCC unroll 6
        for (int i = 0; i < queries; ++i) acc[v][i] = zero();
    const float *weights = w.weights + query * kKeyTile;
    // Of int4: where the columns begin. Four vectors begin with a group, one may be the second half of it.
    const int64_t groups = kv_groups(w.a.kv->value_dim), group = column / kGroup;
    const float *value_scales = w.value_scales;
    const bool second = vectors == 1 && column % kGroup > 0;
    for (int64_t t = from; t < tile.count;) {
        const uint8_t *values = tile.values[t / kSub], *next = tile.next_values[t / kSub];
        const int64_t end = tile.count < (t / kSub + 1) * kSub ? tile.count : (t / kSub + 1) * kSub;
        for (; t < end; ++t) {
            F x[vectors];
            if constexpr (type == KvType::kInt4) {
                const int64_t row = (t % kSub * groups + group) * (kGroup / 2);
                const float *scales = value_scales + (t * groups + group) * 2;
                prefetch(next + row);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v)
                    x[v] = int4_value(values + row + v / 2 * (kGroup / 2), scales + v / 2 * 2, second || v % 2);
            }
#pragma GCC unroll 4
            for (int v = 0; v < vectors && type != KvType::kInt4; ++v) {
                const int64_t at = t % kSub * tile.value_stride + column + v * kLanes;
                if constexpr (ahead) prefetch(next + at * kElementBytes<type>);
                x[v] = load_elements<type>(values, at);
            }
#pragma GCC unroll 6
            for (int i = 0; i < queries; ++i) {
                const F p = set(weights[i * kKeyTile + t]);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; ++v) acc[v][i] = fma(p, x[v], acc[v][i]);
            }
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < queries; ++i) {
        const F old = set(w.old_factor[query + i]), now = set(w.now_factor[query + i]);
        float *o = w.span.o + (query + i) * w.dim + column;
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) store(o + v * kLanes, merged(load(o + v * kLanes), old, acc[v][i], now));
    }
}

template <KvType type, bool ahead, int queries>
void value_rows(const Work &w, const Tile &tile, int64_t query, int64_t from) {
    int64_t column = 0;
    for (; column + 64 <= w.dim; column += 64) value_block<type, ahead, queries, 4>(w, tile, query, column, from);
    for (; column < w.dim; column += 16) value_block<type, ahead, queries, 1>(w, tile, query, column, from);
}

// Calls body.operator()<n>(query) over all queries in blocks of n = 6 and one rest.
template <class Body>
KVARN_INLINE void in_blocks(int64_t queries, Body body) {
    int64_t query = 0;
    for (; query + kBlockQueries <= queries; query += kBlockQueries) body.template operator()<kBlockQueries>(query);
    switch (queries - query) {
        case 5: return body.template operator()<5>(query);
        case 4: return body.template operator()<4>(query);
        case 3: return body.template operator()<3>(query);
        case 2: return body.template operator()<2>(query);
        case 1: return body.template operator()<1>(query);
        default: return;
    }
}

// The next tile's values in the rows that this tile has none in: where they are in both, value_block asks for them.
void ask_for_rest(const Work &w, const Tile &tile, int64_t from) {
    const int64_t bytes = w.a.kv->vector_bytes(w.a.kv->value_dim);
    const auto ask = [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
            for (int64_t i = 0; i < bytes; i += 64) prefetch(tile.next_values[t / kSub] + t % kSub * bytes + i);
    };
    ask(0, from);
    ask(tile.count, kKeyTile);
}

template <KvType type, bool ahead>
void visit(const Work &w, const Tile &tile, int64_t start) {
    in_blocks(w.queries, [&]<int n>(int64_t query) { score_block<type, ahead, n>(w, tile, query); });
    int64_t lowest = kKeyTile;
    for (int64_t i = 0; i < w.queries; ++i) {
        const int64_t position = w.position(i);
        const int64_t from = w.first_key(position) - start, seen = position + 1 - start;
        if (from >= kKeyTile || seen <= 0) {
            w.tile_m[i] = kNoScore;
            w.tile_l[i] = 0.0f;
            std::memset(w.weights + i * kKeyTile, 0, kKeyTile * sizeof(float));
            continue;
        }
        softmax_tile(w, tile, i, from > 0 ? from : 0, seen < kKeyTile ? seen : kKeyTile);
        lowest = from < lowest ? (from > 0 ? from : 0) : lowest;
    }
    merge_sums(w.span, w.tile_m, w.tile_l, w.queries, w.old_factor, w.now_factor);
    in_blocks(w.queries, [&]<int n>(int64_t query) { value_rows<type, ahead, n>(w, tile, query, lowest); });
    if constexpr (ahead) ask_for_rest(w, tile, lowest);
}

template <KvType type>
void visit_as(const Work &w, const Tile &cached, int64_t start, bool direct) {
    if constexpr (type == KvType::kInt4) prepare_int4(w, cached);
    if (direct)
        visit<type, true>(w, cached, start);
    else if constexpr (type == KvType::kInt4)
        visit<KvType::kFloat32, false>(w, converted_int4(w, cached), start);
    else
        visit<KvType::kFloat32, false>(w, converted_tile<type>(w, cached), start);
}

void visit_tile(const Work &w, const Tile &cached, int64_t start) {
    const bool whole = w.dim == w.a.kv->value_dim || w.a.kv->type == KvType::kInt4;  // no vector runs into the next row
    const bool quantized = w.a.kv->type == KvType::kInt8 || w.a.kv->type == KvType::kInt4;  // to convert them takes longer
    const bool direct = whole && w.queries <= (quantized ? 2 : 4) * kBlockQueries;
    switch (w.a.kv->type) {
        case KvType::kFloat32: return visit_as<KvType::kFloat32>(w, cached, start, direct);
        case KvType::kFloat16: return visit_as<KvType::kFloat16>(w, cached, start, direct);
        case KvType::kInt8: return visit_as<KvType::kInt8>(w, cached, start, direct);
        case KvType::kInt4: return visit_as<KvType::kInt4>(w, cached, start, direct);
    }
}

// Merges a finished span, which comes after `total` in position, into it.
void merge_span(const State &total, const State &span, int64_t queries, float *old_factor, float *now_factor) {
    merge_sums(total, span.m, span.l, queries, old_factor, now_factor);
    for (int64_t i = 0; i < queries; ++i) {
        const F old = set(old_factor[i]), now = set(now_factor[i]);
        for (int64_t at = i * total.dim; at < (i + 1) * total.dim; at += kLanes)
            store(total.o + at, merged(load(total.o + at), old, load(span.o + at), now));
    }
}

void write_result(const State &state, int64_t query, int64_t value_dim, float *out) {
    const F inverse = set(1.0f / state.l[query]);
    const float *o = state.o + query * state.dim;
    for (int64_t i = 0; i < value_dim; i += kLanes) store_n(out + i, mul(load(o + i), inverse), value_dim - i);
}

// The rest of one row of a tree, of whose keys those before the tile at `start` are in w's sums: the tiles of its own.
void finish_path(const Work &w, const TreeRows &tree, int64_t row, int64_t start) {
    float *gathered = reinterpret_cast<float *>((reinterpret_cast<uintptr_t>(w.rest) + 63) / 64 * 64);
    const int64_t position = w.a.position;
    for (; start <= position; start += kKeyTile) {
        if (start + kKeyTile > w.first_key(position)) visit_tile(w, tile_of_path(w, tree, row, start, gathered), start);
        if ((start + kKeyTile) % kKeySpan != 0) continue;
        merge_span(w.total, w.span, w.queries, w.old_factor, w.now_factor);
        w.span.reset(w.padded());
    }
    merge_span(w.total, w.span, w.queries, w.old_factor, w.now_factor);
    for (int64_t i = 0; i < w.queries; ++i) write_result(w.total, i, w.a.kv->value_dim, w.a.out + i * w.a.kv->value_dim);
}

// Rows of a tree: tiles that lie before it are the same for all rows and visited once, each further one row by row.
void attention_of_tree(const AttentionArgs &a) {
    const TreeRows &tree = *a.tree;
    const Work w(a);
    const int64_t common = tree.begin / kKeyTile * kKeyTile;
    int64_t first_key = common;
    for (int64_t i = 0; i < w.queries; i += a.group) {
        const int64_t key = w.first_key(w.position(i));
        first_key = key < first_key ? key : first_key;
    }
    w.total.reset(w.padded());
    w.span.reset(w.padded());
    for (int64_t start = first_key / kKeyTile * kKeyTile; start < common; start += kKeyTile) {
        visit_tile(w, cached_tile(w, start, first_key, common - 1), start);
        if ((start + kKeyTile) % kKeySpan != 0) continue;
        merge_span(w.total, w.span, w.queries, w.old_factor, w.now_factor);
        w.span.reset(w.padded());
    }
    for (int64_t r = 0; r < a.rows; ++r) {
        AttentionArgs own = a;
        own.rows = 1;
        own.tree = nullptr;
        own.q = a.q + r * a.q_stride;
        own.position = tree.positions[tree.row + r];
        own.out = a.out + r * a.out_stride;
        finish_path(Work(own, w, r), tree, tree.row + r, common);
    }
}

}  // namespace

void attention(const AttentionArgs &a) {
    if (a.tree) return attention_of_tree(a);
    const Work w(a);
    const int64_t last = a.position + a.rows - 1, first_key = w.first_key(a.position);
    const int64_t begin = a.span_begin > first_key / kKeySpan ? a.span_begin : first_key / kKeySpan;
    const int64_t end = a.span_end < last / kKeySpan + 1 ? a.span_end : last / kKeySpan + 1;
    w.total.reset(w.padded());
    for (int64_t span = begin; span < end; ++span) {
        w.span.reset(w.padded());
        for (int64_t tile = span * kSpanTiles; tile < (span + 1) * kSpanTiles; ++tile) {
            const int64_t start = tile * kKeyTile;
            if (start <= last && start + kKeyTile > first_key) visit_tile(w, cached_tile(w, start, first_key, last), start);
        }
        if (!a.partial) {
            merge_span(w.total, w.span, w.queries, w.old_factor, w.now_factor);
            continue;
        }
        for (int64_t i = 0; i < w.queries; ++i) {
            float *to = a.partial + ((span - begin) * w.queries + i) * (w.dim + 2);
            std::memcpy(to, w.span.o + i * w.dim, size_t(w.dim) * sizeof(float));
            to[w.dim] = w.span.m[i];
            to[w.dim + 1] = w.span.l[i];
        }
    }
    if (a.partial) return;
    for (int64_t i = 0; i < w.queries; ++i)
        write_result(w.total, i, a.kv->value_dim, a.out + i / a.group * a.out_stride + i % a.group * a.kv->value_dim);
}

void attention_merge(const float *partial, int64_t spans, int64_t span_stride, int64_t value_dim, float *scratch,
                     float *out) {
    const int64_t dim = (value_dim + 15) / 16 * 16;
    float *next = scratch;
    const auto take = [&](int64_t n) { return (next += n) - n; };
    const State total{take(16), take(16), take(dim), dim};
    float *m = take(16), *l = take(16), *old_factor = take(16), *now_factor = take(16);
    for (int64_t i = 0; i < 16; ++i) total.m[i] = m[i] = kNoScore, total.l[i] = l[i] = 0.0f;
    std::memset(total.o, 0, size_t(dim) * sizeof(float));
    for (int64_t s = 0; s < spans; ++s, partial += span_stride) {
        m[0] = partial[dim];
        l[0] = partial[dim + 1];
        const State span{m, l, const_cast<float *>(partial), dim};
        merge_span(total, span, 1, old_factor, now_factor);
    }
    write_result(total, 0, value_dim, out);
}

KVARN_KERNELS_END
