// Owned memory for weights, caches and activations: whole pages, zeroed on first touch, large pages where offered.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kvarn {

class Pages {
public:
    Pages() = default;
    explicit Pages(size_t bytes);  // throws std::bad_alloc; 64 readable bytes follow the last one
    ~Pages();
    Pages(Pages &&other) noexcept;
    Pages &operator=(Pages &&other) noexcept;
    Pages(const Pages &) = delete;
    Pages &operator=(const Pages &) = delete;

    uint8_t *data() const { return data_; }
    size_t size() const { return size_; }

private:
    uint8_t *data_ = nullptr;
    size_t size_ = 0;
    size_t mapped_ = 0;
};

// Has the system back all pages of a range, without changing what is in them.
void touch(uint8_t *data, size_t bytes);

// Gives memory that was freed with free() back to the system, where the C library has a way to.
void trim_heap();

}  // namespace kvarn
