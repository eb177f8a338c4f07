// Activations, their gated forms, sums and soft caps: each element by itself, tails under a mask.
#include "kernels_internal.h"
#include "vec.h"

KVARN_KERNELS_BEGIN
namespace {

// x / (1 + e^-x)
inline F silu(F x) { return div(x, add(set(1.0f), exp(sub(zero(), x)))); }

// x/2 (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3)  (Hendrycks & Gimpel 2016)
inline F gelu_tanh(F x) {
    const F x2 = mul(x, x);
    const F u = mul(mul(x, fma(x2, set(0.044715f), set(1.0f))), set(-2.0f * 0.7978845608028654f));
    return div(x, add(set(1.0f), exp(u)));
}

// erf by Abramowitz & Stegun 7.1.26's form with t = 1 / (1 + p|x|); absolute error below 2e-7.
inline F erf(F x) {
    const F z = abs(x);
    const F t = div(set(1.0f), fma(z, set(0.3275911f), set(1.0f)));
    F p = set(1.061405429f);
    p = fma(p, t, set(-1.453152027f));
    p = fma(p, t, set(1.421413741f));
    p = fma(p, t, set(-0.284496736f));
    p = fma(p, t, set(0.254829592f));
    return copy_sign(sub(set(1.0f), mul(mul(p, t), exp(sub(zero(), mul(z, z))))), x);
}

inline F gelu(F x) { return mul(mul(x, set(0.5f)), add(set(1.0f), erf(mul(x, set(0.70710678118654752f))))); }

inline F relu(F x) { return max(zero(), x); }

template <class Body>
inline void over(int64_t n, Body body) {
    for (int64_t i = 0; i < n; i += kLanes) body(i, n - i);
}

// Calls use(f) with the function itself, so that loops are compiled for each.
template <class Use>
inline void with(Function f, Use use) {
    switch (f) {
        case Function::kSilu: return use([](F x) { return silu(x); });
        case Function::kGelu: return use([](F x) { return gelu(x); });
        case Function::kGeluTanh: return use([](F x) { return gelu_tanh(x); });
        case Function::kRelu: return use([](F x) { return relu(x); });
    }
}

}  // namespace

void activation(Function f, const float *x, float *out, int64_t n) {
    with(f, [=](auto function) {
        over(n, [=](int64_t i, int64_t rest) { store_n(out + i, function(load_n(x + i, rest)), rest); });
    });
}

void gated(Function f, const float *gate, const float *up, float *out, int64_t n) {
    with(f, [=](auto function) {
        over(n, [=](int64_t i, int64_t rest) {
            store_n(out + i, mul(function(load_n(gate + i, rest)), load_n(up + i, rest)), rest);
        });
    });
}

void add_rows(const float *a, const float *b, float *out, int64_t n) {
    over(n, [=](int64_t i, int64_t rest) { store_n(out + i, add(load_n(a + i, rest), load_n(b + i, rest)), rest); });
}

void scale_cap(float scale, float softcap, float *x, int64_t n) {
    over(n, [=](int64_t i, int64_t rest) {
        F y = mul(load_n(x + i, rest), set(scale));
        if (softcap > 0) y = mul(tanh(div(y, set(softcap))), set(softcap));
        store_n(x + i, y, rest);
    });
}

KVARN_KERNELS_END
