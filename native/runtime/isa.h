// Which instruction sets were compiled in, and which of them this machine runs.
#pragma once
#include <string>
#include <vector>

#include "kvarn/kernels.h"

namespace kvarn {

// Names of the ISAs that can run here, best first; "scalar" is always among them.
std::vector<std::string> available_isas();

// The kernels of an ISA. name "": the best available. Throws std::invalid_argument naming what is available.
const Kernels &choose_kernels(const std::string &name);

}  // namespace kvarn
