// Activations to int8: symmetric, one scale for each group of 32 of a row.
#include "kernels_internal.h"
#include "vec.h"

KVARN_KERNELS_BEGIN

namespace {

// The largest magnitude is compared as bits, so that a NaN or an infinity wins and makes the group's scale NaN or
// infinite: a broken activation shows in the result instead of turning into a number.
template <int tile>
inline void quantize_group(const float *x, int lane, QuantGroup<tile> &out) {
    const F a = load(x), b = load(x + 16);
    const int32_t bits = reduce_max_i(max_i(abs_bits(a), abs_bits(b)));
    float largest;
    std::memcpy(&largest, &bits, 4);
    const float scale = largest / 127.0f;
    const F inverse = set(scale >= 1e-38f ? 127.0f / largest : 0.0f);
    const I low = to_int(mul(a, inverse)), high = to_int(mul(b, inverse));
    store_i8(out.q[lane], low);
    store_i8(out.q[lane] + 16, high);
    const int32_t sum0 = reduce_add_i(low), sum1 = reduce_add_i(high);
    out.scale[lane] = scale;
    out.sum[lane] = scale * float(sum0 + sum1);
    out.half[0][lane] = sum0;
    out.half[1][lane] = sum1;
}

}  // namespace

void quantize_groups(const float *x, int64_t row, int64_t group_begin, int64_t group_end, const QuantRows &out) {
    for (int64_t g = group_begin; g < group_end; ++g, x += kGroup) {
        if (out.single)
            quantize_group<1>(x, 0, reinterpret_cast<QuantGroup<1> *>(out.data)[g]);
        else
            quantize_group<kTileTokens>(
                x, int(row % kTileTokens),
                reinterpret_cast<QuantGroup<kTileTokens> *>(out.data)[row / kTileTokens * out.groups() + g]);
    }
}

KVARN_KERNELS_END
