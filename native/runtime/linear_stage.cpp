#include "runtime/linear_stage.h"

#include <algorithm>

namespace kvarn {
namespace {

// Results that wait in scratch for what follows: few rows of many panels, or many rows of two panels.
constexpr int64_t kFewRows = kTileTokens;  // up to here weights are read once: items are cut for balance alone
constexpr int64_t kFewRowsPanels = 32;
constexpr int64_t kManyRowsPanels = 2;
constexpr int64_t kTileElements = kPanelRows * 512;
static_assert(kFewRows * kFewRowsPanels * kPanelRows <= kTileElements);
static_assert(linear_row_span(1) * kManyRowsPanels * kPanelRows <= kTileElements);
constexpr int64_t kItemsPerThread = 6;

bool needs_tile(const LinearJob &job) { return job.up || job.residual.data || job.quants.used(); }

}  // namespace

// The int8 row r of `to` from the recipe's row r; `normed` holds a row of floats meanwhile.
void InputRecipe::make_row(const Kernels &kernels, int64_t r, const QuantRows &to, float *normed) const {
    const float *from = x.row(r);
    if (norm.used()) {
        norm.apply(kernels, from, normed, x.width);
        from = normed;
    }
    kernels.quantize({from, x.width, r, r + 1, 0, to.groups(), to});
}

void PrepareStage::run(const Step &step, uint32_t item, Scratch &scratch) noexcept {
    const int64_t rows = rows_of(step, outputs_), count = items(step);
    const QuantRows to = quants_.rows(rows);
    for (int64_t r = rows * item / count; r < rows * (item + 1) / count; ++r)
        recipe_.make_row(kernels(), r, to, reinterpret_cast<float *>(scratch.data));
}

LinearStage::LinearStage(std::string label, StageContext c, FloatBuffer input, QuantBuffer quants,
                         std::shared_ptr<InputRecipe> own, std::vector<LinearJob> jobs, uint64_t index)
    : Stage(std::move(label), c), input_(input), quants_(quants), own_(std::move(own)), jobs_(std::move(jobs)),
      index_(index), cols_(jobs_.front().weight->matrix().cols) {
    for (const LinearJob &job : jobs_) {
        all_panels_ += job.weight->matrix().panels();
        tiled_ |= needs_tile(job);
    }
}

LinearStage::Split LinearStage::split(int64_t rows) const {
    int64_t panels = (all_panels_ + kItemsPerThread * threads() - 1) / (kItemsPerThread * threads());
    if (tiled_ && rows <= kFewRows) panels = std::min(panels, kFewRowsPanels);
    panels = (panels + 1) / 2 * 2;  // two panels are a group of 32 of the result, which is quantized as one
    const int64_t blocks = (all_panels_ + panels - 1) / panels;
    const int64_t wanted = (2 * threads() + blocks - 1) / blocks;
    const int64_t tiles = (rows + kTileTokens - 1) / kTileTokens;
    const int64_t spans = threads() == 1 ? 1 : std::max<int64_t>(1, std::min(wanted, tiles / 4));
    return {panels, spans};
}

uint32_t LinearStage::items(const Step &step) const {
    const int64_t count = rows(step);
    if (count == 0) return 0;
    const Split s = split(count);
    int64_t blocks = 0;
    for (const LinearJob &job : jobs_) blocks += (job.weight->matrix().panels() + s.panels - 1) / s.panels;
    return uint32_t(blocks * s.row_spans);
}

LinearStage::Part LinearStage::part(int64_t rows, uint32_t item) const {
    const Split s = split(rows);
    int64_t block = item / s.row_spans;
    const int64_t span = item % s.row_spans, tiles = (rows + kTileTokens - 1) / kTileTokens;
    const LinearJob *job = jobs_.data();
    for (;; ++job) {
        const int64_t blocks = (job->weight->matrix().panels() + s.panels - 1) / s.panels;
        if (block < blocks) break;
        block -= blocks;
    }
    return {job, block * s.panels, std::min(job->weight->matrix().panels(), (block + 1) * s.panels),
            tiles * span / s.row_spans * kTileTokens, std::min(rows, tiles * (span + 1) / s.row_spans * kTileTokens)};
}

size_t LinearStage::scratch_bytes_of_any() { return 2 * size_t(kTileElements) * sizeof(float); }

size_t LinearStage::own_bytes(int64_t cols) {
    return round_up(quant_bytes(kOwnRows, cols), 64) + round_up(size_t(cols) * sizeof(float), 64);
}

// The thread's own copy of the input, made when it takes its first item of the stage.
QuantRows LinearStage::own_rows(const Step &step, int64_t rows, Scratch &scratch) const {
    const QuantRows own{scratch.own_rows, cols_, rows == 1};
    const uint64_t stamp = step.id << 16 | index_;
    if (scratch.own_stamp == stamp) return own;
    float *normed = reinterpret_cast<float *>(scratch.own_rows + round_up(quant_bytes(kOwnRows, cols_), 64));
    for (int64_t r = 0; r < rows; ++r) own_->make_row(kernels(), r, own, normed);
    scratch.own_stamp = stamp;
    return own;
}

void LinearStage::run(const Step &step, uint32_t item, Scratch &scratch) noexcept {
    const int64_t count = rows(step);
    const Part p = part(count, item);
    const QuantRows in = own_ && count <= kOwnRows ? own_rows(step, count, scratch) : quants_.rows(count);
    LinearArgs args{};
    args.w = &p.job->weight->matrix();
    args.panel_begin = p.panel_begin;
    args.panel_end = p.panel_end;
    args.xq = &in;
    args.xf = input_.data;
    args.x_stride = input_.stride;
    args.row_begin = p.row_begin;
    args.row_end = p.row_end;
    if (needs_tile(*p.job))
        through_tiles(*p.job, args, count, scratch);
    else
        direct(*p.job, args);
}

// The result goes straight to its buffer; scale, bias, function and cap are applied there.
void LinearStage::direct(const LinearJob &job, LinearArgs args) const {
    args.out = job.out.data;
    args.out_stride = job.out.stride;
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

// The result waits in scratch, a tile at a time, while its gate, residual or quantization is done.
void LinearStage::through_tiles(const LinearJob &job, LinearArgs args, int64_t rows, Scratch &scratch) const {
    const bool few = args.row_end - args.row_begin <= kFewRows;
    const int64_t panels = few ? kFewRowsPanels : kManyRowsPanels, end = args.panel_end, last = args.row_end;
    const int64_t span = few ? kFewRows : linear_row_span(cols_);
    for (int64_t r = args.row_begin; r < last; r += span)
        for (int64_t p = args.panel_begin; p < end; p += panels) {
            LinearArgs part = args;
            part.panel_begin = p;
            part.panel_end = std::min(end, p + panels);
            part.row_begin = r;
            part.row_end = std::min(last, r + span);
            one_tile(job, part, rows, scratch);
        }
}

void LinearStage::one_tile(const LinearJob &job, LinearArgs args, int64_t rows, Scratch &scratch) const {
    float *tile = reinterpret_cast<float *>(scratch.data), *up_tile = tile + kTileElements;
    const int64_t begin = args.panel_begin * kPanelRows;
    const int64_t n = std::min(args.panel_end * kPanelRows, args.w->rows) - begin;
    const int64_t stride = (args.panel_end - args.panel_begin) * kPanelRows;
    args.out_stride = stride;
    args.out_row = args.row_begin;
    args.out_feature = begin;
    args.out = tile;
    kernels().linear(args);
    if (job.up) {
        args.w = &job.up->matrix();
        args.out = up_tile;
        kernels().linear(args);
    }
    const QuantRows quants = job.quants.rows(rows);
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
    }
    if (job.quants.used())
        kernels().quantize({tile, stride, args.row_begin, args.row_end, begin / kGroup, (begin + n) / kGroup, quants});
}

}  // namespace kvarn
