// Activations to int8: symmetric, one scale for each group of 32 of a row.
#include "kernels_internal.h"
#include "vec.h"

KVARN_KERNELS_BEGIN

// The largest magnitude is compared as bits, so that a NaN or an infinity wins and makes the group's scale NaN or
// infinite: a broken activation shows in the result instead of turning into a number.
void quantize_groups(const float *x, int64_t row, int64_t group_begin, int64_t group_end, const QuantRows &out) {
    const int64_t groups = out.groups();
    for (int64_t g = group_begin; g < group_end; ++g, x += kGroup) {
        const F a = load(x), b = load(x + 16);
        const int32_t bits = reduce_max_i(max_i(abs_bits(a), abs_bits(b)));
        float largest;
        std::memcpy(&largest, &bits, 4);
        const float scale = largest / 127.0f;
        const F inverse = set(scale >= 1e-38f ? 127.0f / largest : 0.0f);
        const I low = to_int(mul(a, inverse)), high = to_int(mul(b, inverse));
        int8_t *q = out.q + row * out.cols + g * kGroup;
        store_i8(q, low);
        store_i8(q + 16, high);
        const int32_t sum0 = reduce_add_i(low), sum1 = reduce_add_i(high);
        out.scale[row * groups + g] = scale;
        out.sum[row * groups + g] = scale * float(sum0 + sum1);
        out.half[row * 2 * groups + 2 * g] = sum0;
        out.half[row * 2 * groups + 2 * g + 1] = sum1;
    }
}

void quantize(const float *x, int64_t x_stride, int64_t rows, int64_t row_begin, const QuantRows &out) {
    for (int64_t r = 0; r < rows; ++r) quantize_groups(x + r * x_stride, row_begin + r, 0, out.groups(), out);
}

KVARN_KERNELS_END
