#include "runtime/storage.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "kvarn/kv_token.h"
#include "runtime/pack.h"
#include "runtime/pool.h"

namespace kvarn {
namespace {

constexpr int64_t kPanelsPerItem = 4;
constexpr size_t kPanelSlack = 64;
constexpr int64_t kPiece = int64_t(2) << 20;  // of memory to touch in one go, of a layer

void check_blocks(Format format, int64_t rows, int64_t cols) {
    if (rows < 1 || cols < 1 || cols % traits(format).block_size != 0)
        throw std::invalid_argument(std::string("a ") + traits(format).name + " matrix of " + std::to_string(rows) +
                                    " x " + std::to_string(cols) + " does not consist of whole blocks");
}

KvLayerView view(const KvCache::Layer &layer, int64_t block_size, KvType type) {
    return {nullptr, block_size, layer.heads, layer.key_dim, layer.value_dim, type};
}

size_t layer_bytes(const KvLayerView &layer, int64_t num_blocks) {
    return round_up(size_t(layer.block_bytes()) * size_t(num_blocks), 64);
}

}  // namespace

PackedWeight::PackedWeight(Format format, int64_t rows, int64_t cols, const uint8_t *source, Pool &pool,
                           std::shared_ptr<Pages> arena, size_t offset) {
    check_blocks(format, rows, cols);
    const size_t bytes = size_t(num_panels(rows)) * panel_bytes(format, cols);
    pages_ = arena ? std::move(arena) : std::make_shared<Pages>(bytes);
    if (offset % 64 != 0 || offset > pages_->size() || bytes > pages_->size() - offset)
        throw std::invalid_argument(std::to_string(bytes) + " bytes of panels do not fit at byte " +
                                    std::to_string(offset) + " of " + std::to_string(pages_->size()));
    uint8_t *packed = pages_->data() + offset;
    matrix_ = {format, rows, cols, packed};
    const int64_t panels = num_panels(rows);
    pool.parallel_for(uint32_t((panels + kPanelsPerItem - 1) / kPanelsPerItem), [&](uint32_t item, int) {
        const int64_t begin = item * kPanelsPerItem;
        pack_panels(format, rows, cols, source, packed, begin, std::min(panels, begin + kPanelsPerItem));
    });
}

PackedWeight::PackedWeight(Format format, int64_t rows, int64_t cols, std::shared_ptr<const MappedFile> file,
                           size_t offset)
    : file_(std::move(file)) {
    check_blocks(format, rows, cols);
    // Extents are bounded before they are multiplied: a product that wraps around would pass for a small one.
    const uint64_t size = file_->size();
    const bool bounded = uint64_t(rows) <= size * kPanelRows && uint64_t(cols) <= size * kGroup;
    const unsigned __int128 wanted = (unsigned __int128)num_panels(rows) * (bounded ? panel_bytes(format, cols) : 0);
    if (!bounded || offset % 64 != 0 || wanted + offset + kPanelSlack > size)
        throw std::invalid_argument(std::string("a ") + traits(format).name + " matrix of " + std::to_string(rows) +
                                    " x " + std::to_string(cols) + " does not lie at byte " + std::to_string(offset) +
                                    " of a file of " + std::to_string(size));
    matrix_ = {format, rows, cols, file_->data() + offset};
}

KvType kv_type_of(const std::string &name) {
    if (name == "float32") return KvType::kFloat32;
    if (name == "float16") return KvType::kFloat16;
    if (name == "int8") return KvType::kInt8;
    if (name == "int4") return KvType::kInt4;
    throw std::invalid_argument("a KV cache cannot be of type " + name);
}

KvCache::KvCache(const std::vector<Layer> &slots, int64_t num_blocks, int64_t block_size, KvType type)
    : num_blocks_(num_blocks), block_size_(block_size), type_(type), pages_(bytes(slots, num_blocks, block_size, type)) {
    uint8_t *next = pages_.data();
    for (const Layer &layer : slots) {
        views_.push_back(view(layer, block_size, type));
        views_.back().data = next;
        next += layer_bytes(views_.back(), num_blocks);
    }
}

size_t KvCache::bytes(const std::vector<Layer> &slots, int64_t num_blocks, int64_t block_size, KvType type) {
    if (num_blocks < 1 || block_size < 16 || block_size % 16 != 0)
        throw std::invalid_argument("a KV cache has at least one block, of a multiple of 16 tokens");
    size_t total = 0;
    for (const Layer &layer : slots) total += layer_bytes(view(layer, block_size, type), num_blocks);
    return total;
}

void KvCache::copy(const std::vector<std::pair<int64_t, int64_t>> &pairs) {
    for (const auto &[from, to] : pairs)
        if (from < 0 || from >= num_blocks_ || to < 0 || to >= num_blocks_)
            throw std::invalid_argument("copy of block " + std::to_string(from) + " to " + std::to_string(to) +
                                        " in a cache of " + std::to_string(num_blocks_) + " blocks");
    for (const auto &[from, to] : pairs) {
        if (from == to) continue;
        for (const KvLayerView &layer : views_) {
            const size_t bytes = size_t(layer.block_bytes());
            std::memcpy(layer.data + size_t(to) * bytes, layer.data + size_t(from) * bytes, bytes);
        }
    }
}

void KvCache::move(const std::vector<std::pair<int64_t, int64_t>> &pairs) {
    const int64_t slots = num_blocks_ * block_size_;
    std::vector<int64_t> destinations;
    for (const auto &[from, to] : pairs) {
        if (from < 0 || from >= slots || to < 0 || to >= slots)
            throw std::invalid_argument("move of slot " + std::to_string(from) + " to " + std::to_string(to) +
                                        " in a cache of " + std::to_string(slots) + " slots");
        destinations.push_back(to);
    }
    std::sort(destinations.begin(), destinations.end());
    if (const auto twice = std::adjacent_find(destinations.begin(), destinations.end()); twice != destinations.end())
        throw std::invalid_argument("two slots are moved to slot " + std::to_string(*twice));
    const int64_t blocks = (int64_t(pairs.size()) + kSubBlock - 1) / kSubBlock;
    std::vector<uint8_t> held;
    for (const KvLayerView &layer : views_) {
        KvLayerView between{nullptr, kSubBlock, layer.heads, layer.key_dim, layer.value_dim, type_};
        held.resize(size_t(blocks * between.block_bytes()));
        between.data = held.data();
        for (int64_t h = 0; h < layer.heads; ++h) {
            for (size_t i = 0; i < pairs.size(); ++i) copy_token(layer, pairs[i].first, h, between, int64_t(i), h);
            for (size_t i = 0; i < pairs.size(); ++i) copy_token(between, int64_t(i), h, layer, pairs[i].second, h);
        }
    }
}

size_t KvCache::commit() {
    if (committed_blocks_ == num_blocks_ || views_.empty()) return 0;
    int64_t largest = 1;
    for (const KvLayerView &each : views_) largest = std::max(largest, each.block_bytes());
    const int64_t end = std::min(num_blocks_, committed_blocks_ + std::max<int64_t>(1, kPiece / largest));
    const KvLayerView &layer = views_[committed_layers_];
    const size_t each = size_t(layer.block_bytes());
    touch(layer.data + size_t(committed_blocks_) * each, size_t(end - committed_blocks_) * each);
    if (++committed_layers_ == views_.size()) {
        committed_layers_ = 0;
        committed_blocks_ = end;
    }
    size_t left = 0;
    for (size_t i = 0; i < views_.size(); ++i) {
        const int64_t done = i < committed_layers_ ? end : committed_blocks_;
        left += size_t(num_blocks_ - done) * size_t(views_[i].block_bytes());
    }
    return left;
}

size_t KvCache::block_bytes() const {
    size_t bytes = 0;
    for (const KvLayerView &layer : views_) bytes += size_t(layer.block_bytes());
    return bytes;
}

void KvCache::read(int64_t block, uint8_t *out) const {
    require_block(block);
    for (const KvLayerView &layer : views_) {
        const size_t bytes = size_t(layer.block_bytes());
        std::memcpy(out, layer.data + size_t(block) * bytes, bytes);
        out += bytes;
    }
}

void KvCache::write(int64_t block, const uint8_t *in) {
    require_block(block);
    for (const KvLayerView &layer : views_) {
        const size_t bytes = size_t(layer.block_bytes());
        std::memcpy(layer.data + size_t(block) * bytes, in, bytes);
        in += bytes;
    }
}

void KvCache::require_block(int64_t block) const {
    if (block < 0 || block >= num_blocks_)
        throw std::invalid_argument("block " + std::to_string(block) + " in a cache of " +
                                    std::to_string(num_blocks_) + " blocks");
}

}  // namespace kvarn
