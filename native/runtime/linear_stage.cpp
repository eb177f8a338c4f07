#include "runtime/linear_stage.h"

#include <algorithm>

namespace kvarn {
namespace {

constexpr int64_t kTileRows = 16;          // rows of a result that wait in scratch for what follows
constexpr int64_t kTilePanels = 32;        // and panels
constexpr size_t kCacheBytes = 256 << 10;  // weights of an item that several row tiles read: a part of L2
constexpr int64_t kFewRows = 8;            // up to here weights are read once: items are cut for balance alone
constexpr int64_t kItemsPerThread = 6;

bool needs_tile(const LinearJob &job) { return job.up || job.residual.data || job.quants.used(); }

}  // namespace

void PrepareStage::run(const Step &step, uint32_t item, Scratch &scratch) noexcept {
    const int64_t rows = rows_of(step, outputs_), count = items(step);
    float *normed = reinterpret_cast<float *>(scratch.data);
    for (int64_t r = rows * item / count; r < rows * (item + 1) / count; ++r) {
        const float *x = recipe_.x.row(r);
        if (recipe_.norm.used()) {
            recipe_.norm.apply(kernels(), x, normed, recipe_.x.width);
            x = normed;
        }
        kernels().quantize(x, recipe_.x.width, 1, r, quants_.rows);
    }
}

LinearStage::LinearStage(std::string label, StageContext c, FloatBuffer input, QuantBuffer quants,
                         std::shared_ptr<InputRecipe> own, std::vector<LinearJob> jobs, uint64_t index)
    : Stage(std::move(label), c), input_(input), quants_(quants), own_(std::move(own)), jobs_(std::move(jobs)),
      index_(index), cols_(jobs_.front().weight->matrix().cols) {
    for (const LinearJob &job : jobs_) {
        const PackedMatrix &m = job.weight->matrix();
        all_panels_ += m.panels();
        panel_bytes_ = std::max(panel_bytes_, panel_bytes(m.format, m.cols) * (job.up ? 2 : 1));
        tiled_ |= needs_tile(job);
    }
}

LinearStage::Split LinearStage::split(int64_t rows) const {
    int64_t panels = (all_panels_ + kItemsPerThread * threads() - 1) / (kItemsPerThread * threads());
    if (rows > kFewRows) panels = std::min(panels, std::max<int64_t>(2, int64_t(kCacheBytes / panel_bytes_)));
    if (tiled_) panels = std::min(panels, kTilePanels);
    panels = (panels + 1) / 2 * 2;  // two panels are a group of 32 of the result, which is quantized as one
    const int64_t blocks = (all_panels_ + panels - 1) / panels;
    const int64_t wanted = (2 * threads() + blocks - 1) / blocks;
    const int64_t spans = threads() == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, rows / (4 * kTileTokens)));
    return {panels, spans};
}

uint32_t LinearStage::items(const Step &step) const {
    const int64_t rows = rows_of(step, quants_.used() ? quants_.outputs : input_.outputs);
    if (rows == 0) return 0;
    const Split s = split(rows);
    int64_t blocks = 0;
    for (const LinearJob &job : jobs_) blocks += (job.weight->matrix().panels() + s.panels - 1) / s.panels;
    return uint32_t(blocks * s.row_spans);
}

size_t LinearStage::scratch_bytes(int64_t cols) {
    const size_t starts = round_up(size_t(linear_scratch_elements(cols)) * 4, 64);
    return starts + 2 * size_t(kTileRows * kTilePanels * kPanelRows) * sizeof(float);
}

size_t LinearStage::own_bytes(int64_t cols) {
    return quant_bytes(kOwnRows, cols) + round_up(size_t(cols) * sizeof(float), 64);
}

// The thread's own copy of the input, made when it takes its first item of the stage.
const QuantRows &LinearStage::own_rows(const Step &step, Scratch &scratch, QuantRows &place) const {
    place = quant_rows(scratch.own_rows, kOwnRows, cols_);
    const uint64_t stamp = step.id << 16 | index_;
    if (scratch.own_stamp == stamp) return place;
    float *normed = reinterpret_cast<float *>(scratch.own_rows + quant_bytes(kOwnRows, cols_));
    for (int64_t r = 0; r < rows_of(step, own_->x.outputs); ++r) {
        const float *x = own_->x.row(r);
        if (own_->norm.used()) {
            own_->norm.apply(kernels(), x, normed, cols_);
            x = normed;
        }
        kernels().quantize(x, cols_, 1, r, place);
    }
    scratch.own_stamp = stamp;
    return place;
}

void LinearStage::run(const Step &step, uint32_t item, Scratch &scratch) noexcept {
    const int64_t rows = rows_of(step, quants_.used() ? quants_.outputs : input_.outputs);
    const Split s = split(rows);
    QuantRows place;
    Source in{&quants_.rows, &input_};
    if (own_ && rows <= kOwnRows) in.quants = &own_rows(step, scratch, place);
    int64_t block = item / s.row_spans;
    const int64_t span = item % s.row_spans;
    for (const LinearJob &job : jobs_) {
        const int64_t panels = job.weight->matrix().panels(), blocks = (panels + s.panels - 1) / s.panels;
        if (block >= blocks) {
            block -= blocks;
            continue;
        }
        run_job(job, in, block * s.panels, std::min(panels, (block + 1) * s.panels), rows * span / s.row_spans,
                rows * (span + 1) / s.row_spans, scratch);
        return;
    }
}

void LinearStage::run_job(const LinearJob &job, const Source &in, int64_t panel_begin, int64_t panel_end,
                          int64_t row_begin, int64_t row_end, Scratch &scratch) const {
    int32_t *starts = reinterpret_cast<int32_t *>(scratch.data);
    float *tile = reinterpret_cast<float *>(scratch.data + round_up(size_t(linear_scratch_elements(cols_)) * 4, 64));
    LinearArgs args{&job.weight->matrix(), panel_begin, panel_end, in.quants, in.floats->data, in.floats->stride,
                    row_begin, row_end, job.out.data, job.out.stride, 0, 0, starts};
    if (!needs_tile(job)) return direct(job, args);
    for (int64_t r = row_begin; r < row_end; r += kTileRows) {
        args.row_begin = r;
        args.row_end = std::min(row_end, r + kTileRows);
        through_tile(job, args, tile, tile + kTileRows * kTilePanels * kPanelRows);
    }
}

// The result goes straight to its buffer; bias, function, scale and cap are applied there.
void LinearStage::direct(const LinearJob &job, LinearArgs args) const {
    kernels().linear(args);
    const int64_t begin = args.panel_begin * kPanelRows;
    const int64_t n = std::min(args.panel_end * kPanelRows, args.w->rows) - begin;
    for (int64_t r = args.row_begin; r < args.row_end; ++r) {
        float *out = args.out + r * args.out_stride + begin;
        if (job.scale != 1.0f) kernels().scale_cap(job.scale, 0.0f, out, n);
        if (job.bias) kernels().add(out, job.bias->values.data() + begin, out, n);
        if (job.function) kernels().activation(*job.function, out, out, n);
        if (job.softcap > 0) kernels().scale_cap(1.0f, job.softcap, out, n);
    }
}

// The result of a few rows waits in scratch while its gate, residual or quantization is done.
void LinearStage::through_tile(const LinearJob &job, LinearArgs args, float *tile, float *up_tile) const {
    const int64_t begin = args.panel_begin * kPanelRows;
    const int64_t n = std::min(args.panel_end * kPanelRows, args.w->rows) - begin;
    const int64_t stride = (args.panel_end - args.panel_begin) * kPanelRows;
    const auto compute = [&](const PackedWeight &weight, float *to) {
        args.w = &weight.matrix();
        args.out = to;
        args.out_stride = stride;
        args.out_row = args.row_begin;
        args.out_feature = begin;
        kernels().linear(args);
    };
    compute(*job.weight, tile);
    if (job.up) compute(*job.up, up_tile);
    for (int64_t r = args.row_begin; r < args.row_end; ++r) {
        float *row = tile + (r - args.row_begin) * stride, *up = up_tile + (r - args.row_begin) * stride;
        if (job.bias) kernels().add(row, job.bias->values.data() + begin, row, n);
        if (job.up_bias) kernels().add(up, job.up_bias->values.data() + begin, up, n);
        if (job.up)
            kernels().gated(*job.function, row, up, row, n);
        else if (job.function)
            kernels().activation(*job.function, row, row, n);
        if (job.residual.data) kernels().add(job.residual.row(r) + begin, row, row, n);
        if (job.out.data) std::copy(row, row + n, job.out.row(r) + begin);
        if (job.quants.used())
            kernels().quantize_groups(row, r, begin / kGroup, (begin + n) / kGroup, job.quants.rows);
    }
}

}  // namespace kvarn
