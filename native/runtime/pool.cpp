#include "runtime/pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace kvarn {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kSpin = std::chrono::microseconds(60);
constexpr int kYields = 40;
constexpr uint32_t kItemMask = Job::kMaxItems;
constexpr int kItemBits = 20;

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Spins for kSpin, then yields kYields times; true as soon as ready() is.
template <class Ready>
bool spin_until(Ready ready) {
    for (int i = 0; i < 64; ++i) {
        if (ready()) return true;
        pause();
    }
    const auto deadline = Clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; ++i) {
            if (ready()) return true;
            pause();
        }
    } while (Clock::now() < deadline);
    for (int i = 0; i < kYields; ++i) {
        if (ready()) return true;
        sched_yield();
    }
    return ready();
}

void pin(const std::vector<int> &processors) {
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int cpu : processors)
        if (cpu >= 0 && cpu < CPU_SETSIZE) CPU_SET(cpu, &set);
    if (CPU_COUNT(&set) > 0) sched_setaffinity(0, sizeof set, &set);  // refused: stays where it may run
}

uint64_t tag(uint32_t epoch) { return uint64_t(epoch & 0xffffff) << 2 * kItemBits; }
bool is_of(uint32_t epoch, uint64_t left) { return (left ^ tag(epoch)) >> 2 * kItemBits == 0; }
uint32_t first_of(uint64_t left) { return uint32_t(left >> kItemBits) & kItemMask; }
uint32_t end_of(uint64_t left) { return uint32_t(left) & kItemMask; }
constexpr uint64_t kOneItem = uint64_t(1) << kItemBits;

}  // namespace

// A line of slack between shares, so that two never meet in one.
Pool::Table::Table(size_t n, int count)
    : capacity(n), stride(n + 64 / sizeof(Share)), shares(new Share[size_t(count) * stride]),
      progress(new Progress[n]) {}

Pool::Pool(int threads, const std::vector<std::vector<int>> &pins) : threads_(threads), shares_(shares(threads)) {
    if (threads < 1) throw std::invalid_argument("a pool has at least one thread");
    reserve(64);
    for (int i = 1; i < threads; ++i) {
        std::vector<int> processors = size_t(i) < pins.size() ? pins[size_t(i)] : std::vector<int>();
        workers_.emplace_back([this, i, processors = std::move(processors)] {
            if (!processors.empty()) pin(processors);
            work(i);
        });
    }
}

Pool::~Pool() {
    stop_.store(true);
    epoch_.fetch_add(2);
    epoch_.notify_all();
    for (std::thread &worker : workers_) worker.join();
}

void Pool::reserve(size_t stages) {
    Table *table = table_.load();
    if (table && table->capacity >= stages) return;
    tables_.push_back(std::make_unique<Table>(std::max<size_t>(stages, table ? 2 * table->capacity : 0), shares_));
    table_.store(tables_.back().get(), std::memory_order_release);
}

void Pool::run(Job &job) {
    const int stages = job.stages();
    const uint32_t before = epoch_.load(std::memory_order_relaxed);
    epoch_.store(before + 1);  // late threads leave at the next look
    reserve(size_t(stages));
    Table &table = *table_.load();
    for (int s = 0; s < stages; ++s) {
        const uint32_t items = job.items(s);
        table.progress[s].done.store(0, std::memory_order_relaxed);
        table.progress[s].items.store(items, std::memory_order_relaxed);
        for (int i = 0; i < shares_; ++i) {
            const uint64_t first = share_begin(items, shares_, i), end = share_begin(items, shares_, i + 1);
            table.share(i, s).store(tag(before + 2) | first << kItemBits | end, std::memory_order_relaxed);
        }
    }
    table.stages.store(stages);
    job_.store(&job);
    epoch_.store(before + 2);
    if (threads_ > 1) epoch_.notify_all();
    walk(before + 2, 0);
}

void Pool::work(int thread) {
    uint32_t seen = 0;
    while (true) {
        seen = wait_epoch(seen);
        if (stop_.load()) return;
        walk(seen, thread);
    }
}

// The next even epoch after `seen`.
uint32_t Pool::wait_epoch(uint32_t seen) {
    while (true) {
        uint32_t now = seen;
        const auto changed = [&] {
            now = epoch_.load();
            return now != seen && now % 2 == 0;
        };
        if (spin_until(changed)) return now;
        epoch_.wait(now);
    }
}

// False where the job has ended meanwhile and another began.
bool Pool::wait_done(Progress &progress, uint32_t epoch) {
    while (true) {
        uint32_t done = 0;
        bool over = false;
        const auto ready = [&] {
            done = progress.done.load(std::memory_order_acquire);
            if (done >= progress.items.load(std::memory_order_relaxed)) return true;
            over = epoch_.load() != epoch;
            return over;
        };
        if (spin_until(ready)) return !over;
        progress.done.wait(done);
    }
}

// Runs what this thread gets of a stage; returns how many items that were. kMaxItems + 1: the epoch has passed.
uint32_t Pool::take_all(Table &table, int stage, uint32_t epoch, int thread, Job *&job) {
    uint32_t finished = 0;
    for (int i = 0; i < shares_; ++i) {
        Share &share = table.share((thread + i) % shares_, stage);
        uint64_t left = share.load(std::memory_order_acquire);
        while (true) {
            if (!is_of(epoch, left)) return Job::kMaxItems + 1;
            if (first_of(left) == end_of(left)) break;
            // Success proves that the epoch's job is running and cannot end before this item is done.
            if (!share.compare_exchange_weak(left, i == 0 ? left + kOneItem : left - 1)) continue;
            if (!job) job = job_.load();
            job->run(stage, i == 0 ? first_of(left) : end_of(left) - 1, thread);
            ++finished;
            left = share.load(std::memory_order_acquire);
        }
    }
    return finished;
}

void Pool::walk(uint32_t epoch, int thread) {
    Table &table = *table_.load(std::memory_order_acquire);
    Job *job = nullptr;
    const int stages = table.stages.load();
    for (int s = 0; s < stages; ++s) {
        const uint32_t finished = take_all(table, s, epoch, thread, job);
        if (finished > Job::kMaxItems) return;
        Progress &progress = table.progress[s];
        if (finished > 0) {
            const uint32_t items = progress.items.load(std::memory_order_relaxed);
            if (progress.done.fetch_add(finished) + finished == items) progress.done.notify_all();
        }
        if (thread != 0 && s + 1 == stages) return;
        if (!wait_done(progress, epoch)) return;
    }
}

}  // namespace kvarn
