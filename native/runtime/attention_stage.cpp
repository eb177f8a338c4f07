#include "runtime/attention_stage.h"

#include <algorithm>
#include <cstring>

#include "runtime/pool.h"

namespace kvarn {
namespace {

// (sequence, KV head) pairs of a decode step up to which contexts are cut over threads: beyond, there is enough to do.
int64_t most_cut_pairs(int threads) { return threads > 1 ? 2 * int64_t(threads) : 0; }
constexpr int64_t kMaxParts = 16;
constexpr int64_t kItemsPerThread = 2;  // of other steps, at least, where there are rows enough

}  // namespace

void HeadRecipe::apply(const Kernels &kernels, const float *from, float *out, int64_t head_dim, int64_t position) const {
    if (norm.used()) {
        kernels.norm({from, out, 1, head_dim, norm.weight->values.data(),
                      norm.bias ? norm.bias->values.data() : nullptr, norm.eps, norm.layer});
        from = out;
    }
    if (rope)
        kernels.rope({from, out, 1, head_dim, rope->pairs, rope->at(position), rope->interleaved});
    else if (from != out)
        std::memcpy(out, from, size_t(head_dim) * sizeof(float));
}

void HeadsStage::run(const Step &step, uint32_t item, Scratch &scratch) noexcept {
    const KvLayerView &kv = shape_.kv;
    const int64_t rows = step.batch.tokens, count = items(step);
    float *key = reinterpret_cast<float *>(scratch.data);
    const int64_t end = sub_block_from(step.batch, rows * (item + 1) / count, kv.type);
    for (int64_t r = sub_block_from(step.batch, rows * item / count, kv.type); r < end; ++r) {
        const int64_t position = step.batch.positions[r];
        for (int64_t h = 0; h < shape_.heads && input_.q.used(); ++h) {
            float *q = input_.q.x.row(r) + h * kv.key_dim;
            input_.q.apply(kernels(), q, q, kv.key_dim, position);
        }
        for (int64_t h = 0; h < kv.heads; ++h) {
            input_.k.apply(kernels(), input_.k.x.row(r) + h * kv.key_dim, key, kv.key_dim, position);
            kernels().kv_write(kv, step.batch.slot(r, shape_.kv_group), step.place(r, shape_.kv_group), h, key,
                               input_.v.row(r) + h * kv.value_dim);
        }
    }
}

AttentionStage::AttentionStage(StageContext c, AttentionInput input, AttentionShape shape, FloatBuffer out,
                               QuantBuffer quants, float *partials)
    : Stage("attention", c), input_(std::move(input)), shape_(shape), out_(out), quants_(quants), partials_(partials),
      finished_(new std::atomic<int>[size_t(most_cut_pairs(c.threads)) + 1]()) {}

int64_t AttentionStage::partial_elements(const AttentionShape &shape, int threads) {
    return most_cut_pairs(threads) * shape.max_spans * shape.group() * attention_partial_elements(shape.kv.value_dim);
}

size_t AttentionStage::scratch_bytes(int64_t group, int64_t key_dim, int64_t value_dim, KvType type) {
    const int64_t own = (group + 1) * key_dim + 16;
    return size_t(attention_scratch_elements(group, key_dim, value_dim, type) + own) * sizeof(float);
}

float *AttentionStage::kernel_scratch(Scratch &scratch) const {
    return reinterpret_cast<float *>(scratch.data) + (shape_.group() + 1) * shape_.kv.key_dim + 16;
}

// Into how many parts a decode step cuts each sequence's context.
int64_t AttentionStage::parts(const Step &step) const {
    const int64_t pairs = step.batch.sequences * shape_.kv.heads;
    if (pairs > most_cut_pairs(threads())) return 1;
    return std::min<int64_t>(kMaxParts, (4 * threads() + pairs - 1) / pairs);
}

uint32_t AttentionStage::items(const Step &step) const {
    if (step.decode) return uint32_t(step.batch.sequences * shape_.kv.heads * parts(step));
    return uint32_t(int64_t(step.tiles.size()) * shape_.kv.heads * cuts(step));
}

// Into how many parts the rows of a tile are cut, for where tiles and KV heads are too few to keep threads busy: all
// parts read the same keys, so as few as will do.
int64_t AttentionStage::cuts(const Step &step) const {
    const int64_t items = step.batch.tokens / step.tile_rows * shape_.kv.heads;  // as if all were as large as the largest
    return items >= kItemsPerThread * threads() ? 1 : (kItemsPerThread * threads() + items - 1) / items;
}

void AttentionStage::run(const Step &step, uint32_t item, Scratch &scratch) noexcept {
    if (step.decode)
        decode_item(step, item, scratch);
    else
        prefill_item(step, item, scratch);
}

// Quantizes the finished columns of a KV head's query heads.
void AttentionStage::finish(const Step &step, int64_t row, int64_t rows, int64_t kv_head) const {
    if (!quants_.used()) return;
    const QuantRows quants = quants_.rows(step.batch.tokens);
    const int64_t columns = shape_.group() * shape_.kv.value_dim, begin = kv_head * columns;
    kernels().quantize({out_.row(row) + begin, out_.stride, row, row + rows, begin / kGroup,
                        (begin + columns) / kGroup, quants});
}

void AttentionStage::prefill_item(const Step &step, uint32_t item, Scratch &scratch) const {
    // Tiles are in order of cost: dealt out like cards, every thread's share begins with costly ones.
    const int64_t dealt = Pool::dealt(item, items(step), threads());
    const int64_t count = cuts(step), part = dealt % count, pair = dealt / count;
    const int64_t kv_head = pair % shape_.kv.heads, group = shape_.group();
    QueryTile tile = step.tiles[size_t(pair / shape_.kv.heads)];
    const int64_t skipped = tile.rows * part / count;
    tile.rows = tile.rows * (part + 1) / count - skipped;
    if (tile.rows == 0) return;
    tile.row += skipped;
    tile.position += skipped;
    AttentionArgs args{};
    args.kv = &shape_.kv;
    args.block_table = step.batch.table(tile.sequence, shape_.kv_group);
    args.kv_head = kv_head;
    args.group = group;
    args.q = input_.q.x.row(tile.row) + kv_head * group * shape_.kv.key_dim;
    args.q_stride = input_.q.x.stride;
    const Batch &batch = step.batch;
    const TreeRows tree{batch.tree_parents, batch.positions, batch.slot_mapping + shape_.kv_group,
                        batch.groups,       tile.row,        tile.tree};
    args.rows = tile.rows;
    args.tree = tile.tree < 0 ? nullptr : &tree;
    args.position = tile.position;
    args.window = shape_.window;
    args.scale = shape_.scale;
    args.softcap = shape_.softcap;
    args.span_begin = 0;
    args.span_end = shape_.max_spans;
    args.out = out_.row(tile.row) + kv_head * group * shape_.kv.value_dim;
    args.out_stride = out_.stride;
    args.scratch = kernel_scratch(scratch);
    kernels().attention(args);
    finish(step, tile.row, tile.rows, kv_head);
}

AttentionStage::Cut AttentionStage::cut_of(const Step &step, uint32_t item) const {
    const int64_t count = parts(step), part = item % count, pair = item / count;
    const int64_t sequence = pair / shape_.kv.heads, position = step.batch.positions[sequence];
    const int64_t first = shape_.window > 0 && position >= shape_.window ? (position - shape_.window + 1) / kKeySpan : 0;
    const int64_t spans = position / kKeySpan + 1 - first;
    return {sequence, pair % shape_.kv.heads, part, first, spans, spans * part / count, spans * (part + 1) / count};
}

// Where an item's keys begin; of an item without any, the last ones.
KeysAfter AttentionStage::keys_of(const Step &step, const Cut &cut) const {
    const int64_t position = step.batch.positions[cut.sequence];
    const int64_t seen = shape_.window > 0 && position >= shape_.window ? position - shape_.window + 1 : 0;
    const int64_t first = std::min(std::max((cut.first + cut.begin) * kKeySpan, seen), position);
    return {step.batch.table(cut.sequence, shape_.kv_group), cut.kv_head, first / kSubBlock * kSubBlock, position};
}

void AttentionStage::decode_item(const Step &step, uint32_t item, Scratch &scratch) const {
    const Cut cut = cut_of(step, item);
    const int64_t count = parts(step), s = cut.sequence, kv_head = cut.kv_head, pair = s * shape_.kv.heads + kv_head;
    const bool any = cut.begin < cut.end;
    const int64_t kd = shape_.kv.key_dim, vd = shape_.kv.value_dim, group = shape_.group();
    const int64_t position = step.batch.positions[s];

    float *own = reinterpret_cast<float *>(scratch.data), *key = own + group * kd;
    const float *q = input_.q.x.row(s) + kv_head * group * kd;
    if (input_.q.used() && any) {
        for (int64_t h = 0; h < group; ++h) input_.q.apply(kernels(), q + h * kd, own + h * kd, kd, position);
        q = own;
    }
    if (input_.write && cut.part == count - 1) {  // the part that has the newest key
        input_.k.apply(kernels(), input_.k.x.row(s) + kv_head * kd, key, kd, position);
        const int64_t slot = step.batch.slot(s, shape_.kv_group);
        kernels().kv_write(shape_.kv, slot, slot, kv_head, key, input_.v.row(s) + kv_head * vd);
    }
    const int64_t entry = attention_partial_elements(vd);
    float *partial = count > 1 ? partials_ + pair * shape_.max_spans * group * entry : nullptr;
    if (any) {
        AttentionArgs args{};
        args.kv = &shape_.kv;
        args.block_table = step.batch.table(s, shape_.kv_group);
        args.kv_head = kv_head;
        args.group = group;
        args.q = q;
        args.q_stride = input_.q.x.stride;
        args.rows = 1;
        args.position = position;
        args.window = shape_.window;
        args.scale = shape_.scale;
        args.softcap = shape_.softcap;
        args.span_begin = cut.first + cut.begin;
        args.span_end = cut.first + cut.end;
        args.partial = partial ? partial + cut.begin * group * entry : nullptr;
        args.out = out_.row(s) + kv_head * group * vd;
        args.out_stride = out_.stride;
        args.scratch = kernel_scratch(scratch);
        KeysAfter after{};
        if (item + 1 < items(step)) {  // what this thread takes next, but at the end of its share
            after = keys_of(step, cut_of(step, item + 1));
            args.after = &after;
        }
        kernels().attention(args);
    }
    if (partial) {
        if (finished_[size_t(pair)].fetch_add(1, std::memory_order_acq_rel) + 1 < count) return;
        finished_[size_t(pair)].store(0, std::memory_order_relaxed);
        merge_parts(s, kv_head, cut.spans, partial, kernel_scratch(scratch));
    }
    finish(step, s, 1, kv_head);
}

void AttentionStage::merge_parts(int64_t sequence, int64_t kv_head, int64_t spans, const float *partial,
                                 float *scratch) const {
    const int64_t group = shape_.group(), vd = shape_.kv.value_dim, entry = attention_partial_elements(vd);
    for (int64_t h = 0; h < group; ++h)
        kernels().attention_merge(partial + h * entry, spans, group * entry, vd, scratch,
                                  out_.row(sequence) + (kv_head * group + h) * vd);
}

}  // namespace kvarn
