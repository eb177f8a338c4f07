#include "runtime/row_stages.h"

#include <cstring>

#include "runtime/pack.h"

namespace kvarn {

void EmbedStage::row(const Step &step, int64_t r) noexcept {
    float *out = out_.row(r);
    unpack_row(table_->matrix(), step.batch.token_ids[r], out);
    if (scale_ != 1.0f) kernels().scale_cap(scale_, 0.0f, out, out_.width);
}

void PositionStage::run(const Step &step, uint32_t item, Scratch &scratch) noexcept {
    const int64_t rows = rows_of(step, outputs_), count = items(step);
    float *entry = reinterpret_cast<float *>(scratch.data);
    for (int64_t r = rows * item / count; r < rows * (item + 1) / count; ++r) {
        unpack_row(table_->matrix(), step.batch.positions[r], entry);
        kernels().add(x_.row(r), entry, out_.row(r), out_.width);
    }
}

void NormStage::row(const Step &, int64_t r) noexcept { norm_.apply(kernels(), x_.row(r), out_.row(r), x_.width); }

void RopeStage::row(const Step &step, int64_t r) noexcept {
    kernels().rope({x_.row(r), out_.row(r), heads_, x_.width / heads_, table_->pairs,
                    table_->at(step.batch.positions[r]), table_->interleaved});
}

void KvWriteStage::run(const Step &step, uint32_t item, Scratch &) noexcept {
    const int64_t rows = step.batch.tokens, count = items(step);
    const int64_t end = sub_block_from(step.batch, rows * (item + 1) / count, kv_.type);
    for (int64_t r = sub_block_from(step.batch, rows * item / count, kv_.type); r < end; ++r) row(step, r);
}

void KvWriteStage::row(const Step &step, int64_t r) noexcept {
    for (int64_t h = 0; h < kv_.heads; ++h)
        kernels().kv_write(kv_, step.batch.slot(r, kv_group_), step.place(r, kv_group_), h, k_.row(r) + h * kv_.key_dim,
                           v_.row(r) + h * kv_.value_dim);
}

void ActivationStage::row(const Step &, int64_t r) noexcept {
    kernels().activation(function_, x_.row(r), out_.row(r), x_.width);
}

void GatedStage::row(const Step &, int64_t r) noexcept {
    kernels().gated(function_, gate_.row(r), up_.row(r), out_.row(r), out_.width);
}

void AddStage::row(const Step &, int64_t r) noexcept { kernels().add(a_.row(r), b_.row(r), out_.row(r), out_.width); }

void SelectStage::row(const Step &step, int64_t r) noexcept {
    std::memcpy(out_.row(r), x_.row(step.batch.output_rows[r]), size_t(out_.width) * sizeof(float));
}

}  // namespace kvarn
