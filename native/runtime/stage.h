// A stage: one parallel pass over a step's rows or features. Stages of a plan run one after the other.
#pragma once
#include <memory>
#include <string>

#include "runtime/step.h"
#include "runtime/storage.h"

namespace kvarn {

// float32 activations; `outputs`: rows are the step's output rows, else its tokens.
struct FloatBuffer {
    float *data = nullptr;
    int64_t width = 0, stride = 0;
    bool outputs = false;

    float *row(int64_t r) const { return data + r * stride; }
};

// int8 activations, what quantized linears read.
struct QuantBuffer {
    uint8_t *data = nullptr;
    int64_t cols = 0;
    bool outputs = false;

    bool used() const { return data != nullptr; }
    QuantRows rows(int64_t count) const { return {data, cols, count == 1}; }  // of a step that has so many
};

// What belongs to one thread.
struct Scratch {
    uint8_t *data;            // as much as the plan's stages asked for; content lasts for one item
    uint8_t *own_rows;        // kOwnRows quantized rows that last for a stage
    uint64_t own_stamp = 0;   // which (step, stage) they are of
};

// With at most this many rows every thread computes a linear's input for itself, which costs less than waiting.
constexpr int64_t kOwnRows = 2;

struct StageContext {
    const Kernels *kernels;
    int threads;
};

class Stage {
public:
    Stage(std::string label, StageContext context) : label_(std::move(label)), context_(context) {}
    virtual ~Stage() = default;
    virtual uint32_t items(const Step &step) const = 0;
    virtual void run(const Step &step, uint32_t item, Scratch &scratch) noexcept = 0;
    virtual size_t scratch_bytes() const { return 0; }
    virtual size_t own_bytes() const { return 0; }
    const std::string &label() const { return label_; }

protected:
    const Kernels &kernels() const { return *context_.kernels; }
    int threads() const { return context_.threads; }

private:
    std::string label_;
    StageContext context_;
};

inline int64_t rows_of(const Step &step, bool outputs) { return outputs ? step.batch.outputs : step.batch.tokens; }

// The first row from `row` on that does not go on with the sub-block of the row before it: who writes to the cache takes
// sub-blocks whole, since a key may be stored as its difference from their first one. Trees, too, in int4.
inline int64_t sub_block_from(const Batch &batch, int64_t row, KvType type) {
    // The same in every KV group: blocks begin where sub-blocks do.
    const auto goes_on = [&](int64_t r) {
        if (type == KvType::kInt4 && batch.draft(r)) return true;
        return batch.slot(r, 0) % kSubBlock != 0 && batch.slot(r, 0) == batch.slot(r - 1, 0) + 1;
    };
    while (row > 0 && row < batch.tokens && goes_on(row)) ++row;
    return row;
}

// A stage whose items are spans of rows.
class RowStage : public Stage {
public:
    RowStage(std::string label, StageContext context, bool outputs)
        : Stage(std::move(label), context), outputs_(outputs) {}
    uint32_t items(const Step &step) const override;
    void run(const Step &step, uint32_t item, Scratch &scratch) noexcept override;
    virtual bool skip(const Step &) const { return false; }
    virtual void row(const Step &step, int64_t r) noexcept = 0;

protected:
    const bool outputs_;
};

struct NormParameters {
    std::shared_ptr<Vector> weight, bias;  // bias may be null
    float eps = 0;
    bool layer = false;
    int64_t groups = 1;

    bool used() const { return weight != nullptr; }
    void apply(const Kernels &kernels, const float *x, float *out, int64_t width) const {
        kernels.norm({x, out, groups, width / groups, weight->values.data(), bias ? bias->values.data() : nullptr, eps,
                      layer});
    }
};

}  // namespace kvarn
