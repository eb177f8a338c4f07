// RMS norm (Zhang & Sennrich 2019) and layer norm (Ba et al. 2016) of the spans of a row.
#include "kernels_internal.h"
#include "vec.h"

KVARN_KERNELS_BEGIN
namespace {

// Sums f over a span: lane i takes elements i, i + 16, …; then the lanes' tree. Lanes beyond `width` add nothing.
template <class Term>
inline float sum(int64_t width, Term term) {
    F total = zero();
    for (int64_t i = 0; i < width; i += kLanes) total = term(i, width - i, total);
    return reduce_add(total);
}

}  // namespace

void norm(const NormArgs &a) {
    for (int64_t s = 0; s < a.groups; ++s) {
        const float *x = a.x + s * a.width;
        float *out = a.out + s * a.width;
        float mean = 0.0f;
        if (a.layer)
            mean = sum(a.width, [&](int64_t i, int64_t n, F t) { return add(t, load_n(x + i, n)); }) / float(a.width);
        const F center = set(mean);
        const float squares = sum(a.width, [&](int64_t i, int64_t n, F t) {
            const F d = select(first(n), sub(load_n(x + i, n), center), zero());
            return fma(d, d, t);
        });
        const F inverse = set(1.0f / std::sqrt(squares / float(a.width) + a.eps));
        for (int64_t i = 0; i < a.width; i += kLanes) {
            const int64_t n = a.width - i;
            F y = mul(mul(sub(load_n(x + i, n), center), inverse), load_n(a.weight + i, n));
            if (a.bias) y = add(y, load_n(a.bias + i, n));
            store_n(out + i, y, n);
        }
    }
}

KVARN_KERNELS_END
