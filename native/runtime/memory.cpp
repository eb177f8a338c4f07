#include "runtime/memory.h"

#include <sys/mman.h>

#include <new>
#include <utility>

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
    if (page == kLargePage) madvise(p, mapped_, MADV_HUGEPAGE);
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

}  // namespace kvarn
