// One step as stages see it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kvarn/kernels.h"

namespace kvarn {

// The arrays of kvarn.backends.base.InputBatch; shapes as documented there. Not owned.
struct Batch {
    int64_t tokens, sequences, outputs, groups, table_width;
    const int32_t *token_ids;
    const int32_t *positions;
    const int64_t *slot_mapping;
    const int32_t *query_start;
    const int32_t *seq_lens;
    const int32_t *block_tables;
    const int32_t *output_rows;
    const int32_t *tree_parents;  // null: no trees

    bool draft(int64_t row) const { return tree_parents && tree_parents[row] >= 0; }
    // Of a KV group: the slot of a row, and the block table of a sequence.
    int64_t slot(int64_t row, int64_t group) const { return slot_mapping[row * groups + group]; }
    const int32_t *table(int64_t sequence, int64_t group) const {
        return block_tables + (sequence * groups + group) * table_width;
    }
};

struct Limits {
    int64_t max_tokens, max_sequences, max_outputs, max_model_len, vocab_size;
    std::vector<int64_t> windows;  // of each KV group: the last so many tokens that its layers see; 0: all
};

// Empty where every index is in range and the arrays agree; else what is wrong, naming the field. one_start: drafts of a
// tree may not be at the same multiple of 16 (as keys in int4 want it).
std::string check_batch(const Batch &batch, const Limits &limits, int64_t num_blocks, int64_t block_size, bool one_start);

// Consecutive query rows of one sequence that attention handles together.
struct QueryTile {
    int64_t sequence, row, rows;
    int64_t position;  // of the first row; of rows of a tree, the highest
    int64_t tree;      // keys from this position on are a row's own (TreeRows::begin); -1: rows are a chain
};

struct Step {
    Batch batch;
    uint64_t id;                    // unique in the plan's life, from 1
    bool decode;                    // every sequence has exactly one token
    std::vector<QueryTile> tiles;   // longest contexts first
    int64_t tile_rows;              // of the tile with most
    const int64_t *places;          // the slot of each row's position, as slot_mapping has it but for drafts of a tree
    std::vector<int64_t> own_places;  // what `places` is in a step with trees

    int64_t place(int64_t row, int64_t group) const { return places[row * batch.groups + group]; }
};

// Fills `step` from a checked batch.
void begin_step(const Batch &batch, uint64_t id, int64_t block_size, Step &step);

}  // namespace kvarn
