// A step plan: stages over buffers in one arena, built once at load and run once per step.
#pragma once
#include <memory>
#include <vector>

#include "runtime/pool.h"
#include "runtime/stage.h"

namespace kvarn {

// What a stage took over the steps that were counted.
struct StageCounter {
    uint64_t span_ns;  // from the first thread's begin to the last one's end
    uint64_t busy_ns;  // of all threads together; what is missing to span * threads, they waited
    uint64_t calls;    // steps in which it had something to do
};

class StepPlan {
public:
    // arena_bytes: room for buffers, as laid out by the caller (kvarn.backends.cpu.memory).
    StepPlan(std::shared_ptr<Pool> pool, std::shared_ptr<KvCache> kv, const Kernels &kernels, Limits limits,
             size_t arena_bytes);

    // Places in the arena. Throw std::invalid_argument where a buffer does not fit.
    FloatBuffer float_buffer(size_t offset, int64_t width, int64_t stride, bool outputs);
    QuantBuffer quant_buffer(size_t offset, int64_t cols, bool outputs);
    float *floats(size_t offset, int64_t count);

    void add(std::unique_ptr<Stage> stage) { stages_.push_back(std::move(stage)); }
    StageContext context() const { return {kernels_, pool_->threads()}; }
    uint64_t next_index() const { return stages_.size(); }
    const KvCache &kv() const { return *kv_; }
    const Limits &limits() const { return limits_; }

    // Allocates what threads need; no stage may be added afterwards.
    void finish();
    static size_t thread_bytes(size_t scratch, size_t own);  // of one thread, from the stages' largest
    size_t arena_bytes() const { return arena_.size(); }
    size_t scratch_bytes() const { return scratch_pages_.size(); }

    // Runs a step. Throws std::invalid_argument where the batch is out of range; nothing is run then.
    void run(const Batch &batch);

    // Counting: off at first. Switching it on or off sets all counters to zero.
    void count(bool on);
    std::vector<StageCounter> counters() const;  // in the order of labels(); empty while off
    std::vector<std::string> labels() const;

private:
    class Walk;
    class CountedWalk;
    struct Mark {
        uint64_t begin, end;  // of one thread's work on one stage of the step; 0, 0: it had none
    };
    void collect();
    void begin(const Batch &batch);
    int64_t rows(bool outputs) const { return outputs ? limits_.max_outputs : limits_.max_tokens; }
    uint8_t *place(size_t offset, size_t bytes);

    std::shared_ptr<Pool> pool_;
    std::shared_ptr<KvCache> kv_;
    const Kernels *kernels_;
    Limits limits_;
    Pages arena_, scratch_pages_;
    std::vector<std::unique_ptr<Stage>> stages_;
    std::vector<Scratch> scratch_;
    Step step_{};
    uint64_t steps_ = 0;
    std::vector<StageCounter> counters_;
    std::vector<std::vector<Mark>> marks_;  // by thread and stage
};

}  // namespace kvarn
