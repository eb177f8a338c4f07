// Linears that read the same rows, with what follows them.
#pragma once
#include <optional>

#include "runtime/stage.h"

namespace kvarn {

// Computes a linear's int8 input from float rows: norm (where there is one), then quantization.
struct InputRecipe {
    FloatBuffer x;
    NormParameters norm;  // unused: x is quantized as it is

    void make_row(const Kernels &kernels, int64_t r, const QuantRows &to, float *normed) const;
};

// One linear, or a gate/up pair (`up` set), and what is done to its result before it is stored.
struct LinearJob {
    std::shared_ptr<PackedWeight> weight, up;  // of one format class; up has weight's shape
    std::shared_ptr<Vector> bias, up_bias;     // may be null
    std::optional<Function> function;          // applied to the result; with up: f(gate) * up
    FloatBuffer residual;                      // data null: none; else added last
    float scale = 1.0f, softcap = 0.0f;        // logits: scale before bias, softcap * tanh(. / softcap) last
    FloatBuffer out;                           // data null: only quants are stored
    QuantBuffer quants;                        // unused: only floats are stored
};

// Shared preparation of a linear's input: runs where the linear's threads do not do it each for themselves.
class PrepareStage final : public RowStage {
public:
    PrepareStage(StageContext c, InputRecipe recipe, QuantBuffer quants, int64_t own_rows)
        : RowStage("prepare", c, recipe.x.outputs), recipe_(std::move(recipe)), quants_(quants), own_rows_(own_rows) {}
    bool skip(const Step &step) const override { return rows_of(step, outputs_) <= own_rows_; }
    size_t scratch_bytes() const override { return size_t(recipe_.x.width) * sizeof(float); }
    void run(const Step &step, uint32_t item, Scratch &scratch) noexcept override;
    void row(const Step &, int64_t) noexcept override {}

private:
    InputRecipe recipe_;
    QuantBuffer quants_;
    int64_t own_rows_;
};

class LinearStage final : public Stage {
public:
    // input: float rows for float weights. quants: int8 rows for quantized weights. own: how threads make quants for
    // themselves where there are at most kOwnRows rows; null: the rows in `quants` are ready.
    LinearStage(std::string label, StageContext c, FloatBuffer input, QuantBuffer quants,
                std::shared_ptr<InputRecipe> own, std::vector<LinearJob> jobs, uint64_t index);
    uint32_t items(const Step &step) const override;
    void run(const Step &step, uint32_t item, Scratch &scratch) noexcept override;
    size_t scratch_bytes() const override { return scratch_bytes_of_any(); }
    size_t own_bytes() const override { return own_ ? own_bytes(cols_) : 0; }

    // What a linear asks of a thread: for an item, and for its own input rows of `cols` columns.
    static size_t scratch_bytes_of_any();
    static size_t own_bytes(int64_t cols);

private:
    struct Split {
        int64_t panels;     // of an item at most; even
        int64_t row_spans;  // rows are cut into so many parts
    };
    struct Part {
        const LinearJob *job;
        int64_t panel_begin, panel_end, row_begin, row_end;
    };
    Split split(int64_t rows) const;
    int64_t rows(const Step &step) const { return rows_of(step, quants_.used() ? quants_.outputs : input_.outputs); }
    Part part(int64_t rows, uint32_t item) const;
    QuantRows own_rows(const Step &step, int64_t rows, Scratch &scratch) const;
    void direct(const LinearJob &job, LinearArgs args) const;
    void through_tiles(const LinearJob &job, LinearArgs args, int64_t rows, Scratch &scratch) const;
    void one_tile(const LinearJob &job, LinearArgs args, int64_t rows, Scratch &scratch) const;

    FloatBuffer input_;
    QuantBuffer quants_;
    std::shared_ptr<InputRecipe> own_;
    std::vector<LinearJob> jobs_;
    uint64_t index_;
    int64_t cols_, all_panels_ = 0;
    bool tiled_ = false;
};

}  // namespace kvarn
