#include "runtime/stage.h"

#include <algorithm>

namespace kvarn {

size_t quant_bytes(int64_t rows, int64_t cols) {
    const size_t groups = size_t(rows * (cols / kGroup));
    return round_up(size_t(rows * cols), 64) + 2 * round_up(groups * 4, 64) + round_up(groups * 8, 64);
}

QuantRows quant_rows(uint8_t *place, int64_t rows, int64_t cols) {
    const size_t groups = size_t(rows * (cols / kGroup));
    QuantRows r{};
    r.cols = cols;
    r.q = reinterpret_cast<int8_t *>(place);
    place += round_up(size_t(rows * cols), 64);
    r.scale = reinterpret_cast<float *>(place);
    place += round_up(groups * 4, 64);
    r.sum = reinterpret_cast<float *>(place);
    place += round_up(groups * 4, 64);
    r.half = reinterpret_cast<int32_t *>(place);
    return r;
}

uint32_t RowStage::items(const Step &step) const {
    if (skip(step)) return 0;
    return uint32_t(std::min<int64_t>(rows_of(step, outputs_), 4 * threads()));
}

void RowStage::run(const Step &step, uint32_t item, Scratch &) noexcept {
    const int64_t rows = rows_of(step, outputs_), count = items(step);
    for (int64_t r = rows * item / count; r < rows * (item + 1) / count; ++r) row(step, r);
}

}  // namespace kvarn
