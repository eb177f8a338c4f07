// Runs one AVX2 kernel on fixed data, for instructions.py to count its instructions with callgrind.
//
// `count_kernels`: prints the compiler, its flags and the names of the kernels. `count_kernels NAME`: runs that kernel
// once to warm up (symbols are bound, pages are mapped) and once inside counted(), the function that callgrind collects.
#include <cstring>
#include <functional>
#include <numeric>
#include <string>

#include "check.h"
#include "kvarn/kernels.h"
#include "stored.h"

using namespace kvarn;
using check::floats;

extern "C" [[gnu::noinline]] void counted(const std::function<void()> &kernel) { kernel(); }

namespace {

const Kernels &kernels() { return avx2::kernels(); }

void run(const std::function<void()> &kernel) {
    kernel();
    counted(kernel);
}

void quantize(int64_t rows, int64_t cols) {
    const std::vector<float> x = floats(rows * cols);
    check::Bytes place(quant_bytes(rows, cols));
    const QuantRows quants{place.data(), cols, rows == 1};
    run([&] { kernels().quantize({x.data(), cols, 0, rows, 0, quants.groups(), quants}); });
}

void linear(Format format, int64_t rows, int64_t features, int64_t cols) {
    const std::vector<float> x = floats(rows * cols);
    check::Bytes place(quant_bytes(rows, cols));
    const QuantRows quants{place.data(), cols, rows == 1};
    kernels().quantize({x.data(), cols, 0, rows, 0, quants.groups(), quants});

    const std::vector<uint8_t> stored = check::stored_matrix(format, features, cols);
    check::Bytes packed(size_t(num_panels(features)) * panel_bytes(format, cols) + 64);
    std::memset(packed.data(), 0, packed.size());
    pack_panels(format, features, cols, stored.data(), packed.data(), 0, num_panels(features));
    const PackedMatrix w{format, features, cols, packed.data()};

    std::vector<float> out(size_t(rows * features));
    run([&] {
        kernels().linear({&w, 0, w.panels(), &quants, x.data(), cols, 0, rows, out.data(), features, 0, 0});
    });
}

// One KV head of an fp16 cache, in blocks of 16.
void attention(int64_t rows, int64_t position, int64_t group, int64_t dim) {
    KvLayerView kv{};
    kv.block_size = 16;
    kv.heads = 1;
    kv.key_dim = kv.value_dim = dim;
    kv.type = KvType::kFloat16;
    const int64_t length = position + rows, blocks = (length + kv.block_size - 1) / kv.block_size;
    check::Bytes memory(size_t(kv.block_bytes() * blocks) + 64);
    std::memset(memory.data(), 0, memory.size());
    kv.data = memory.data();
    std::vector<int32_t> table(static_cast<size_t>(blocks));
    std::iota(table.rbegin(), table.rend(), 0);
    const std::vector<float> keys = floats(length * dim), values = floats(length * dim), q = floats(rows * group * dim);
    for (int64_t t = 0; t < length; ++t) {
        const int64_t slot = table[size_t(t / kv.block_size)] * kv.block_size + t % kv.block_size;
        kernels().kv_write(kv, slot, slot, 0, &keys[size_t(t * dim)], &values[size_t(t * dim)]);
    }

    check::Bytes scratch(size_t(attention_scratch_elements(group, dim, dim, kv.type)) * sizeof(float));
    std::vector<float> out(size_t(rows * group * dim));
    AttentionArgs a{};
    a.kv = &kv;
    a.block_table = table.data();
    a.group = group;
    a.q = q.data();
    a.q_stride = a.out_stride = group * dim;
    a.rows = rows;
    a.position = position;
    a.scale = 0.125f;
    a.span_end = position / kKeySpan + 1;
    a.out = out.data();
    a.scratch = reinterpret_cast<float *>(scratch.data());
    run([&] { kernels().attention(a); });
}

// Shapes of Qwen2.5-1.5B (1536 wide) and SmolLM2-135M (576 wide, 3 query heads of 64 to a KV head).
struct Counted {
    const char *name;
    void (*run)();
};
constexpr Counted kCounted[] = {
    {"linear Q4_K 1x1536x1536", [] { linear(Format::Q4_K, 1, 1536, 1536); }},
    {"linear Q6_K 1x1536x1536", [] { linear(Format::Q6_K, 1, 1536, 1536); }},
    {"linear Q4_1 64x1536x576", [] { linear(Format::Q4_1, 64, 1536, 576); }},
    {"attention decode at 1023", [] { attention(1, 1023, 3, 64); }},
    {"attention prefill 32 at 480", [] { attention(32, 480, 3, 64); }},
    {"quantize 64x1536", [] { quantize(64, 1536); }},
};

}  // namespace

int main(int argc, char **argv) {
    if (argc < 2) {
        std::printf("compiler: %s\nflags: %s\n", KVARN_COMPILER, KVARN_COMPILER_FLAGS);
        for (const Counted &c : kCounted) std::printf("kernel: %s\n", c.name);
        return 0;
    }
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        std::fprintf(stderr, "this machine has no AVX2\n");
        return 1;
    }
    for (const Counted &c : kCounted)
        if (std::string(argv[1]) == c.name) {
            c.run();
            return 0;
        }
    std::fprintf(stderr, "no kernel is called '%s'\n", argv[1]);
    return 1;
}
