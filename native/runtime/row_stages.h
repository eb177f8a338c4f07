// Stages that treat each row by itself.
#pragma once
#include "runtime/stage.h"

namespace kvarn {

// out[t] = scale * table[token_ids[t]]
class EmbedStage final : public RowStage {
public:
    EmbedStage(StageContext c, std::shared_ptr<PackedWeight> table, FloatBuffer out, float scale)
        : RowStage("embed", c, false), table_(std::move(table)), out_(out), scale_(scale) {}
    void row(const Step &step, int64_t r) noexcept override;

private:
    std::shared_ptr<PackedWeight> table_;
    FloatBuffer out_;
    float scale_;
};

// out[t] = x[t] + table[positions[t]]
class PositionStage final : public RowStage {
public:
    PositionStage(StageContext c, std::shared_ptr<PackedWeight> table, FloatBuffer x, FloatBuffer out)
        : RowStage("position_embed", c, false), table_(std::move(table)), x_(x), out_(out) {}
    size_t scratch_bytes() const override { return size_t(table_->matrix().cols) * sizeof(float); }
    void run(const Step &step, uint32_t item, Scratch &scratch) noexcept override;
    void row(const Step &, int64_t) noexcept override {}

private:
    std::shared_ptr<PackedWeight> table_;
    FloatBuffer x_, out_;
};

// out = norm(x)
class NormStage final : public RowStage {
public:
    NormStage(StageContext c, NormParameters norm, FloatBuffer x, FloatBuffer out)
        : RowStage("norm", c, x.outputs), norm_(std::move(norm)), x_(x), out_(out) {}
    void row(const Step &step, int64_t r) noexcept override;

private:
    NormParameters norm_;
    FloatBuffer x_, out_;
};

class RopeStage final : public RowStage {
public:
    RopeStage(StageContext c, std::shared_ptr<RotaryTable> table, FloatBuffer x, FloatBuffer out, int64_t heads)
        : RowStage("rope", c, false), table_(std::move(table)), x_(x), out_(out), heads_(heads) {}
    void row(const Step &step, int64_t r) noexcept override;

private:
    std::shared_ptr<RotaryTable> table_;
    FloatBuffer x_, out_;
    int64_t heads_;
};

class KvWriteStage final : public RowStage {
public:
    KvWriteStage(StageContext c, KvLayerView kv, int64_t kv_group, FloatBuffer k, FloatBuffer v)
        : RowStage("kv_write", c, false), kv_(kv), kv_group_(kv_group), k_(k), v_(v) {}
    void run(const Step &step, uint32_t item, Scratch &scratch) noexcept override;
    void row(const Step &step, int64_t r) noexcept override;

private:
    KvLayerView kv_;
    int64_t kv_group_;
    FloatBuffer k_, v_;
};

class ActivationStage final : public RowStage {
public:
    ActivationStage(StageContext c, Function f, FloatBuffer x, FloatBuffer out)
        : RowStage("activation", c, x.outputs), function_(f), x_(x), out_(out) {}
    void row(const Step &step, int64_t r) noexcept override;

private:
    Function function_;
    FloatBuffer x_, out_;
};

class GatedStage final : public RowStage {
public:
    GatedStage(StageContext c, Function f, FloatBuffer gate, FloatBuffer up, FloatBuffer out)
        : RowStage("gated_activation", c, gate.outputs), function_(f), gate_(gate), up_(up), out_(out) {}
    void row(const Step &step, int64_t r) noexcept override;

private:
    Function function_;
    FloatBuffer gate_, up_, out_;
};

class AddStage final : public RowStage {
public:
    AddStage(StageContext c, FloatBuffer a, FloatBuffer b, FloatBuffer out)
        : RowStage("add", c, a.outputs), a_(a), b_(b), out_(out) {}
    void row(const Step &step, int64_t r) noexcept override;

private:
    FloatBuffer a_, b_, out_;
};

// out[r] = x[output_rows[r]]
class SelectStage final : public RowStage {
public:
    SelectStage(StageContext c, FloatBuffer x, FloatBuffer out) : RowStage("select_rows", c, true), x_(x), out_(out) {}
    void row(const Step &step, int64_t r) noexcept override;

private:
    FloatBuffer x_, out_;
};

}  // namespace kvarn
