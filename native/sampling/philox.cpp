#include "kvarn/sampling.h"

namespace kvarn {

// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3, with ten rounds.
void philox4x32(uint32_t counter[4], uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53u} * counter[0];
        const uint64_t b = uint64_t{0xCD9E8D57u} * counter[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(a)};
        for (int i = 0; i < 4; ++i) counter[i] = next[i];
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
}

double uniform(uint64_t seed, uint32_t stream, uint64_t position, Use use) {
    uint32_t counter[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), stream,
                           static_cast<uint32_t>(use)};
    philox4x32(counter, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    const uint64_t bits = (uint64_t{counter[0]} << 32 | counter[1]) >> 11;
    return static_cast<double>(bits) * 0x1.0p-53;
}

}  // namespace kvarn
