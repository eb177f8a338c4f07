// Attention of a layer, with the preparation of its queries and keys.
#pragma once
#include <atomic>

#include "runtime/stage.h"

namespace kvarn {

// Norm of each head and rotation, either or both unused, of queries or keys.
struct HeadRecipe {
    FloatBuffer x;
    NormParameters norm;
    std::shared_ptr<RotaryTable> rope;  // may be null

    bool used() const { return norm.used() || rope != nullptr; }
    void apply(const Kernels &kernels, const float *x, float *out, int64_t head_dim, int64_t position) const;
};

// What may be done to q, k and v before attention reads them. In a decode step attention itself does it, head by head.
struct AttentionInput {
    HeadRecipe q, k;
    FloatBuffer v;
    bool write;  // k and v are to be stored (else another stage did, and q is ready)
};

struct AttentionShape {
    KvLayerView kv;
    int64_t kv_group;  // whose block tables the layer reads
    int64_t heads;
    float scale, softcap;
    int64_t window;  // 0: none
    int64_t max_spans;

    int64_t group() const { return heads / kv.heads; }
};

// Prepares q in place and stores k and v, token by token; not in decode steps.
class HeadsStage final : public RowStage {
public:
    HeadsStage(StageContext c, AttentionInput input, AttentionShape shape)
        : RowStage("heads", c, false), input_(std::move(input)), shape_(shape) {}
    bool skip(const Step &step) const override { return step.decode; }
    size_t scratch_bytes() const override { return size_t(shape_.kv.heads * shape_.kv.key_dim) * sizeof(float); }
    void run(const Step &step, uint32_t item, Scratch &scratch) noexcept override;
    void row(const Step &, int64_t) noexcept override {}

private:
    AttentionInput input_;
    AttentionShape shape_;
};

class AttentionStage final : public Stage {
public:
    AttentionStage(StageContext c, AttentionInput input, AttentionShape shape, FloatBuffer out, QuantBuffer quants,
                   float *partials);
    uint32_t items(const Step &step) const override;
    void run(const Step &step, uint32_t item, Scratch &scratch) noexcept override;
    size_t scratch_bytes() const override {
        return scratch_bytes(shape_.group(), shape_.kv.key_dim, shape_.kv.value_dim, shape_.kv.type);
    }
    static size_t scratch_bytes(int64_t group, int64_t key_dim, int64_t value_dim, KvType type);

    // Elements that `partials` must hold for steps of few sequences, whose contexts are cut over threads.
    static int64_t partial_elements(const AttentionShape &shape, int threads);

private:
    // An item of a decode step: spans begin … end - 1 of the `spans` that a KV head's queries see of a sequence, of which
    // `first` is the first. There may be none.
    struct Cut {
        int64_t sequence, kv_head, part, first, spans, begin, end;
    };

    int64_t parts(const Step &step) const;
    Cut cut_of(const Step &step, uint32_t item) const;
    KeysAfter keys_of(const Step &step, const Cut &cut) const;
    int64_t cuts(const Step &step) const;
    void prefill_item(const Step &step, uint32_t item, Scratch &scratch) const;
    void decode_item(const Step &step, uint32_t item, Scratch &scratch) const;
    void finish(const Step &step, int64_t row, int64_t rows, int64_t kv_head) const;
    void merge_parts(int64_t sequence, int64_t kv_head, int64_t spans, const float *partial, float *scratch) const;
    float *kernel_scratch(Scratch &scratch) const;

    AttentionInput input_;
    AttentionShape shape_;
    FloatBuffer out_;
    QuantBuffer quants_;
    float *partials_;
    std::unique_ptr<std::atomic<int>[]> finished_;  // parts done of each (sequence, KV head) that is cut
};

}  // namespace kvarn
