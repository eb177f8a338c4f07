// Random matrices as files store them.
#pragma once
#include <cstring>

#include "check.h"
#include "kvarn/half.h"
#include "runtime/pack.h"

namespace check {

using namespace kvarn;

// Stored bytes of a format with sane scales: every fp16 field that comes first in a block is made small and finite.
inline std::vector<uint8_t> stored_matrix(Format f, int64_t rows, int64_t cols) {
    const FormatTraits &t = traits(f);
    std::vector<uint8_t> data(size_t(rows) * stored_row_bytes(f, cols));
    if (t.block_size == 1) {
        const std::vector<float> values = floats(rows * cols, 0.1f);
        for (size_t i = 0; i < values.size(); ++i) {
            uint32_t bits;
            std::memcpy(&bits, &values[i], 4);
            const uint16_t half = f == Format::F16 ? float_to_half(values[i]) : uint16_t(bits >> 16);
            if (f == Format::F32)
                std::memcpy(&data[4 * i], &bits, 4);
            else
                std::memcpy(&data[2 * i], &half, 2);
        }
        return data;
    }
    for (uint8_t &byte : data) byte = uint8_t(random()());
    const uint16_t scale = float_to_half(0.01f);
    for (size_t b = 0; b < data.size(); b += size_t(t.block_bytes)) {
        const size_t at = f == Format::Q2_K ? 80 : f == Format::Q3_K ? 108 : f == Format::Q6_K ? 208 : 0;
        std::memcpy(&data[b + at], &scale, 2);
        if (t.scales == Scales::kAffine32 || t.scales == Scales::kSuper32 || t.scales == Scales::kSuper16)
            std::memcpy(&data[b + at + 2], &scale, 2);
    }
    return data;
}

}  // namespace check
