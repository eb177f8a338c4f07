#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_storage(nb::module_ &m);
void bind_plan(nb::module_ &m);

void bind_runtime(nb::module_ &m) {
    bind_storage(m);
    bind_plan(m);
}
