#include "runtime/mapped_file.h"

#include <sys/mman.h>
#include <sys/stat.h>

#include <cerrno>
#include <stdexcept>
#include <system_error>

namespace kvarn {

MappedFile::MappedFile(int fd) {
    struct stat status;
    if (fstat(fd, &status) != 0) throw std::system_error(errno, std::generic_category(), "fstat");
    if (status.st_size <= 0) throw std::invalid_argument("an empty file cannot be mapped");
    size_ = size_t(status.st_size);
    void *p = mmap(nullptr, size_, PROT_READ, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    // Not MAP_POPULATE: that would wait for a cold file's last byte before the first is used.
    madvise(p, size_, MADV_WILLNEED);
    data_ = static_cast<const uint8_t *>(p);
}

MappedFile::~MappedFile() { munmap(const_cast<uint8_t *>(data_), size_); }

}  // namespace kvarn
