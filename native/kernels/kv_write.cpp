// Stores one token's key and value of one head in its slot of the cache.
#include "kernels_internal.h"
#include "vec.h"

KVARN_KERNELS_BEGIN
namespace {

constexpr float kLargestHalf = 65504.0f, kLargestFloat = 3.4028235e38f;

// What the cache holds is finite: a masked key's weight is 0, and 0 times an infinity would reach rows that do not see
// the key. Values beyond the type's range become its largest, NaN becomes 0.
inline F clamp(F x, float largest) {
    const F size = abs(x);
    const F bounded = select(less(size, set(INFINITY)), min(size, set(largest)),
                             select(less(set(largest), size), set(largest), zero()));
    return copy_sign(bounded, x);
}

// Elements of a vector as they are stored.
struct ToFloat {
    using Element = float;
    ToFloat(const float *, int64_t) {}
    void operator()(F x, float *lanes) const { store(lanes, clamp(x, kLargestFloat)); }
};
struct ToHalf {
    using Element = uint16_t;
    ToHalf(const float *, int64_t) {}
    void operator()(F x, uint16_t *lanes) const { store_f16(lanes, clamp(x, kLargestHalf)); }
};
struct ToInt8 {
    using Element = int8_t;
    float scale, inverse;
    ToInt8(const float *x, int64_t dim) {
        F most = zero();
        for (int64_t i = 0; i < dim; i += kLanes) most = max(most, abs(clamp(load_n(x + i, dim - i), kLargestFloat)));
        const float largest = reduce_max(most);
        scale = largest / 127.0f;
        inverse = scale > 1e-38f ? 127.0f / largest : 0.0f;
    }
    void operator()(F x, int8_t *lanes) const { store_i8(lanes, to_int(mul(clamp(x, kLargestFloat), set(inverse)))); }
};

// Element i of x goes to to[i * stride]. Returns what it was stored with.
template <class To>
To write_vector(const float *x, int64_t dim, typename To::Element *to, int64_t stride) {
    const To convert(x, dim);
    typename To::Element lanes[kLanes];
    for (int64_t i = 0; i < dim; i += kLanes) {
        convert(load_n(x + i, dim - i), lanes);
        for (int64_t j = 0; j < kLanes && i + j < dim; ++j) to[stride * (i + j)] = lanes[j];
    }
    return convert;
}

template <class To>
void write(const KvLayerView &kv, uint8_t *head, int64_t offset, const float *k, const float *v) {
    auto *to = reinterpret_cast<typename To::Element *>(head);
    const To key = write_vector<To>(k, kv.key_dim, to + offset / 16 * 16 * kv.key_dim + offset % 16, 16);
    const To value = write_vector<To>(v, kv.value_dim, to + kv.block_size * kv.key_dim + offset * kv.value_dim, 1);
    if constexpr (std::is_same_v<To, ToInt8>) {
        auto *scales = reinterpret_cast<float *>(head + kv.vectors_bytes());
        scales[offset] = key.scale;
        scales[kv.block_size + offset] = value.scale;
    }
}

}  // namespace

void kv_write(const KvLayerView &kv, int64_t slot, int64_t head, const float *k, const float *v) {
    const int64_t offset = slot % kv.block_size;
    uint8_t *base = kv.head(slot / kv.block_size, head);
    switch (kv.type) {
        case KvType::kFloat32: return write<ToFloat>(kv, base, offset, k, v);
        case KvType::kFloat16: return write<ToHalf>(kv, base, offset, k, v);
        case KvType::kInt8: return write<ToInt8>(kv, base, offset, k, v);
    }
}

KVARN_KERNELS_END
