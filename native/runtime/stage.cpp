#include "runtime/stage.h"

#include <algorithm>

namespace kvarn {

uint32_t RowStage::items(const Step &step) const {
    if (skip(step)) return 0;
    return uint32_t(std::min<int64_t>(rows_of(step, outputs_), 4 * threads()));
}

void RowStage::run(const Step &step, uint32_t item, Scratch &) noexcept {
    const int64_t rows = rows_of(step, outputs_), count = items(step);
    for (int64_t r = rows * item / count; r < rows * (item + 1) / count; ++r) row(step, r);
}

}  // namespace kvarn
