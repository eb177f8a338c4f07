// The Python module: each family of functions binds itself in a file of its own.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

void bind_roofline(nb::module_ &m);
void bind_runtime(nb::module_ &m);
void bind_sampling(nb::module_ &m);

NB_MODULE(_native, m) {
    m.doc() = "kvarn's native code: kernels, step plans and sampling for CPUs.";
    bind_runtime(m);
    bind_roofline(m);
    bind_sampling(m);
}
