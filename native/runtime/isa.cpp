#include "runtime/isa.h"

#include <stdexcept>

namespace kvarn {
namespace {

struct Isa {
    const char *name;
    bool (*runs_here)();
    const Kernels &(*kernels)();
};

// Best first. __builtin_cpu_supports also asks the operating system whether it saves the registers.
constexpr Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
     },
     avx512::kernels},
    // F16C has no name for __builtin_cpu_supports in older compilers; every processor with AVX2 has it.
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::kernels},
#endif
    {"scalar", [] { return true; }, scalar::kernels},
};

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa &isa : kIsas)
        if (isa.runs_here()) names.push_back(isa.name);
    return names;
}

const Kernels &choose_kernels(const std::string &name) {
    for (const Isa &isa : kIsas)
        if (isa.runs_here() && (name.empty() || name == isa.name)) return isa.kernels();
    std::string known;
    for (const std::string &available : available_isas()) known += (known.empty() ? "" : ", ") + available;
    throw std::invalid_argument("instruction set '" + name + "' is not available; this machine runs: " + known);
}

}  // namespace kvarn
