// Stores one token's key and value of one head in its slot of the cache.
#include "hadamard.h"
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

// fp16 of x; x becomes what that is.
inline uint16_t to_half(float &x) {
    uint16_t halves[kLanes];
    float lanes[kLanes];
    store_f16(halves, clamp(set(x), kLargestHalf));
    store(lanes, load_f16(halves));
    x = lanes[0];
    return halves[0];
}

// One group of 32 floats within fp16 in int4.
struct Int4Group {
    uint16_t scale, minimum;
    int8_t codes[kGroup];

    explicit Int4Group(const float *x) {
        const F a = load(x), b = load(x + kLanes);
        const float largest = reduce_max(max(a, b));
        float least = -reduce_max(max(sub(zero(), a), sub(zero(), b)));
        minimum = to_half(least);
        float step = (largest - least) / 15.0f;
        scale = to_half(step);
        const F base = set(least), inverse = set(step > 0 ? 1.0f / step : 0.0f);
        const auto coded = [&](F v) { return to_int(min(max(mul(sub(v, base), inverse), zero()), set(15.0f))); };
        store_i8(codes, coded(a));
        store_i8(codes + kLanes, coded(b));
    }
};

// Rotated, coded as the difference from the first key of the sub-block of `place`.
void write_int4_key(const KvLayerView &kv, uint8_t *head, int64_t offset, uint8_t *place_head, int64_t place,
                    const float *k) {
    const int64_t groups = kv_groups(kv.key_dim), token = offset % kSubBlock;
    uint8_t *codes = head + (offset - token) * kv.vector_bytes(kv.key_dim) + token;
    uint16_t *scales = kv.int4_scales(head, offset).keys + token;
    uint16_t *reference = kv.int4_scales(place_head, place).reference;
    float part[kMostRotated];
    for (int64_t start = 0; start < groups * kGroup;) {
        const int64_t n = rotated_part(groups * kGroup - start);
        for (int64_t i = 0; i < n; i += kLanes) {
            const int64_t rest = kv.key_dim - start - i;
            store(part + i, rest > 0 ? clamp(load_n(k + start + i, rest), kLargestHalf) : zero());
        }
        rotate_part(part, n, false);
        for (int64_t i = 0; i < n; i += kLanes) {
            const F x = clamp(load(part + i), kLargestHalf);
            if (place % kSubBlock == 0) store_f16(reference + start + i, x);
            store(part + i, clamp(sub(x, load_f16(reference + start + i)), kLargestHalf));
        }
        for (int64_t i = 0; i < n; i += kGroup) {
            const Int4Group group(part + i);
            uint16_t *to = scales + (start + i) / kGroup * 2 * kSubBlock;
            to[0] = group.scale;
            to[kSubBlock] = group.minimum;
            uint8_t *rows = codes + (start + i) / 2 * kSubBlock;
            for (int64_t j = 0; j < kGroup / 2; ++j)
                rows[j * kSubBlock] = uint8_t(group.codes[2 * j] | group.codes[2 * j + 1] << 4);
        }
        start += n;
    }
}

void write_int4_value(const KvLayerView &kv, uint8_t *head, int64_t offset, const float *v) {
    uint8_t *codes = head + kv.block_size * kv.vector_bytes(kv.key_dim) + offset * kv.vector_bytes(kv.value_dim);
    uint16_t *scales = kv.int4_scales(head, offset).values + offset % kSubBlock * 2 * kv_groups(kv.value_dim);
    for (int64_t start = 0; start < kv.value_dim; start += kGroup, codes += kGroup / 2, scales += 2) {
        float part[kGroup];
        for (int64_t i = 0; i < kGroup; i += kLanes) {
            const int64_t rest = kv.value_dim - start - i;
            store(part + i, rest > 0 ? clamp(load_n(v + start + i, rest), kLargestHalf) : zero());
        }
        const Int4Group group(part);
        scales[0] = group.scale;
        scales[1] = group.minimum;
        for (int64_t j = 0; j < kLanes; ++j) codes[j] = uint8_t(group.codes[j] | group.codes[kLanes + j] << 4);
    }
}

}  // namespace

void kv_write(const KvLayerView &kv, int64_t slot, int64_t place, int64_t head, const float *k, const float *v) {
    const int64_t offset = slot % kv.block_size;
    uint8_t *base = kv.head(slot / kv.block_size, head);
    switch (kv.type) {
        case KvType::kFloat32: return write<ToFloat>(kv, base, offset, k, v);
        case KvType::kFloat16: return write<ToHalf>(kv, base, offset, k, v);
        case KvType::kInt8: return write<ToInt8>(kv, base, offset, k, v);
        case KvType::kInt4:
            write_int4_key(kv, base, offset, kv.head(place / kv.block_size, head), place % kv.block_size, k);
            return write_int4_value(kv, base, offset, v);
    }
}

KVARN_KERNELS_END
