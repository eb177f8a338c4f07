// What an executable owns and stages refer to: packed weights, vectors, rotary tables and the KV cache.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kvarn/kernels.h"
#include "runtime/mapped_file.h"
#include "runtime/memory.h"

namespace kvarn {

class Pool;

// A matrix or table in packed form.
class PackedWeight {
public:
    // Packs a stored row-major tensor with the pool's threads. `source` is not used afterwards.
    // Throws std::invalid_argument where cols is no multiple of the format's block, std::bad_alloc.
    // arena: where its panels go, at `offset`, a multiple of 64; null: to pages of its own.
    PackedWeight(Format format, int64_t rows, int64_t cols, const uint8_t *source, Pool &pool,
                 std::shared_ptr<Pages> arena = nullptr, size_t offset = 0);
    // Takes panels as they lie in a file, at a multiple of 64 bytes, with 64 bytes behind them.
    // Throws std::invalid_argument where they do not lie within the file.
    PackedWeight(Format format, int64_t rows, int64_t cols, std::shared_ptr<const MappedFile> file, size_t offset);

    const PackedMatrix &matrix() const { return matrix_; }
    size_t bytes() const { return size_t(matrix_.panels()) * panel_bytes(matrix_.format, matrix_.cols); }

private:
    std::shared_ptr<Pages> pages_;
    std::shared_ptr<const MappedFile> file_;
    PackedMatrix matrix_;
};

// float32 parameters: norm weights, biases.
struct Vector {
    std::vector<float> values;
};

// cos and sin of each position: [positions][2][pairs].
struct RotaryTable {
    std::vector<float> values;
    int64_t positions;
    int64_t pairs;
    bool interleaved;

    const float *at(int64_t position) const { return values.data() + position * 2 * pairs; }
};

// Throws std::invalid_argument where no cache is of a type of that name.
KvType kv_type_of(const std::string &name);

// Keys and values by blocks, each with a slot for every layer of a KV group. Layouts: KvLayerView.
class KvCache {
public:
    struct Layer {
        int64_t heads, key_dim, value_dim;
    };
    KvCache(const std::vector<Layer> &slots, int64_t num_blocks, int64_t block_size, KvType type);

    static size_t bytes(const std::vector<Layer> &slots, int64_t num_blocks, int64_t block_size, KvType type);

    const KvLayerView &slot(size_t i) const { return views_.at(i); }
    size_t num_slots() const { return views_.size(); }
    int64_t num_blocks() const { return num_blocks_; }
    int64_t block_size() const { return block_size_; }
    KvType type() const { return type_; }
    size_t bytes() const { return pages_.size(); }

    // Copies whole blocks, in order. Throws std::invalid_argument where a block does not exist.
    void copy(const std::vector<std::pair<int64_t, int64_t>> &pairs);

    // Copies tokens from slot to slot, as if all at once. Of int4 a token goes to where its reference is: the slot of its
    // position. Throws where a slot does not exist or is twice a destination; nothing is copied then.
    void move(const std::vector<std::pair<int64_t, int64_t>> &pairs);

    // Touches a piece of what no call has touched yet, blocks of low numbers first, so that the system backs it; returns
    // the bytes that are left. Their values stay as they are. Nobody may use the cache meanwhile.
    size_t commit();

    // Bytes of one block.
    size_t block_bytes() const;
    // A block's bytes, slot by slot. Throws where there is no such block.
    void read(int64_t block, uint8_t *out) const;
    void write(int64_t block, const uint8_t *in);

private:
    void require_block(int64_t block) const;

    int64_t num_blocks_, block_size_;
    KvType type_;
    Pages pages_;
    std::vector<KvLayerView> views_;
    int64_t committed_blocks_ = 0;  // of all layers
    size_t committed_layers_ = 0;   // of the piece after them
};

}  // namespace kvarn
