#include "runtime/roofline.h"

#include <chrono>
#include <cstring>
#include <stdexcept>

namespace kvarn {
namespace {

template <class Body>
double seconds_of(Body body) {
    const auto start = std::chrono::steady_clock::now();
    body();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

uint32_t item_count(int64_t n) {
    if (n < 1 || n > int64_t(Job::kMaxItems)) throw std::invalid_argument("items must be between 1 and 1048575");
    return uint32_t(n);
}

}  // namespace

Roofline::Roofline(const Kernels &kernels, size_t bytes, Pool &pool) : kernels_(&kernels) {
    if (bytes < kSpan || bytes % kSpan != 0 || bytes / kSpan > Job::kMaxItems)
        throw std::invalid_argument("a roofline buffer is whole mebibytes");
    buffer_ = Pages(bytes);
    // Written, since untouched pages are all one page of zeros, which a cache holds.
    pool.parallel_for(uint32_t(bytes / kSpan), [&](uint32_t item, int) {
        std::memset(buffer_.data() + item * kSpan, int(item % 251) + 1, kSpan);
    });
}

Work Roofline::read(Pool &pool) {
    const double seconds = seconds_of([&] {
        pool.parallel_for(uint32_t(buffer_.size() / kSpan), [&](uint32_t item, int) {
            result_.fetch_xor(kernels_->read_sum(buffer_.data() + item * kSpan, kSpan), std::memory_order_relaxed);
        });
    });
    return {double(buffer_.size()), seconds};
}

Work Roofline::integer(Pool &pool, int64_t iterations, int items) {
    const uint32_t count = item_count(int64_t(items) * pool.threads());
    std::atomic<int64_t> done{0};
    const double seconds = seconds_of([&] {
        pool.parallel_for(count, [&](uint32_t, int) {
            int32_t result;
            done.fetch_add(kernels_->integer_peak(iterations, &result), std::memory_order_relaxed);
            result_.fetch_xor(uint32_t(result), std::memory_order_relaxed);
        });
    });
    return {double(done), seconds};
}

Work Roofline::floating(Pool &pool, int64_t iterations, int items) {
    const uint32_t count = item_count(int64_t(items) * pool.threads());
    std::atomic<int64_t> done{0};
    const double seconds = seconds_of([&] {
        pool.parallel_for(count, [&](uint32_t, int) {
            float result;
            done.fetch_add(kernels_->float_peak(iterations, &result), std::memory_order_relaxed);
            uint32_t bits;
            std::memcpy(&bits, &result, sizeof bits);
            result_.fetch_xor(bits, std::memory_order_relaxed);
        });
    });
    return {double(done), seconds};
}

}  // namespace kvarn
