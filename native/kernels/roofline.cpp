// What the machine can do at most, in this instruction set: the limits that other kernels are measured against.
#include "kernels_internal.h"
#include "vec.h"

KVARN_KERNELS_BEGIN
namespace {

constexpr int64_t kLine = 64;
constexpr int kStreams = 4;  // lines summed independently of one another

// Sums kept at the same time: enough to hide an instruction's latency, few enough to stay in registers.
constexpr int kSums = sizeof(F) == 64 ? 12 : 6;

using Words = uint32_t __attribute__((vector_size(64)));

// Makes the compiler forget what memory holds, so that no multiplication is taken out of the loop.
inline void forget_memory() { asm volatile("" ::: "memory"); }

}  // namespace

uint32_t read_sum(const uint8_t *data, int64_t bytes) {
    Words sums[kStreams] = {};
    for (int64_t i = 0; i < bytes; i += kStreams * kLine) {
#pragma GCC unroll 4
        for (int s = 0; s < kStreams; ++s) {
            Words line;
            std::memcpy(&line, data + i + s * kLine, kLine);
            prefetch(data + i + s * kLine + kPrefetchAhead);
            sums[s] += line;
        }
    }
    const Words all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    uint32_t total = 0;
    for (int i = 0; i < int(kLine / sizeof(uint32_t)); ++i) total += all[i];
    return total;
}

int64_t integer_peak(int64_t iterations, int32_t *result) {
    // Each sum has a pair of its own: where a product does not depend on its sum, no two may be the same.
    constexpr int kRows = 2, kColumns = kSums / kRows;
    alignas(kLine) uint8_t weights[kRows * kLine], activations[kColumns * kLine];
    for (size_t i = 0; i < sizeof weights; ++i) weights[i] = uint8_t(i % 16);
    for (size_t i = 0; i < sizeof activations; ++i) activations[i] = uint8_t(i % 4 % 3 - 1);
    asm volatile("" ::"r"(weights), "r"(activations) : "memory");
    Dot<4> dots[kRows][kColumns];
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 6
        for (int c = 0; c < kColumns; ++c) dots[r][c].init(c);
    for (int64_t i = 0; i < iterations; ++i) {
        forget_memory();
        B line[kRows];
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) line[r] = load_b(weights + r * kLine);
#pragma GCC unroll 6
        for (int c = 0; c < kColumns; ++c) {
            const B x = load_b(activations + c * kLine);
#pragma GCC unroll 2
            for (int r = 0; r < kRows; ++r) dots[r][c].step(line[r], x);
        }
    }
    int32_t sum = 0;
#pragma GCC unroll 2
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 6
        for (int c = 0; c < kColumns; ++c) sum ^= int32_t(reduce_max(dots[r][c].finish()));
    *result = sum;
    return iterations * kSums * kLine;
}

int64_t float_peak(int64_t iterations, float *result) {
    F sums[kSums];
    const F factor = set(0.5f), term = set(1.0f);
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) sums[s] = set(float(s));  // different, or they would be one
    for (int64_t i = 0; i < iterations; ++i)
#pragma GCC unroll 12
        for (int s = 0; s < kSums; ++s) sums[s] = fma(sums[s], factor, term);
    float total = 0;
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) total += reduce_add(sums[s]);
    *result = total;
    return iterations * kSums * kLanes;
}

KVARN_KERNELS_END
