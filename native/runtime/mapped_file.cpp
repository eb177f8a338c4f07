#include "runtime/mapped_file.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace kvarn {
namespace {
constexpr size_t kPopulateBytes = size_t(16) << 20;
}  // namespace

MappedFile::MappedFile(int fd) {
    struct stat status;
    if (fstat(fd, &status) != 0) throw std::system_error(errno, std::generic_category(), "fstat");
    if (status.st_size <= 0) throw std::invalid_argument("an empty file cannot be mapped");
    size_ = size_t(status.st_size);
    void *p = mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    data_ = static_cast<const uint8_t *>(p);
    try {
        populating_ = std::thread([this] { populate(); });
    } catch (const std::system_error &) {
        // Without a thread to spare, pages come as they are used.
    }
}

MappedFile::~MappedFile() {
    stop_ = true;
    if (populating_.joinable()) populating_.join();
    munmap(const_cast<uint8_t *>(data_), size_);
}

void MappedFile::populate() {
#ifdef MADV_POPULATE_READ
    for (size_t start = 0; start < size_ && !stop_; start += kPopulateBytes) {
        void *p = const_cast<uint8_t *>(data_) + start;
        if (madvise(p, std::min(kPopulateBytes, size_ - start), MADV_POPULATE_READ) != 0) break;
    }
#endif
}

}  // namespace kvarn
