#include "runtime/plan.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace kvarn {

namespace {

uint64_t now_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return uint64_t(std::chrono::duration_cast<std::chrono::nanoseconds>(now).count());
}

}  // namespace

class StepPlan::Walk : public Job {
public:
    explicit Walk(StepPlan &plan) : plan_(plan) {}
    int stages() const override { return int(plan_.stages_.size()); }
    uint32_t items(int stage) const override {
        return std::min(kMaxItems, plan_.stages_[size_t(stage)]->items(plan_.step_));
    }
    void run(int stage, uint32_t item, int thread) noexcept override {
        plan_.stages_[size_t(stage)]->run(plan_.step_, item, plan_.scratch_[size_t(thread)]);
    }

protected:
    StepPlan &plan_;
};

// The same with a look at the clock after each item: a thread's items of a stage follow one another.
class StepPlan::CountedWalk final : public Walk {
public:
    using Walk::Walk;
    void run(int stage, uint32_t item, int thread) noexcept override {
        Mark &mark = plan_.marks_[size_t(thread)][size_t(stage)];
        if (mark.begin == 0) mark.begin = now_ns();
        Walk::run(stage, item, thread);
        mark.end = now_ns();
    }
};

StepPlan::StepPlan(std::shared_ptr<Pool> pool, std::shared_ptr<KvCache> kv, const Kernels &kernels, Limits limits,
                   size_t arena_bytes)
    : pool_(std::move(pool)), kv_(std::move(kv)), kernels_(&kernels), limits_(limits), arena_(arena_bytes) {}

uint8_t *StepPlan::place(size_t offset, size_t bytes) {
    if (offset % 64 != 0 || offset > arena_.size() || bytes > arena_.size() - offset)
        throw std::invalid_argument("a buffer of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) +
                                    " does not fit an arena of " + std::to_string(arena_.size()));
    return arena_.data() + offset;
}

FloatBuffer StepPlan::float_buffer(size_t offset, int64_t width, int64_t stride, bool outputs) {
    if (width < 1 || stride < width) throw std::invalid_argument("a buffer's stride must be at least its width");
    uint8_t *data = place(offset, size_t(rows(outputs) * stride) * sizeof(float));
    return {reinterpret_cast<float *>(data), width, stride, outputs};
}

QuantBuffer StepPlan::quant_buffer(size_t offset, int64_t cols, bool outputs) {
    if (cols < 1 || cols % kGroup != 0) throw std::invalid_argument("quantized rows are multiples of 32 wide");
    return {place(offset, quant_bytes(rows(outputs), cols)), cols, outputs};
}

float *StepPlan::floats(size_t offset, int64_t count) {
    return reinterpret_cast<float *>(place(offset, size_t(count) * sizeof(float)));
}

size_t StepPlan::thread_bytes(size_t scratch, size_t own) {
    return round_up(round_up(scratch, 64) + round_up(own, 64) + 64, 4096);
}

void StepPlan::finish() {
    size_t scratch = 0, own = 0;
    for (const auto &stage : stages_) {
        scratch = std::max(scratch, round_up(stage->scratch_bytes(), 64));
        own = std::max(own, round_up(stage->own_bytes(), 64));
    }
    const size_t each = thread_bytes(scratch, own);
    scratch_pages_ = Pages(each * size_t(pool_->threads()));
    for (int i = 0; i < pool_->threads(); ++i) {
        uint8_t *data = scratch_pages_.data() + each * size_t(i);
        scratch_.push_back({data, data + scratch, 0});
    }
}

void StepPlan::begin(const Batch &batch) {
    if (std::string problem = check_batch(batch, limits_, kv_->num_blocks(), kv_->block_size(), kv_->type() == KvType::kInt4);
        !problem.empty())
        throw std::invalid_argument(problem);
    begin_step(batch, ++steps_, kv_->block_size(), step_);
}

void StepPlan::run(const Batch &batch) {
    begin(batch);
    if (counters_.empty()) {
        Walk walk(*this);
        pool_->run(walk);
        return;
    }
    CountedWalk walk(*this);
    pool_->run(walk);
    collect();
}

void StepPlan::count(bool on) {
    counters_.assign(on ? stages_.size() : 0, {});
    marks_.assign(on ? size_t(pool_->threads()) : 0, std::vector<Mark>(stages_.size(), Mark{}));
}

// Adds the threads' marks to the counters and clears them.
void StepPlan::collect() {
    for (size_t s = 0; s < stages_.size(); ++s) {
        uint64_t begin = UINT64_MAX, end = 0;
        for (std::vector<Mark> &thread : marks_) {
            Mark &mark = thread[s];
            if (mark.begin == 0) continue;
            begin = std::min(begin, mark.begin);
            end = std::max(end, mark.end);
            counters_[s].busy_ns += mark.end - mark.begin;
            mark = {};
        }
        if (end == 0) continue;
        counters_[s].span_ns += end - begin;
        ++counters_[s].calls;
    }
}

std::vector<StageCounter> StepPlan::counters() const { return counters_; }

std::vector<std::string> StepPlan::labels() const {
    std::vector<std::string> names;
    for (const auto &stage : stages_) names.push_back(stage->label());
    return names;
}

}  // namespace kvarn
