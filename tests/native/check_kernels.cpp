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

void check_linear(const Kernels &k, const Kernels &scalar) {
    for (int f = 0; f < kNumFormats; ++f) {
        const Format format = Format(f);
        const int64_t block = traits(format).block_size;
        for (int round = 0; round < 4; ++round) {
            const int64_t rows = between(1, 70), cols = block == 1 ? between(1, 90) : block * between(1, block == 32 ? 9 : 2);
            const int64_t count = between(1, 40);
            const std::vector<uint8_t> stored = stored_matrix(format, rows, cols);
            check::Bytes packed(size_t(num_panels(rows)) * panel_bytes(format, cols) + 64);
            std::memset(packed.data(), 0, packed.size());
            pack_panels(format, rows, cols, stored.data(), packed.data(), 0, num_panels(rows));
            const PackedMatrix w{format, rows, cols, packed.data()};
            std::vector<float> row(static_cast<size_t>(cols));
            for (int64_t r = 0; r < rows; ++r) unpack_row(w, r, row.data());

            const Rows in(k, floats(count * cols), count, cols, block > 1);
            const std::vector<float> whole = run_linear(k, w, in, count);
            const std::vector<float> tiles = run_linear(k, w, in, kTileTokens);
            require(std::memcmp(whole.data(), tiles.data(), whole.size() * 4) == 0, "rows in tiles", k.name);
            for (int64_t r = 0; r < count; ++r) {
                const std::vector<float> x(&in.x[size_t(r * cols)], &in.x[size_t(r * cols)] + cols);
                const std::vector<float> alone = run_linear(k, w, Rows(k, x, 1, cols, block > 1), 1);
                require(std::memcmp(alone.data(), &whole[size_t(r * rows)], alone.size() * 4) == 0, "row alone", k.name);
            }
            const std::vector<float> wanted = run_linear(scalar, w, in, count);
            for (size_t i = 0; i < whole.size(); ++i)
                require(close(whole[i], wanted[i], std::fabs(wanted[i])), "linear", k.name);
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

    Cache(int64_t blocks, int64_t block_size, int64_t heads, int64_t dim, bool half)
        : view{nullptr, block_size, heads, dim, dim, half}, memory(size_t(view.block_bytes() * blocks) + 64),
          table(size_t(blocks)) {
        std::memset(memory.data(), 0xff, memory.size());
        view.data = memory.data();
        for (size_t i = 0; i < table.size(); ++i) table[i] = int32_t(i);
        std::shuffle(table.begin(), table.end(), check::random());
    }
};

void check_attention(const Kernels &k, const Kernels &scalar) {
    for (int round = 0; round < 24; ++round) {
        const int64_t block_size = 16 * between(1, 3), heads = between(1, 2), group = between(1, 5);
        const int64_t dim = round % 2 ? 16 * between(1, 6) : between(1, 70), length = between(1, 700);
        const int64_t rows = std::min(length, between(1, kQueryTile)), window = round % 3 ? 0 : between(1, 300);
        Cache cache((length + block_size - 1) / block_size, block_size, heads, dim, round % 4 < 2);
        const std::vector<float> keys = floats(length * dim), values = floats(length * dim);
        for (int64_t h = 0; h < heads; ++h)
            for (int64_t t = 0; t < length; ++t)
                k.kv_write(cache.view, cache.table[size_t(t / block_size)] * block_size + t % block_size, h,
                           &keys[size_t(t * dim)], &values[size_t(t * dim)]);
        const std::vector<float> q = floats(rows * group * dim);
        check::Bytes scratch(size_t(attention_scratch_elements(group, dim, dim)) * 4);
        const auto run = [&](const Kernels &kernels, int64_t first, int64_t count) {
            std::vector<float> out(size_t(count * group * dim), NAN);
            AttentionArgs a{};
            a.kv = &cache.view, a.block_table = cache.table.data(), a.kv_head = heads - 1, a.group = group;
            a.q = &q[size_t(first * group * dim)], a.q_stride = group * dim, a.rows = count;
            a.position = length - rows + first, a.window = window, a.scale = 0.3f, a.softcap = round % 5 ? 0.0f : 10.0f;
            a.span_end = 1 << 20, a.out = out.data(), a.out_stride = group * dim;
            a.scratch = reinterpret_cast<float *>(scratch.data());
            kernels.attention(a);
            return out;
        };
        const std::vector<float> got = run(k, 0, rows), wanted = run(scalar, 0, rows);
        for (size_t i = 0; i < got.size(); ++i) require(close(got[i], wanted[i], 1.0f), "attention", k.name);
        for (int64_t r = 0; r < rows; ++r) {
            const std::vector<float> alone = run(k, r, 1);
            require(std::memcmp(alone.data(), &got[size_t(r * group * dim)], alone.size() * 4) == 0, "row alone", k.name);
        }
    }
}

}  // namespace

int main() {
    const Kernels &scalar = choose_kernels("scalar");
    for (const std::string &name : available_isas()) {
        const Kernels &kernels = choose_kernels(name);
        check_linear(kernels, scalar);
        check_rows(kernels, scalar);
        check_attention(kernels, scalar);
        std::printf("%s: kernels checked\n", name.c_str());
    }
    return 0;
}
