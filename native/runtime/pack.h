// Stored tensors to packed matrices (kvarn/formats.h) and single rows back. Pure functions of their arguments.
#pragma once
#include "kvarn/formats.h"

namespace kvarn {

// Bytes of a stored row; cols is a multiple of the format's block.
constexpr size_t stored_row_bytes(Format f, int64_t cols) {
    return size_t(cols) / traits(f).block_size * traits(f).block_bytes;
}

// Packs panels [panel_begin, panel_end) of a stored row-major matrix into `packed`, which holds all of its panels.
// source: rows * stored_row_bytes. packed: num_panels(rows) * panel_bytes, zeroed.
void pack_panels(Format f, int64_t rows, int64_t cols, const uint8_t *source, uint8_t *packed, int64_t panel_begin,
                 int64_t panel_end);

// One row as float32[cols], equal to the file's dequantization to the bit.
void unpack_row(const PackedMatrix &w, int64_t row, float *out);

}  // namespace kvarn
