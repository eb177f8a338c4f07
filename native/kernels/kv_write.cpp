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

}  // namespace

void kv_write(const KvLayerView &kv, int64_t slot, int64_t head, const float *k, const float *v) {
    const int64_t block = slot / kv.block_size, offset = slot % kv.block_size;
    uint8_t *base = kv.head(block, head);
    const int64_t sub = offset / 16 * 16 * kv.key_dim + offset % 16;  // key element i is at sub + 16 * i
    const int64_t values = kv.block_size * kv.key_dim + offset * kv.value_dim;
    if (!kv.half) {
        float *to = reinterpret_cast<float *>(base);
        float key[kLanes];
        for (int64_t i = 0; i < kv.key_dim; i += kLanes) {
            store(key, clamp(load_n(k + i, kv.key_dim - i), kLargestFloat));
            for (int64_t j = 0; j < kLanes && i + j < kv.key_dim; ++j) to[sub + 16 * (i + j)] = key[j];
        }
        for (int64_t i = 0; i < kv.value_dim; i += kLanes)
            store_n(to + values + i, clamp(load_n(v + i, kv.value_dim - i), kLargestFloat), kv.value_dim - i);
        return;
    }
    uint16_t *to = reinterpret_cast<uint16_t *>(base);
    uint16_t lanes[16];
    for (int64_t i = 0; i < kv.key_dim; i += kLanes) {
        store_f16(lanes, clamp(load_n(k + i, kv.key_dim - i), kLargestHalf));
        for (int64_t j = 0; j < kLanes && i + j < kv.key_dim; ++j) to[sub + 16 * (i + j)] = lanes[j];
    }
    for (int64_t i = 0; i < kv.value_dim; i += kLanes) {
        const int64_t n = kv.value_dim - i < kLanes ? kv.value_dim - i : kLanes;
        store_f16(lanes, clamp(load_n(v + i, n), kLargestHalf));
        std::memcpy(to + values + i, lanes, size_t(n) * sizeof(uint16_t));
    }
}

KVARN_KERNELS_END
