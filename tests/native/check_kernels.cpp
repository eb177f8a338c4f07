// All kernels of every instruction set over random shapes, compared with the scalar ones and with themselves.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "check.h"
#include "runtime/isa.h"
#include "runtime/stage.h"
#include "stored.h"

using namespace kvarn;
using check::between;
using check::floats;
using check::require;
using check::stored_matrix;

namespace {

bool close(float a, float b, float size) { return std::fabs(a - b) <= 1e-4f * size + 1e-4f || (a != a && b != b); }

// Rows as floats, and as int8 where the weights are quantized. `single`: the form of a step of one row.
struct Rows {
    std::vector<float> x;
    int64_t count, cols;
    check::Bytes place;
    QuantRows quants;

    Rows(const Kernels &k, std::vector<float> values, int64_t rows, int64_t columns, bool quantize)
        : x(std::move(values)), count(rows), cols(columns), place(quant_bytes(rows, columns)),
          quants{place.data(), columns, rows == 1} {
        if (quantize) k.quantize({x.data(), columns, 0, rows, 0, quants.groups(), quants});
    }
};

// All panels in two calls, `step` rows at a time.
std::vector<float> run_linear(const Kernels &k, const PackedMatrix &w, const Rows &rows, int64_t step) {
    std::vector<float> out(size_t(rows.count * w.rows), NAN);
    for (int64_t r = 0; r < rows.count; r += step) {
        const int64_t middle = w.panels() / 2;
        for (int part = 0; part < 2; ++part)
            k.linear({&w, part ? middle : 0, part ? w.panels() : middle, &rows.quants, rows.x.data(), w.cols, r,
                      std::min(rows.count, r + step), out.data(), w.rows, 0, 0});
    }
    return out;
}

// Random cuts of [0, n) at multiples of `unit`.
std::vector<int64_t> cuts(int64_t n, int64_t unit) {
    std::vector<int64_t> at{0};
    while (at.back() < n) at.push_back(std::min(n, at.back() + unit * between(1, n / unit + 1)));
    return at;
}

// The same cut into random spans of panels and of rows, each into a place of its own that holds the span and no more.
std::vector<float> run_linear_in_spans(const Kernels &k, const PackedMatrix &w, const Rows &rows) {
    std::vector<float> out(size_t(rows.count * w.rows), NAN);
    const std::vector<int64_t> panels = cuts(w.panels(), 1), spans = cuts(rows.count, kTileTokens);
    for (size_t p = 0; p + 1 < panels.size(); ++p)
        for (size_t s = 0; s + 1 < spans.size(); ++s) {
            const int64_t first = panels[p] * kPanelRows, features = std::min(w.rows, panels[p + 1] * kPanelRows) - first;
            std::vector<float> place(size_t((spans[s + 1] - spans[s]) * features), NAN);
            k.linear({&w, panels[p], panels[p + 1], &rows.quants, rows.x.data(), w.cols, spans[s], spans[s + 1],
                      place.data(), features, spans[s], first});
            for (int64_t r = spans[s]; r < spans[s + 1]; ++r)
                std::copy_n(&place[size_t((r - spans[s]) * features)], features, &out[size_t(r * w.rows + first)]);
        }
    return out;
}

void check_matrix(const Kernels &k, const Kernels &scalar, Format format, int64_t rows, int64_t cols, int64_t count) {
    const bool quantized = traits(format).block_size > 1;
    const std::vector<uint8_t> stored = stored_matrix(format, rows, cols);
    check::Bytes packed(size_t(num_panels(rows)) * panel_bytes(format, cols) + 64);
    std::memset(packed.data(), 0, packed.size());
    pack_panels(format, rows, cols, stored.data(), packed.data(), 0, num_panels(rows));
    const PackedMatrix w{format, rows, cols, packed.data()};
    std::vector<float> weights(size_t(rows * cols));
    for (int64_t r = 0; r < rows; ++r) unpack_row(w, r, &weights[size_t(r * cols)]);

    const Rows in(k, floats(count * cols), count, cols, quantized);
    const std::vector<float> whole = run_linear(k, w, in, count);
    const auto same = [&](const std::vector<float> &other) {
        return std::memcmp(whole.data(), other.data(), whole.size() * 4) == 0;
    };
    require(same(run_linear(k, w, in, kTileTokens)), "rows in tiles", k.name);
    require(same(run_linear_in_spans(k, w, in)), "spans of panels and rows", k.name);
    for (int64_t r = 0; r < count; ++r) {
        const std::vector<float> x(&in.x[size_t(r * cols)], &in.x[size_t(r * cols)] + cols);
        const std::vector<float> alone = run_linear(k, w, Rows(k, x, 1, cols, quantized), 1);
        require(std::memcmp(alone.data(), &whole[size_t(r * rows)], alone.size() * 4) == 0, "row alone", k.name);
    }
    const std::vector<float> wanted = run_linear(scalar, w, in, count);
    for (int64_t r = 0; r < count; ++r)
        for (int64_t f = 0; f < rows; ++f) {
            float terms = 0;  // rounding errors are of the size of what is added up, not of the sum
            for (int64_t i = 0; i < cols; ++i)
                terms += std::fabs(in.x[size_t(r * cols + i)] * weights[size_t(f * cols + i)]);
            const size_t at = size_t(r * rows + f);
            require(std::fabs(whole[at] - wanted[at]) <= 1e-6f * terms, "linear", k.name);
        }
}

void check_linear(const Kernels &k, const Kernels &scalar) {
    for (int f = 0; f < kNumFormats; ++f) {
        const Format format = Format(f);
        const int64_t block = traits(format).block_size;
        for (const int64_t count : {int64_t(1), between(2, 8), between(9, 16), between(17, 40), between(41, 70)}) {
            const int64_t cols = block == 1 ? between(1, 90) : block * between(1, block == 32 ? 9 : 2);
            check_matrix(k, scalar, format, between(1, 70), cols, count);
        }
    }
    // So wide that the rows of one pass over a panel are fewer than those of the call.
    const int64_t wide = 9216, rows = linear_row_span(wide) + between(1, 30);
    check_matrix(k, scalar, Format::Q4_1, between(1, 20), wide, rows);
    check_matrix(k, scalar, Format::Q6_K, between(1, 20), wide, rows);
}

// Against the definition in kernels.h.
template <int tile>
void check_group(const Kernels &k, const QuantGroup<tile> &group, int lane, const float *x) {
    int32_t half[2] = {0, 0};
    for (int i = 0; i < kGroup; ++i) {
        half[i / 16] += group.q[lane][i];
        require(std::fabs(group.scale[lane] * float(group.q[lane][i]) - x[i]) <= 0.501f * group.scale[lane], "quants", k.name);
    }
    require(half[0] == group.half[0][lane] && half[1] == group.half[1][lane], "sums of quants", k.name);
    require(group.sum[lane] == group.scale[lane] * float(half[0] + half[1]), "scaled sum of quants", k.name);
}

// Spans of rows and groups in any order give the bytes of one call; nothing outside of a span is written.
void check_quantize(const Kernels &k) {
    for (int round = 0; round < 60; ++round) {
        const int64_t rows = round % 3 ? between(1, 70) : 1, groups = between(1, 40), cols = groups * kGroup;
        const int64_t stride = cols + between(0, 20);
        const std::vector<float> x = floats((rows - 1) * stride + cols, 3.0f);
        const size_t bytes = rows == 1 ? size_t(groups) * sizeof(QuantGroup<1>) : quant_bytes(rows, cols);
        check::Bytes whole(bytes), pieces(bytes);
        std::memcpy(pieces.data(), whole.data(), bytes);
        const QuantRows to{whole.data(), cols, rows == 1}, parts{pieces.data(), cols, rows == 1};
        k.quantize({x.data(), stride, 0, rows, 0, groups, to});
        struct Span { int64_t row_begin, row_end, group_begin, group_end; };
        std::vector<Span> spans;
        const std::vector<int64_t> of_rows = cuts(rows, 1);
        for (size_t r = 0; r + 1 < of_rows.size(); ++r) {
            const std::vector<int64_t> of_groups = cuts(groups, 1);
            for (size_t g = 0; g + 1 < of_groups.size(); ++g)
                spans.push_back({of_rows[r], of_rows[r + 1], of_groups[g], of_groups[g + 1]});
        }
        std::shuffle(spans.begin(), spans.end(), check::random());
        for (const Span &s : spans) {
            const int64_t width = (s.group_end - s.group_begin) * kGroup, n = s.row_end - s.row_begin;
            std::vector<float> own;  // ends where the span ends
            for (int64_t r = 0; r < n; ++r) {
                const float *from = &x[size_t((s.row_begin + r) * stride + s.group_begin * kGroup)];
                own.insert(own.end(), from, from + width);
            }
            own.shrink_to_fit();
            k.quantize({own.data(), width, s.row_begin, s.row_end, s.group_begin, s.group_end, parts});
        }
        require(std::memcmp(whole.data(), pieces.data(), bytes) == 0, "quantize in spans", k.name);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t g = 0; g < groups; ++g) {
                const float *from = &x[size_t(r * stride + g * kGroup)];
                if (rows == 1)
                    check_group(k, to.row()[g], 0, from);
                else
                    check_group(k, to.tile(r)[g], int(r % kTileTokens), from);
            }
    }
}

void check_rows(const Kernels &k, const Kernels &scalar) {
    for (int round = 0; round < 60; ++round) {
        const int64_t n = between(1, 100);
        std::vector<float> x = floats(n, 5.0f), y = floats(n), a(x), b(x);
        for (int f = 0; f < 4; ++f) {
            k.activation(Function(f), x.data(), a.data(), n);
            scalar.activation(Function(f), x.data(), b.data(), n);
            for (int64_t i = 0; i < n; ++i) require(close(a[i], b[i], std::fabs(b[i])), "activation", k.name);
            k.gated(Function(f), x.data(), y.data(), a.data(), n);
            scalar.gated(Function(f), x.data(), y.data(), b.data(), n);
            for (int64_t i = 0; i < n; ++i) require(close(a[i], b[i], std::fabs(b[i])), "gated", k.name);
        }
        k.add(x.data(), y.data(), a.data(), n);
        scalar.add(x.data(), y.data(), b.data(), n);
        require(a == b, "add", k.name);
        k.scale_cap(0.7f, 3.0f, a.data(), n);
        scalar.scale_cap(0.7f, 3.0f, b.data(), n);
        for (int64_t i = 0; i < n; ++i) require(close(a[i], b[i], 1.0f), "scale_cap", k.name);
        for (int layer = 0; layer < 2; ++layer) {
            k.norm({x.data(), a.data(), 1, n, y.data(), layer ? y.data() : nullptr, 1e-5f, layer == 1});
            scalar.norm({x.data(), b.data(), 1, n, y.data(), layer ? y.data() : nullptr, 1e-5f, layer == 1});
            for (int64_t i = 0; i < n; ++i) require(close(a[i], b[i], 1.0f), "norm", k.name);
        }
        const int64_t pairs = between(1, 40), heads = between(1, 3), dim = 2 * pairs + between(0, 5);
        const std::vector<float> heads_in = floats(heads * dim), table = floats(2 * pairs);
        std::vector<float> p(heads_in), q(heads_in);
        for (int style = 0; style < 2; ++style) {
            k.rope({p.data(), p.data(), heads, dim, pairs, table.data(), style == 1});
            scalar.rope({q.data(), q.data(), heads, dim, pairs, table.data(), style == 1});
            for (size_t i = 0; i < p.size(); ++i) require(close(p[i], q[i], 1.0f), "rope", k.name);
        }
    }
}

// One sequence in shuffled blocks; keys beyond its length are NaN.
struct Cache {
    KvLayerView view;
    check::Bytes memory;
    std::vector<int32_t> table;

    int64_t slot(int64_t position) const {
        return table[size_t(position / view.block_size)] * view.block_size + position % view.block_size;
    }

    Cache(int64_t blocks, int64_t block_size, int64_t heads, int64_t dim, KvType type)
        : view{nullptr, block_size, heads, dim, dim, type}, memory(size_t(view.block_bytes() * blocks) + 64),
          table(size_t(blocks)) {
        std::memset(memory.data(), 0xff, memory.size());
        view.data = memory.data();
        for (size_t i = 0; i < table.size(); ++i) table[i] = int32_t(i);
        std::shuffle(table.begin(), table.end(), check::random());
    }
};

// One sequence's attention as a step asks for it. Tables, scratch and partial results have no element to spare.
struct Sequence {
    Cache cache;
    int64_t head, group, dim, length, rows, window;
    float softcap;
    std::vector<float> q;

    Sequence(const Kernels &k, int64_t length_, int64_t rows_, int64_t block_size, int64_t heads, int64_t group_,
             int64_t dim_, int64_t window_, float softcap_, KvType type)
        : cache((length_ + block_size - 1) / block_size, block_size, heads, dim_, type), head(heads - 1), group(group_),
          dim(dim_), length(length_), rows(rows_), window(window_), softcap(softcap_), q(floats(rows_ * group_ * dim_)) {
        const std::vector<float> keys = floats(length * dim), values = floats(length * dim);
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t t = 0; t < length; ++t)
                k.kv_write(cache.view, cache.slot(t), cache.slot(t), h, &keys[size_t(t * dim)], &values[size_t(t * dim)]);
    }

    AttentionArgs arguments(int64_t first, int64_t count, check::Bytes &scratch) const {
        AttentionArgs a{};
        a.kv = &cache.view, a.block_table = cache.table.data(), a.kv_head = head, a.group = group;
        a.q = &q[size_t(first * group * dim)], a.q_stride = group * dim, a.rows = count;
        a.position = length - rows + first, a.window = window, a.scale = 0.3f, a.softcap = softcap;
        a.span_end = 1 << 20, a.out_stride = group * dim;
        a.scratch = reinterpret_cast<float *>(scratch.data());
        return a;
    }
    check::Bytes scratch() const { return check::Bytes(size_t(attention_scratch_elements(group, dim, dim, cache.view.type)) * 4); }

    std::vector<float> run(const Kernels &k, int64_t first, int64_t count) const {
        std::vector<float> out(size_t(count * group * dim), NAN);
        check::Bytes place = scratch();
        AttentionArgs a = arguments(first, count, place);
        a.out = out.data();
        k.attention(a);
        return out;
    }

    // One row with its key spans in several calls, as threads share them.
    std::vector<float> run_in_parts(const Kernels &k, int64_t row) const {
        std::vector<float> out(size_t(group * dim), NAN);
        check::Bytes place = scratch();
        const int64_t position = length - rows + row, entry = attention_partial_elements(dim);
        const int64_t first = window > 0 && position >= window ? (position - window + 1) / kKeySpan : 0;
        const int64_t spans = position / kKeySpan + 1 - first;
        std::vector<float> partial(size_t(spans * group * entry), NAN);
        const std::vector<int64_t> at = cuts(spans, 1);
        for (size_t i = at.size() - 1; i-- > 0;) {
            AttentionArgs a = arguments(row, 1, place);
            a.span_begin = first + at[i], a.span_end = first + at[i + 1], a.partial = &partial[size_t(at[i] * group * entry)];
            k.attention(a);
        }
        for (int64_t h = 0; h < group; ++h)
            k.attention_merge(&partial[size_t(h * entry)], spans, group * entry, dim, reinterpret_cast<float *>(place.data()),
                              &out[size_t(h * dim)]);
        return out;
    }

    void check(const Kernels &k, const Kernels &scalar) const {
        const std::vector<float> got = run(k, 0, rows), wanted = run(scalar, 0, rows);
        for (size_t i = 0; i < got.size(); ++i) require(close(got[i], wanted[i], 1.0f), "attention", k.name);
        for (int64_t r = 0; r < rows; ++r) {
            const float *together = &got[size_t(r * group * dim)];
            const size_t bytes = size_t(group * dim) * 4;
            require(std::memcmp(run(k, r, 1).data(), together, bytes) == 0, "row alone", k.name);
            require(std::memcmp(run_in_parts(k, r).data(), together, bytes) == 0, "spans in parts", k.name);
        }
    }
};

void check_attention(const Kernels &k, const Kernels &scalar) {
    for (int round = 0; round < 24; ++round) {
        const int64_t block_size = 16 * between(1, 3), heads = between(1, 2), group = between(1, 5);
        const int64_t dim = round % 2 ? 16 * between(1, 6) : between(1, 70), length = between(1, 700);
        const int64_t rows = std::min(length, between(1, kQueryTile)), window = round % 3 ? 0 : between(1, 300);
        Sequence(k, length, rows, block_size, heads, group, dim, window, round % 5 ? 0.0f : 10.0f,
                 KvType(round / 2 % kNumKvTypes))
            .check(k, scalar);
    }
    // Lengths around the ends of sub-blocks, blocks, tiles and spans: there the next tile is asked for, or is not there.
    for (const int64_t end : {16, 48, 64, 96, 128, 192, 256, 320, 512})
        for (const int64_t length : {end - 1, end, end + 1})
            for (const int64_t block_size : {16, 48, 64, 96})
                for (const KvType type : {KvType::kFloat32, KvType::kFloat16, KvType::kInt8, KvType::kInt4}) {
                    const int64_t rows = std::min(length, between(0, 1) ? int64_t(1) : between(2, 6));
                    Sequence(k, length, rows, block_size, 1, between(1, 3), between(0, 1) ? 16 : 20, 0, 0.0f, type)
                        .check(k, scalar);
                }
}

// Known tokens with a random tree of drafts after them: row 0 is the last known token's, drafts follow.
struct Tree {
    int64_t known, block_size, dim, group, window;
    KvType type;
    std::vector<int32_t> parents{-1}, positions;
    std::vector<float> keys, values, q;

    Tree(int64_t known_, int64_t drafts, int64_t block_size_, int64_t dim_, int64_t group_, int64_t window_, KvType type_)
        : known(known_), block_size(block_size_), dim(dim_), group(group_), window(window_), type(type_),
          positions{int32_t(known - 1)} {
        for (int64_t tries = 0; tries < drafts; ++tries) {
            const int64_t row = int64_t(parents.size());
            const int32_t parent = int32_t(between(0, 2) ? between(0, row - 1) : row - 1);
            const int32_t position = positions[size_t(parent)] + 1;
            const bool there = std::find(positions.begin(), positions.end(), position) != positions.end();
            if (type == KvType::kInt4 && position % kSubBlock == 0 && there) continue;
            parents.push_back(parent);
            positions.push_back(position);
        }
        const int64_t tokens = known + rows() - 1;
        keys = floats(tokens * dim), values = floats(tokens * dim), q = floats(rows() * group * dim);
    }

    int64_t rows() const { return int64_t(parents.size()); }

    // Token i (of the known ones, then of the drafts) at `position`, in the slot that `place` has.
    void write(const Kernels &k, Cache &cache, int64_t token, int64_t place, int64_t position) const {
        k.kv_write(cache.view, cache.slot(place), cache.slot(position), 0, &keys[size_t(token * dim)],
                   &values[size_t(token * dim)]);
    }

    std::vector<float> run(const Kernels &k, const Cache &cache, int64_t row, int64_t rows, int64_t position,
                           const TreeRows *tree) const {
        std::vector<float> out(size_t(rows * group * dim), NAN);
        check::Bytes scratch(size_t(attention_scratch_elements(group, dim, dim, type)) * 4);
        AttentionArgs a{};
        a.kv = &cache.view, a.block_table = cache.table.data(), a.group = group;
        a.q = &q[size_t(row * group * dim)], a.q_stride = group * dim, a.rows = rows, a.tree = tree;
        a.position = position, a.window = window, a.scale = 0.3f, a.span_end = 1 << 20;
        a.out = out.data(), a.out_stride = group * dim, a.scratch = reinterpret_cast<float *>(scratch.data());
        k.attention(a);
        return out;
    }

    // A row's context as a chain in a cache of its own.
    std::vector<float> alone(const Kernels &k, int64_t row) const {
        const int64_t position = positions[size_t(row)];
        Cache cache(position / block_size + 1, block_size, 1, dim, type);
        std::vector<int64_t> path;
        for (int64_t at = row; at > 0; at = parents[size_t(at)]) path.insert(path.begin(), known + at - 1);
        for (int64_t t = 0; t < known; ++t) write(k, cache, t, t, t);
        for (size_t i = 0; i < path.size(); ++i) write(k, cache, path[i], known + int64_t(i), known + int64_t(i));
        return run(k, cache, row, 1, position, nullptr);
    }

    void check(const Kernels &k) const {
        int64_t first = rows(), begin = INT64_MAX;
        for (int64_t r = rows() - 1; r > 0; --r)
            if (parents[size_t(r)] != r - 1)
                first = r, begin = std::min<int64_t>(begin, positions[size_t(parents[size_t(r)])] + 1);
        if (first == rows()) return;
        Cache cache((known + rows() - 2) / block_size + 1, block_size, 1, dim, type);
        std::vector<int64_t> slots;
        for (int64_t t = 0; t < known; ++t) write(k, cache, t, t, t);
        for (int64_t r = 0; r < rows(); ++r) {
            slots.push_back(cache.slot(known - 1 + r));
            if (r > 0) write(k, cache, known + r - 1, known + r - 1, positions[size_t(r)]);
        }
        const TreeRows tree{parents.data(), positions.data(), slots.data(), 1, first, begin};
        const std::vector<float> got = run(k, cache, first, rows() - first, 0, &tree);
        for (int64_t r = first; r < rows(); ++r) {
            const float *together = &got[size_t((r - first) * group * dim)];
            require(std::memcmp(alone(k, r).data(), together, size_t(group * dim) * 4) == 0, "row of a tree", k.name);
        }
    }
};

void check_trees(const Kernels &k) {
    for (int round = 0; round < 120; ++round) {
        const int64_t known = between(1, 4) == 1 ? between(1, 600) : 64 * between(1, 8) + between(-20, 2);
        const int64_t dim = round % 2 ? 16 * between(1, 6) : between(1, 70), window = between(0, 2) ? 0 : between(1, 300);
        const KvType type = KvType(round / 2 % kNumKvTypes);
        Tree(known, between(2, kQueryTile), 16 * between(1, 3), dim, between(1, 5), window, type).check(k);
    }
}

void check_roofline(const Kernels &k, const Kernels &scalar) {
    for (int round = 0; round < 10; ++round) {
        check::Bytes data(size_t(256 * between(0, 20)));
        const int64_t size = int64_t(data.size());
        require(k.read_sum(data.data(), size) == scalar.read_sum(data.data(), size), "read_sum", k.name);
    }
    int32_t integer = 0;
    float floating = 0;
    require(k.integer_peak(100, &integer) > 0 && k.float_peak(100, &floating) > 0, "peaks", k.name);
    require(floating > 0, "float_peak", k.name);
}

}  // namespace

int main() {
    const Kernels &scalar = choose_kernels("scalar");
    for (const std::string &name : available_isas()) {
        const Kernels &kernels = choose_kernels(name);
        check_linear(kernels, scalar);
        check_quantize(kernels);
        check_rows(kernels, scalar);
        check_attention(kernels, scalar);
        check_trees(kernels);
        check_roofline(kernels, scalar);
        std::printf("%s: kernels checked\n", name.c_str());
    }
    return 0;
}
