// Activations to int8: symmetric, one scale for each group of 32 of a row.
#include "kernels_internal.h"
#include "vec.h"

KVARN_KERNELS_BEGIN

namespace {

// A group that waits for others, so that divisions and conversions serve 16 at once.
template <int tile>
struct Place {
    const float *x;
    QuantGroup<tile> *group;
    int lane;
};

// Quantizes up to 16 groups, whose largest magnitudes are given as bits. They are compared as bits, so that a NaN or an
// infinity wins and makes the group's scale NaN or infinite: a broken activation shows in the result instead of turning
// into a number.
template <int tile>
void quantize_places(const Place<tile> *places, const float *largest, int count) {
    alignas(64) float scales[16], inverses[16], sums[16];
    const F most = load(largest), scale = div(most, set(127.0f));
    store(scales, scale);
    store(inverses, select(less(set(1e-38f), scale), div(set(127.0f), most), zero()));
    for (int i = 0; i < count; ++i) {
        const Place<tile> &p = places[i];
        QuantGroup<tile> &to = *p.group;
        const F inverse = set(inverses[i]);
        to.half[0][p.lane] = store_i8(to.q[p.lane], to_int(mul(load(p.x), inverse)));
        to.half[1][p.lane] = store_i8(to.q[p.lane] + 16, to_int(mul(load(p.x + 16), inverse)));
        sums[i] = float(to.half[0][p.lane] + to.half[1][p.lane]);
    }
    store(sums, mul(scale, load(sums)));
    for (int i = 0; i < count; ++i) {
        places[i].group->scale[places[i].lane] = scales[i];
        places[i].group->sum[places[i].lane] = sums[i];
    }
}

template <int tile>
void quantize_rows(const QuantizeArgs &a) {
    Place<tile> places[16];
    alignas(64) float largest[16] = {};
    int count = 0;
    for (int64_t r = a.row_begin; r < a.row_end; ++r) {
        auto *groups = reinterpret_cast<QuantGroup<tile> *>(a.out.data) + r / tile * a.out.groups();
        const float *x = a.x + (r - a.row_begin) * a.x_stride;
        for (int64_t g = a.group_begin; g < a.group_end; ++g, x += kGroup) {
            const int32_t bits = reduce_max_i(max_i(abs_bits(load(x)), abs_bits(load(x + 16))));
            std::memcpy(largest + count, &bits, 4);
            places[count] = {x, groups + g, int(r % tile)};
            if (++count == 16) {
                quantize_places(places, largest, count);
                count = 0;
            }
        }
    }
    if (count > 0) quantize_places(places, largest, count);
}

}  // namespace

void quantize(const QuantizeArgs &a) {
    if (a.out.single)
        quantize_rows<1>(a);
    else
        quantize_rows<kTileTokens>(a);
}

KVARN_KERNELS_END
