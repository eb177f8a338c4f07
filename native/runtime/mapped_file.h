// A file mapped read-only: several processes that map one file share its memory.
#pragma once
#include <cstddef>
#include <cstdint>

namespace kvarn {

class MappedFile {
public:
    // Maps the whole file behind `fd`, which may be closed afterwards. Reading begins in the background.
    // Throws std::system_error; std::invalid_argument for an empty file.
    explicit MappedFile(int fd);
    ~MappedFile();
    MappedFile(const MappedFile &) = delete;
    MappedFile &operator=(const MappedFile &) = delete;

    const uint8_t *data() const { return data_; }
    size_t size() const { return size_; }

private:
    const uint8_t *data_;
    size_t size_;
};

}  // namespace kvarn
