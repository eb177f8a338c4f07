// Attention of the query heads that share one KV head over the paged cache, with an online softmax.
//
// The arithmetic of a (query row, head) is fixed by its position alone. Keys are cut into tiles of 64 at absolute
// positions; a tile has its own maximum, its exponentials are summed by lanes and then by a fixed tree, and values are
// added in token order. Tiles merge in order into spans of 256 keys, spans merge in order into the result. So prefill
// in any chunking, decode, and decode with spans on several threads give the same bits.
#include "kernels_internal.h"
#include "vec.h"

KVARN_KERNELS_BEGIN
namespace {

constexpr float kNoScore = -INFINITY;
constexpr int kSub = 16;                        // keys of a sub-block
constexpr int kSubs = int(kKeyTile) / kSub;     // sub-blocks of a tile
constexpr int kScoreQueries = 6, kValueQueries = 6;  // register tiles: 4 vectors × 6 queries

inline F load_elements(const uint8_t *p, int64_t index, bool half) {
    return half ? load_f16(reinterpret_cast<const uint16_t *>(p) + index)
                : load(reinterpret_cast<const float *>(p) + index);
}

// What one query row of one head has gathered: sum of weights l under maximum m, and dim weighted values.
struct State {
    float *m, *l, *o;  // [queries], [queries], [queries][dim]
    int64_t dim;

    void reset(int64_t query) const {
        m[query] = kNoScore;
        l[query] = 0.0f;
        std::memset(o + query * dim, 0, size_t(dim) * sizeof(float));
    }
};

// Merges (m, l, values) into a state, which must come before it in position. Adding +0 turns -0 into +0, so a zero does
// not tell how many masked keys were multiplied with it.
inline void merge(const State &to, int64_t query, float m, float l, const float *values) {
    if (m == kNoScore) return;
    const float largest = to.m[query] > m ? to.m[query] : m;
    const float factors[16] = {to.m[query] - largest, m - largest};
    float scaled[16];
    store(scaled, exp(load(factors)));
    to.l[query] = to.l[query] * scaled[0] + l * scaled[1];
    const F old = set(scaled[0]), now = set(scaled[1]);
    float *o = to.o + query * to.dim;
    for (int64_t i = 0; i < to.dim; i += kLanes)
        store(o + i, add(fma(load(values + i), now, mul(load(o + i), old)), zero()));
    to.m[query] = largest;
}

// The views of one call: scratch cut into its parts.
struct Work {
    const AttentionArgs &a;
    int64_t queries;      // rows * group; query i is row i / group, head i % group
    int64_t dim;          // value_dim rounded up to 16
    float *keys;          // [kSubs][key_dim][16]
    float *values;        // [kKeyTile][dim]
    float *weights;       // [queries][kKeyTile]: scores, then exponentials
    float *tile_m, *tile_l, *tile_o;
    State span, total;

    explicit Work(const AttentionArgs &args) : a(args) {
        queries = a.rows * a.group;
        dim = (a.kv->value_dim + 15) / 16 * 16;
        float *next = a.scratch;
        const auto take = [&](int64_t n) {
            float *p = next;
            next += n;
            return p;
        };
        keys = take(kKeyTile * a.kv->key_dim);
        values = take(kKeyTile * dim);
        weights = take(queries * kKeyTile);
        tile_o = take(queries * dim);
        span = {nullptr, nullptr, take(queries * dim), dim};
        total = {nullptr, nullptr, take(queries * dim), dim};
        tile_m = take(queries);
        tile_l = take(queries);
        span.m = take(queries);
        span.l = take(queries);
        total.m = take(queries);
        total.l = take(queries);
    }

    int64_t position(int64_t query) const { return a.position + query / a.group; }
    int64_t first_key(int64_t position) const {
        return a.window > 0 && position >= a.window ? position - a.window + 1 : 0;
    }
    const float *q(int64_t query) const {
        return a.q + query / a.group * a.q_stride + query % a.group * a.kv->key_dim;
    }
};

// Keys and values of `count` tokens from `start` (a multiple of kKeyTile) as float32. Slots past count are not read
// for values; their keys share vectors with keys that are, and lanes do not meet.
void load_tile(const Work &w, int64_t start, int64_t count) {
    const KvLayerView &kv = *w.a.kv;
    const int64_t kd = kv.key_dim, vd = kv.value_dim, bytes = kv.element_bytes();
    for (int64_t s = 0; s < kSubs; ++s) {
        float *keys = w.keys + s * kd * kSub;
        if (s * kSub >= count) {
            std::memset(keys, 0, size_t(kd * kSub) * sizeof(float));
            continue;
        }
        const int64_t position = start + s * kSub, offset = position % kv.block_size;
        const uint8_t *head = kv.head(w.a.block_table[position / kv.block_size], w.a.kv_head);
        const uint8_t *k = head + offset * kd * bytes;
        for (int64_t i = 0; i < kd; ++i) store(keys + i * kSub, load_elements(k, i * kSub, kv.half));
        const uint8_t *v = head + (kv.block_size * kd + offset * vd) * bytes;
        const int64_t tokens = count - s * kSub < kSub ? count - s * kSub : kSub;
        float *values = w.values + s * kSub * w.dim;
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < w.dim; i += kLanes) {
                // The last vector of a row may run into the next one, or past the cache's end, which is padded.
                const F x = load_elements(v, t * vd + i, kv.half);
                store(values + t * w.dim + i, vd - i >= kLanes ? x : select(first(vd - i), x, zero()));
            }
    }
}

template <int queries>
void score_block(const Work &w, int64_t query) {
    const int64_t kd = w.a.kv->key_dim;
    const float *q[queries];
    F acc[kSubs][queries];
    for (int i = 0; i < queries; ++i) q[i] = w.q(query + i);
#pragma GCC unroll 4
    for (int s = 0; s < kSubs; ++s)
#pragma GCC unroll 6
        for (int i = 0; i < queries; ++i) acc[s][i] = zero();
    for (int64_t d = 0; d < kd; ++d) {
        F k[kSubs];
#pragma GCC unroll 4
        for (int s = 0; s < kSubs; ++s) k[s] = load(w.keys + (s * kd + d) * kSub);
#pragma GCC unroll 6
        for (int i = 0; i < queries; ++i) {
            const F x = set(q[i][d]);
#pragma GCC unroll 4
            for (int s = 0; s < kSubs; ++s) acc[s][i] = fma(x, k[s], acc[s][i]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < queries; ++i)
#pragma GCC unroll 4
        for (int s = 0; s < kSubs; ++s) store(w.weights + (query + i) * kKeyTile + s * kSub, acc[s][i]);
}

// Scores of one query become exp(score - max); keys outside [from, to) of the tile get weight 0.
void softmax_tile(const Work &w, int64_t query, int64_t from, int64_t to) {
    float *row = w.weights + query * kKeyTile;
    F s[kSubs];
    F largest = set(kNoScore);
#pragma GCC unroll 4
    for (int i = 0; i < kSubs; ++i) {
        s[i] = mul(load(row + i * kSub), set(w.a.scale));
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
        store(row + i * kSub, p[i]);
    }
    w.tile_m[query] = m;
    w.tile_l[query] = reduce_add(add(add(p[0], p[1]), add(p[2], p[3])));
}

// tile_o[query][i…] = sum over tokens, in order, of weight * value.
template <int queries, int vectors>
void value_block(const Work &w, int64_t query, int64_t column, int64_t from, int64_t to) {
    F acc[vectors][queries];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v)
#pragma GCC unroll 6
        for (int i = 0; i < queries; ++i) acc[v][i] = zero();
    for (int64_t t = from; t < to; ++t) {
        F x[vectors];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) x[v] = load(w.values + t * w.dim + column + v * kLanes);
#pragma GCC unroll 6
        for (int i = 0; i < queries; ++i) {
            const F p = set(w.weights[(query + i) * kKeyTile + t]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; ++v) acc[v][i] = fma(p, x[v], acc[v][i]);
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < queries; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v)
            store(w.tile_o + (query + i) * w.dim + column + v * kLanes, add(acc[v][i], zero()));
}

template <int queries>
void value_rows(const Work &w, int64_t query, int64_t from, int64_t to) {
    int64_t column = 0;
    for (; column + 64 <= w.dim; column += 64) value_block<queries, 4>(w, query, column, from, to);
    for (; column < w.dim; column += 16) value_block<queries, 1>(w, query, column, from, to);
}

// Runs body.operator()<n>(query) over all queries in blocks of `most` and one rest.
template <int most, class Body>
inline void in_blocks(int64_t queries, Body body) {
    int64_t query = 0;
    for (; query + most <= queries; query += most) body.template operator()<most>(query);
    switch (queries - query) {
        case 5: return body.template operator()<5>(query);
        case 4: return body.template operator()<4>(query);
        case 3: return body.template operator()<3>(query);
        case 2: return body.template operator()<2>(query);
        case 1: return body.template operator()<1>(query);
        default: return;
    }
}

void visit_tile(const Work &w, int64_t start) {
    const int64_t last = w.a.position + w.a.rows - 1;
    const int64_t count = last + 1 - start < kKeyTile ? last + 1 - start : kKeyTile;
    load_tile(w, start, count);
    in_blocks<kScoreQueries>(w.queries, [&]<int n>(int64_t query) { score_block<n>(w, query); });
    int64_t lowest = kKeyTile;
    for (int64_t i = 0; i < w.queries; ++i) {
        const int64_t position = w.position(i);
        const int64_t from = w.first_key(position) - start;
        const int64_t to = position + 1 - start < kKeyTile ? position + 1 - start : kKeyTile;
        if (from >= kKeyTile || to <= 0) {
            w.tile_m[i] = kNoScore;
            std::memset(w.weights + i * kKeyTile, 0, kKeyTile * sizeof(float));
            continue;
        }
        softmax_tile(w, i, from > 0 ? from : 0, to);
        lowest = from < lowest ? (from > 0 ? from : 0) : lowest;
    }
    in_blocks<kValueQueries>(w.queries, [&]<int n>(int64_t query) { value_rows<n>(w, query, lowest, count); });
    for (int64_t i = 0; i < w.queries; ++i) merge(w.span, i, w.tile_m[i], w.tile_l[i], w.tile_o + i * w.dim);
}

void write_result(const State &state, int64_t query, int64_t value_dim, float *out) {
    const F inverse = set(1.0f / state.l[query]);
    const float *o = state.o + query * state.dim;
    for (int64_t i = 0; i < value_dim; i += kLanes) store_n(out + i, mul(load(o + i), inverse), value_dim - i);
}

}  // namespace

void attention(const AttentionArgs &a) {
    const Work w(a);
    const int64_t last = a.position + a.rows - 1;
    const int64_t first_span = w.first_key(a.position) / kKeySpan;
    const int64_t begin = a.span_begin > first_span ? a.span_begin : first_span;
    const int64_t end = a.span_end < last / kKeySpan + 1 ? a.span_end : last / kKeySpan + 1;
    for (int64_t i = 0; i < w.queries; ++i) w.total.reset(i);
    const int64_t stride = w.dim + 2;
    for (int64_t span = begin; span < end; ++span) {
        for (int64_t i = 0; i < w.queries; ++i) w.span.reset(i);
        for (int64_t tile = span * kSpanTiles; tile < (span + 1) * kSpanTiles; ++tile) {
            const int64_t start = tile * kKeyTile;
            if (start > last || start + kKeyTile <= w.first_key(a.position)) continue;
            visit_tile(w, start);
        }
        for (int64_t i = 0; i < w.queries; ++i) {
            const float *o = w.span.o + i * w.dim;
            if (!a.partial) {
                merge(w.total, i, w.span.m[i], w.span.l[i], o);
                continue;
            }
            float *to = a.partial + ((span - begin) * w.queries + i) * stride;
            std::memcpy(to, o, size_t(w.dim) * sizeof(float));
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
    float m, l;
    const State total{&m, &l, scratch, dim};
    total.reset(0);
    for (int64_t s = 0; s < spans; ++s, partial += span_stride) merge(total, 0, partial[dim], partial[dim + 1], partial);
    write_result(total, 0, value_dim, out);
}

KVARN_KERNELS_END
