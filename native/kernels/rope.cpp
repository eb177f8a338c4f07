// Rotary position embedding (Su et al. 2021) of one token's heads, with sine and cosine of its position given.
#include "kernels_internal.h"
#include "vec.h"

KVARN_KERNELS_BEGIN
namespace {

inline void rotate(F x, F y, F c, F s, F &x_out, F &y_out) {
    x_out = sub(mul(x, c), mul(y, s));
    y_out = add(mul(y, c), mul(x, s));
}

void rotate_halves(const float *x, float *out, int64_t pairs, const float *cos, const float *sin) {
    for (int64_t i = 0; i < pairs; i += kLanes) {
        const int64_t n = pairs - i;
        F a, b;
        rotate(load_n(x + i, n), load_n(x + pairs + i, n), load_n(cos + i, n), load_n(sin + i, n), a, b);
        store_n(out + i, a, n);
        store_n(out + pairs + i, b, n);
    }
}

void rotate_interleaved(const float *x, float *out, int64_t pairs, const float *cos, const float *sin) {
    for (int64_t i = 0; i < pairs; i += kLanes) {
        const int64_t n = pairs - i;
        F even, odd, a, b;
        deinterleave(load_n(x + 2 * i, 2 * n), n > 8 ? load_n(x + 2 * i + 16, 2 * n - 16) : zero(), even, odd);
        rotate(even, odd, load_n(cos + i, n), load_n(sin + i, n), even, odd);
        interleave(even, odd, a, b);
        store_n(out + 2 * i, a, 2 * n);
        if (n > 8) store_n(out + 2 * i + 16, b, 2 * n - 16);
    }
}

}  // namespace

void rope(const RopeArgs &a) {
    const float *cos = a.cos_sin, *sin = a.cos_sin + a.pairs;
    for (int64_t h = 0; h < a.heads; ++h) {
        const float *x = a.x + h * a.head_dim;
        float *out = a.out + h * a.head_dim;
        if (a.interleaved)
            rotate_interleaved(x, out, a.pairs, cos, sin);
        else
            rotate_halves(x, out, a.pairs, cos, sin);
        if (out != x)
            for (int64_t i = 2 * a.pairs; i < a.head_dim; ++i) out[i] = x[i];
    }
}

KVARN_KERNELS_END
