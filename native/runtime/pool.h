// Threads that walk the stages of a job together.
//
// A job is a list of stages, a stage a number of items. Threads take items one by one from a shared counter, so a
// thread that the system has taken off its core holds up at most the item it has; a stage begins when all items of the
// one before are done, whoever did them. Waiting spins, then yields, then sleeps. Results never depend on who runs what.
#pragma once
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
    struct alignas(64) Counter {
        std::atomic<uint64_t> next{0};  // epoch (24 bits) | items (20) | items not yet taken (20)
        std::atomic<uint32_t> done{0};
    };
    struct Table {
        explicit Table(size_t n) : capacity(n), counters(new Counter[n]) {}
        size_t capacity;
        std::unique_ptr<Counter[]> counters;
        std::atomic<int> stages{0};
    };

    void work(int thread);
    void walk(uint32_t epoch, int thread);
    bool wait_done(Counter &counter, uint32_t items, uint32_t epoch);
    uint32_t wait_epoch(uint32_t seen);
    void reserve(size_t stages);

    const int threads_;
    std::atomic<uint32_t> epoch_{0};  // odd while counters are being set
    std::atomic<bool> stop_{false};
    std::atomic<Job *> job_{nullptr};
    std::atomic<Table *> table_{nullptr};
    std::vector<std::unique_ptr<Table>> tables_;  // outgrown ones stay: a late thread may still look at them
    std::vector<std::thread> workers_;
};

}  // namespace kvarn
