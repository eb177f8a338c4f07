// Threads that walk the stages of a job together.
//
// A job is a list of stages, a stage a number of items. Each thread has a share of a stage's items, which follow one
// another: it takes them one by one from the front, so that it reads memory in order and nobody else's cache line, and
// then what is left of other shares from the back. So a thread that the system has taken off its core holds up at most
// the item it has. A stage begins when all items of the one before are done, whoever did them. Waiting spins, then
// yields, then sleeps. Results never depend on who runs what.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace kvarn {

class Job {
public:
    virtual ~Job() = default;
    virtual int stages() const = 0;
    virtual uint32_t items(int stage) const = 0;  // at most kMaxItems; read before the job starts
    virtual void run(int stage, uint32_t item, int thread) noexcept = 0;
    static constexpr uint32_t kMaxItems = (1u << 20) - 1;
};

class Pool {
public:
    // threads: how many run a job, the caller of run() among them. pins[i]: processors thread i may use; an empty list
    // leaves it where the system puts it. Entry 0 (the caller) is not pinned.
    explicit Pool(int threads, const std::vector<std::vector<int>> &pins = {});
    ~Pool();
    Pool(const Pool &) = delete;
    Pool &operator=(const Pool &) = delete;

    int threads() const { return threads_; }

    // Shares of a stage's items: share i is items share_begin(items, shares, i) … share_begin(items, shares, i + 1) - 1.
    static int shares(int threads) { return threads < kMaxShares ? threads : kMaxShares; }
    static uint32_t share_begin(uint32_t items, int shares, int i) {
        return items / uint32_t(shares) * uint32_t(i) + std::min(uint32_t(i), items % uint32_t(shares));
    }
    // A permutation of items: those of a share are every shares-th, in order.
    static uint32_t dealt(uint32_t item, uint32_t items, int threads) {
        const int n = shares(threads);
        int i = n - 1;
        while (share_begin(items, n, i) > item) --i;
        return (item - share_begin(items, n, i)) * uint32_t(n) + uint32_t(i);
    }

    // Runs all stages and returns when all are done. One caller at a time.
    void run(Job &job);

    // Runs body(item, thread) for item = 0 … items - 1.
    template <class Body>
    void parallel_for(uint32_t items, Body body) {
        struct Loop final : Job {
            Loop(uint32_t n, Body &b) : count(n), function(b) {}
            int stages() const override { return 1; }
            uint32_t items(int) const override { return count; }
            void run(int, uint32_t item, int thread) noexcept override { function(item, thread); }
            uint32_t count;
            Body &function;
        } loop(items, body);
        run(loop);
    }

private:
    static constexpr int kMaxShares = 8;  // more threads share a share: each looks at all of them

    using Share = std::atomic<uint64_t>;  // epoch (24 bits) | first item not taken (20) | end of those not taken (20)
    struct Progress {
        std::atomic<uint32_t> done{0}, items{0};
    };
    // Stage by stage for each share, so that a share's line is its threads' own but for what is taken from it.
    struct Table {
        Table(size_t stages, int shares);
        Share &share(int i, int stage) { return shares[size_t(i) * stride + size_t(stage)]; }

        const size_t capacity, stride;
        std::unique_ptr<Share[]> shares;
        std::unique_ptr<Progress[]> progress;
        std::atomic<int> stages{0};
    };

    void work(int thread);
    void walk(uint32_t epoch, int thread);
    uint32_t take_all(Table &table, int stage, uint32_t epoch, int thread, Job *&job);
    bool wait_done(Progress &progress, uint32_t epoch);
    uint32_t wait_epoch(uint32_t seen);
    void reserve(size_t stages);

    const int threads_, shares_;
    std::atomic<uint32_t> epoch_{0};  // odd while counters are being set
    std::atomic<bool> stop_{false};
    std::atomic<Job *> job_{nullptr};
    std::atomic<Table *> table_{nullptr};
    std::vector<std::unique_ptr<Table>> tables_;  // outgrown ones stay: a late thread may still look at them
    std::vector<std::thread> workers_;
};

}  // namespace kvarn
