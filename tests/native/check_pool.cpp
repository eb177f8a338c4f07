// The thread pool: every item of every stage runs once, stages in order, jobs one after another.
#include <atomic>

#include "check.h"
#include "runtime/pool.h"

using namespace kvarn;
using check::between;
using check::require;

namespace {

class Counting final : public Job {
public:
    explicit Counting(int stages) : runs_(size_t(stages)) {
        for (auto &stage : runs_) stage = std::vector<int>(size_t(between(0, 40)));
    }
    int stages() const override { return int(runs_.size()); }
    uint32_t items(int stage) const override { return uint32_t(runs_[size_t(stage)].size()); }
    void run(int stage, uint32_t item, int) noexcept override {
        for (int s = 0; s < stage; ++s)  // plain reads: a race with an unfinished stage is an error under TSan
            for (int count : runs_[size_t(s)]) require(count == 1, "an item ran before an earlier stage was done", "pool");
        ++runs_[size_t(stage)][item];
    }
    void verify() const {
        for (const auto &stage : runs_)
            for (int count : stage) require(count == 1, "an item did not run exactly once", "pool");
    }

private:
    std::vector<std::vector<int>> runs_;
};

void check_shares() {
    for (int threads : {1, 2, 3, 8, 11})
        for (uint32_t items : {0u, 1u, 2u, 7u, 8u, 40u, 1001u}) {
            const int shares = Pool::shares(threads);
            require(Pool::share_begin(items, shares, 0) == 0 && Pool::share_begin(items, shares, shares) == items,
                    "shares do not cover the items", "pool");
            std::vector<int> seen(items);
            for (uint32_t item = 0; item < items; ++item) ++seen[Pool::dealt(item, items, threads)];
            for (int count : seen) require(count == 1, "dealing is no permutation", "pool");
        }
}

}  // namespace

int main() {
    check_shares();
    for (int threads : {1, 2, 3, 7, 11}) {
        Pool pool(threads);
        for (int round = 0; round < 300; ++round) {
            Counting job(int(between(0, round % 50 ? 6 : 200)));
            pool.run(job);
            job.verify();
        }
        std::atomic<int64_t> sum{0};
        pool.parallel_for(1000, [&](uint32_t item, int) { sum += item; });
        require(sum == 499500, "parallel_for", "pool");
        std::printf("pool of %d: checked\n", threads);
    }
    return 0;
}
