// Formats, pool, weights, vectors, rotary tables, KV cache.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <tuple>

#include "runtime/attention_stage.h"
#include "runtime/isa.h"
#include "runtime/pool.h"
#include "runtime/storage.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvarn;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using WritableBytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ByteView = nb::ndarray<nb::numpy, const uint8_t, nb::ndim<1>, nb::c_contig>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using LayerShape = std::tuple<int64_t, int64_t, int64_t>;

Format format_of(const std::string &name) {
    for (int i = 0; i < kNumFormats; ++i)
        if (name == kTraits[i].name) return Format(i);
    throw std::invalid_argument("no packed form of " + name);
}

std::shared_ptr<PackedWeight> pack(const std::string &format, int64_t rows, int64_t cols, const Bytes &data,
                                   Pool &pool, std::shared_ptr<Pages> arena, size_t offset) {
    const Format f = format_of(format);
    const FormatTraits &t = traits(f);
    if (rows < 1 || cols < 1 || data.size() != size_t(rows) * (size_t(cols) / t.block_size) * t.block_bytes)
        throw std::invalid_argument("a " + format + " tensor of " + std::to_string(rows) + " x " +
                                    std::to_string(cols) + " does not take " + std::to_string(data.size()) + " bytes");
    nb::gil_scoped_release release;
    return std::make_shared<PackedWeight>(f, rows, cols, data.data(), pool, std::move(arena), offset);
}

std::shared_ptr<PackedWeight> mapped_weight(const std::string &format, int64_t rows, int64_t cols,
                                            std::shared_ptr<MappedFile> file, size_t offset) {
    return std::make_shared<PackedWeight>(format_of(format), rows, cols, std::move(file), offset);
}

// A view of memory that lives as long as `owner`.
ByteView view(const uint8_t *data, size_t size, nb::handle owner) { return ByteView(data, {size}, owner); }

std::vector<KvCache::Layer> layers_of(const std::vector<LayerShape> &shapes) {
    std::vector<KvCache::Layer> layers;
    for (const auto &[heads, key_dim, value_dim] : shapes) {
        if (heads < 1 || key_dim < 1 || value_dim < 1) throw std::invalid_argument("a KV layer has positive extents");
        layers.push_back({heads, key_dim, value_dim});
    }
    return layers;
}

void require_bytes(size_t given, const KvCache &kv) {
    if (given != kv.block_bytes())
        throw std::invalid_argument("a block has " + std::to_string(kv.block_bytes()) + " bytes, not " +
                                    std::to_string(given));
}

}  // namespace

void bind_storage(nb::module_ &m) {
    m.def("available_isas", &available_isas, "Names of the instruction sets that run here, best first.");
    m.def("packed_bytes", [](const std::string &format, int64_t rows, int64_t cols) {
        return size_t(num_panels(rows)) * panel_bytes(format_of(format), cols);
    }, "format"_a, "rows"_a, "cols"_a, "Bytes of a packed matrix.");
    m.def("quant_bytes", &quant_bytes, "rows"_a, "cols"_a, "Bytes of int8 activations with their scales and sums.");
    m.def("kv_bytes", [](const std::vector<LayerShape> &layers, int64_t num_blocks, int64_t block_size,
                         const std::string &type) {
        return KvCache::bytes(layers_of(layers), num_blocks, block_size, kv_type_of(type));
    }, "slots"_a, "num_blocks"_a, "block_size"_a, "type"_a, "Bytes of a KV cache.");
    m.attr("KEY_SPAN") = kKeySpan;

    nb::class_<Pool>(m, "Pool", "Threads that run step plans; the caller of a run is one of them.")
        .def(nb::init<int, const std::vector<std::vector<int>> &>(), "threads"_a, "pins"_a)
        .def_prop_ro("threads", &Pool::threads);
    m.def("trim_heap", &trim_heap, "Gives memory that was freed back to the system, where there is a way to.");
    m.attr("PACKED_LAYOUT") = kPackedLayout;

    nb::class_<Pages>(m, "Pages", "Zeroed memory for packed matrices, in large pages where the system has them.")
        .def(nb::init<size_t>(), "nbytes"_a);
    nb::class_<MappedFile>(m, "MappedFile", "A file mapped read-only.")
        .def(nb::init<int>(), "fd"_a)
        .def_prop_ro("nbytes", &MappedFile::size);
    nb::class_<PackedWeight>(m, "PackedWeight", "A matrix or table in the form kernels read. Owns its memory, or shares a mapped file's.")
        .def_prop_ro("nbytes", &PackedWeight::bytes)
        .def_prop_ro("data", [](nb::handle_t<PackedWeight> self) {
            const PackedWeight &weight = nb::cast<const PackedWeight &>(self);
            return view(weight.matrix().data, weight.bytes(), self);
        }, "A view of its panels.")
        .def_prop_ro("shape", [](const PackedWeight &w) { return std::make_pair(w.matrix().rows, w.matrix().cols); });
    m.def("pack", &pack, "format"_a, "rows"_a, "cols"_a, "data"_a, "pool"_a, "arena"_a.none() = nb::none(),
          "offset"_a = 0,
          "Packs a stored row-major tensor, into an arena where there is one. Raises ValueError where the sizes disagree.");
    m.def("mapped_weight", &mapped_weight, "format"_a, "rows"_a, "cols"_a, "file"_a, "offset"_a,
          "A matrix that was packed before. Raises ValueError where it does not lie within the file.");
    nb::class_<Vector>(m, "Vector", "float32 parameters.")
        .def("__init__", [](Vector *self, const Floats &values) {
            new (self) Vector{std::vector<float>(values.data(), values.data() + values.size())};
        }, "values"_a)
        .def_prop_ro("data", [](nb::handle_t<Vector> self) {
            const Vector &v = nb::cast<const Vector &>(self);
            return view(reinterpret_cast<const uint8_t *>(v.values.data()), 4 * v.values.size(), self);
        }, "A view of its bytes.")
        .def("__len__", [](const Vector &v) { return v.values.size(); });
    nb::class_<RotaryTable>(m, "RotaryTable", "cos and sin of each position, (positions, 2, pairs).")
        .def("__init__", [](RotaryTable *self, const Table &t, bool interleaved) {
            if (t.shape(1) != 2) throw std::invalid_argument("a rotary table is (positions, 2, pairs)");
            new (self) RotaryTable{std::vector<float>(t.data(), t.data() + t.size()), int64_t(t.shape(0)),
                                   int64_t(t.shape(2)), interleaved};
        }, "values"_a, "interleaved"_a);
    nb::class_<KvCache>(m, "KvCache", "Keys and values by blocks, with a slot for each layer of a KV group.")
        .def("__init__", [](KvCache *self, const std::vector<LayerShape> &layers, int64_t num_blocks,
                            int64_t block_size, const std::string &type) {
            new (self) KvCache(layers_of(layers), num_blocks, block_size, kv_type_of(type));
        }, "slots"_a, "num_blocks"_a, "block_size"_a, "type"_a)
        .def_prop_ro("nbytes", [](const KvCache &kv) { return kv.bytes(); })
        .def_prop_ro("block_bytes", &KvCache::block_bytes)
        .def("commit", &KvCache::commit, nb::call_guard<nb::gil_scoped_release>())
        .def("copy", &KvCache::copy, "pairs"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("move", &KvCache::move, "pairs"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("read", [](const KvCache &kv, int64_t block, const WritableBytes &out) {
            require_bytes(out.size(), kv);
            kv.read(block, out.data());
        }, "block"_a, "out"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("write", [](KvCache &kv, int64_t block, const Bytes &data) {
            require_bytes(data.size(), kv);
            kv.write(block, data.data());
        }, "block"_a, "data"_a, nb::call_guard<nb::gil_scoped_release>());
}
