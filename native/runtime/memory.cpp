#include "runtime/memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>
#include <utility>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace kvarn {
namespace {
constexpr size_t kLargePage = size_t(2) << 20;
constexpr size_t kSlack = 64;
}  // namespace

Pages::Pages(size_t bytes) : size_(bytes) {
    if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
    const size_t page = bytes >= kLargePage ? kLargePage : 4096;
    mapped_ = (bytes + kSlack + page - 1) / page * page;
    void *p = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // The rest stays in small pages: a large one would count whole for the few bytes used of it.
    const size_t whole = bytes / kLargePage * kLargePage;
    if (whole) madvise(p, whole, MADV_HUGEPAGE);
    if (whole < mapped_) madvise(static_cast<uint8_t *>(p) + whole, mapped_ - whole, MADV_NOHUGEPAGE);
#endif
    data_ = static_cast<uint8_t *>(p);
}

Pages::~Pages() {
    if (data_) munmap(data_, mapped_);
}

Pages::Pages(Pages &&other) noexcept { *this = std::move(other); }

Pages &Pages::operator=(Pages &&other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    std::swap(mapped_, other.mapped_);
    return *this;
}

void touch(uint8_t *data, size_t bytes) {
    constexpr size_t page = 4096;
    for (size_t i = 0; i < bytes; i += page) {
        volatile uint8_t *at = data + i;
        *at = *at;
    }
    if (bytes > 0) {
        volatile uint8_t *last = data + bytes - 1;
        *last = *last;
    }
}

void trim_heap() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

}  // namespace kvarn
