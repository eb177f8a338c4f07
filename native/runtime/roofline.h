// Measures what all threads of a pool reach together: reading memory, integer and float multiply-adds.
#pragma once
#include <atomic>

#include "kvarn/kernels.h"
#include "runtime/memory.h"
#include "runtime/pool.h"

namespace kvarn {

// How much was done in how many seconds.
struct Work {
    double amount, seconds;
};

class Roofline {
public:
    // bytes: of the buffer that is read, a multiple of kSpan; filled with the pool's threads. It should be several times
    // the last cache. Throws std::invalid_argument, std::bad_alloc.
    Roofline(const Kernels &kernels, size_t bytes, Pool &pool);

    // One pass over the buffer, in bytes.
    Work read(Pool &pool);

    // Multiply-adds: items for each thread, so that a thread that was held up leaves its share to the others.
    Work integer(Pool &pool, int64_t iterations, int items);
    Work floating(Pool &pool, int64_t iterations, int items);

    static constexpr size_t kSpan = size_t(1) << 20;  // what a thread reads at a time

private:
    const Kernels *kernels_;
    Pages buffer_;
    std::atomic<uint32_t> result_{0};  // what was computed, so that computing it cannot be left out
};

}  // namespace kvarn
