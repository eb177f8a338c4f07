// What the native checks share: random numbers, and memory whose end the sanitizers watch.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, size)
#define ASAN_UNPOISON_MEMORY_REGION(address, size)
#endif

namespace check {

inline std::mt19937 &random() {
    static std::mt19937 engine(20240917);
    return engine;
}

inline int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(random()); }

inline std::vector<float> floats(int64_t n, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<float> values(static_cast<size_t>(n));
    for (float &v : values) v = normal(random());
    return values;
}

// n bytes, 64-byte aligned; one byte more is an error under ASan.
class Bytes {
public:
    explicit Bytes(size_t n) : size_(n), data_(static_cast<uint8_t *>(std::aligned_alloc(64, allocated()))) {
        for (size_t i = 0; i < n; ++i) data_[i] = uint8_t(random()());
        ASAN_POISON_MEMORY_REGION(data_ + n, allocated() - n);
    }
    ~Bytes() {
        ASAN_UNPOISON_MEMORY_REGION(data_, allocated());
        std::free(data_);
    }
    Bytes(const Bytes &) = delete;
    Bytes &operator=(const Bytes &) = delete;
    uint8_t *data() { return data_; }
    size_t size() const { return size_; }

private:
    size_t allocated() const { return (size_ + 63) / 64 * 64; }

    size_t size_;
    uint8_t *data_;
};

inline void require(bool ok, const char *what, const char *where) {
    if (ok) return;
    std::fprintf(stderr, "check failed: %s (%s)\n", what, where);
    std::exit(1);
}

}  // namespace check
