// The machine's limits, measured.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <stdexcept>
#include <utility>

#include "runtime/isa.h"
#include "runtime/roofline.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace kvarn;

namespace {

using Bytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Pair = std::pair<double, double>;

Pair pair(Work work) { return {work.amount, work.seconds}; }

void check(int64_t iterations) {
    if (iterations < 1) throw std::invalid_argument("iterations must be at least 1");
}

}  // namespace

void bind_roofline(nb::module_ &m) {
    m.def("read_sum", [](const std::string &isa, const Bytes &data) {
        if (data.size() % 256 != 0) throw std::invalid_argument("data must be a multiple of 256 bytes");
        return choose_kernels(isa).read_sum(data.data(), int64_t(data.size()));
    }, "isa"_a, "data"_a, "Sum of little-endian 32-bit words modulo 2^32, by the kernel that measures bandwidth.");
    nb::class_<Roofline>(m, "Roofline", "Limits of one instruction set. Each call returns (amount, seconds).")
        .def("__init__", [](Roofline *self, const std::string &isa, size_t bytes, Pool &pool) {
            const Kernels &kernels = choose_kernels(isa);
            nb::gil_scoped_release release;
            new (self) Roofline(kernels, bytes, pool);
        }, "isa"_a, "bytes"_a, "pool"_a)
        .def("read", [](Roofline &r, Pool &pool) { return pair(r.read(pool)); }, "pool"_a,
             nb::call_guard<nb::gil_scoped_release>(), "One pass over the buffer: bytes.")
        .def("integer", [](Roofline &r, Pool &pool, int64_t iterations, int items) {
            check(iterations);
            return pair(r.integer(pool, iterations, items));
        }, "pool"_a, "iterations"_a, "items"_a, nb::call_guard<nb::gil_scoped_release>(), "Multiply-adds of bytes.")
        .def("floating", [](Roofline &r, Pool &pool, int64_t iterations, int items) {
            check(iterations);
            return pair(r.floating(pool, iterations, items));
        }, "pool"_a, "iterations"_a, "items"_a, nb::call_guard<nb::gil_scoped_release>(), "Multiply-adds of float32.");
}
