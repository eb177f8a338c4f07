#include "runtime/step.h"

#include <algorithm>

namespace kvarn {
namespace {

std::string out_of_range(const char *field, int64_t index, int64_t value, int64_t limit) {
    return std::string(field) + "[" + std::to_string(index) + "] is " + std::to_string(value) +
           ", outside of 0 to " + std::to_string(limit - 1);
}

// Slot of a position of sequence s in a KV group.
int64_t slot_of(const Batch &b, int64_t s, int64_t group, int64_t position, int64_t block_size) {
    return b.table(s, group)[position / block_size] * block_size + position % block_size;
}

// Where the drafts of a tree begin in a sequence's rows; `end` where it has none.
int64_t first_draft(const Batch &b, int64_t begin, int64_t end) {
    int64_t row = begin;
    while (row < end && !b.draft(row)) ++row;
    return row;
}

// Rows from `row` on, of which the first is a draft: whether an earlier draft is at the same position.
bool repeats(const Batch &b, int64_t first, int64_t row) {
    for (int64_t other = first; other < row; ++other)
        if (b.positions[other] == b.positions[row]) return true;
    return false;
}

std::string check_tree(const Batch &b, int64_t begin, int64_t end, bool one_start) {
    const int64_t first = first_draft(b, begin, end);
    if (first == begin)
        return "tree_parents[" + std::to_string(begin) + "]: a sequence's first row is a known token's, not a draft";
    for (int64_t row = begin; row < end; ++row) {
        const int64_t parent = b.tree_parents[row];
        if (row < first ? parent != -1 : parent < first - 1 || parent >= row)
            return "tree_parents[" + std::to_string(row) + "] is " + std::to_string(parent) + ", but must be " +
                   (row < first ? "-1" : std::to_string(first - 1) + " to " + std::to_string(row - 1)) + " there";
        if (one_start && row >= first && b.positions[row] % kSubBlock == 0 && repeats(b, first, row))
            return "tree_parents: only one draft of a tree may be at position " + std::to_string(b.positions[row]) +
                   " of an int4 cache, a multiple of 16";
    }
    return "";
}

// What a sequence's rows see of a KV group, and where they are written. Before its window a table may hold anything.
std::string check_group(const Batch &b, int64_t s, int64_t group, int64_t window, int64_t num_blocks,
                        int64_t block_size) {
    const int64_t begin = b.query_start[s], end = b.query_start[s + 1], length = b.seq_lens[s];
    const int32_t *table = b.table(s, group);
    const int64_t first = length - (end - begin) - window + 1;  // that the first row sees
    for (int64_t i = window > 0 && first > 0 ? first / block_size : 0; i * block_size < length; ++i)
        if (table[i] < 0 || table[i] >= num_blocks)
            return out_of_range("block_tables of a sequence", i, table[i], num_blocks);
    for (int64_t row = begin; row < end; ++row) {
        const int64_t place = length - (end - row);
        if (b.slot(row, group) != slot_of(b, s, group, place, block_size))
            return "slot_mapping[" + std::to_string(row) + "] is " + std::to_string(b.slot(row, group)) +
                   ", which is not where the block table of sequence " + std::to_string(s) + " has position " +
                   std::to_string(place);
    }
    return "";
}

std::string check_sequence(const Batch &b, int64_t s, const Limits &limits, int64_t num_blocks, int64_t block_size,
                           bool one_start) {
    const int64_t begin = b.query_start[s], end = b.query_start[s + 1], length = b.seq_lens[s];
    const std::string name = "sequence " + std::to_string(s);
    if (end <= begin) return "query_start: " + name + " has no tokens";
    if (length < end - begin || length > limits.max_model_len)
        return "seq_lens: " + name + " has length " + std::to_string(length) + ", which must be between its " +
               std::to_string(end - begin) + " tokens and the limit of " + std::to_string(limits.max_model_len);
    if (b.tree_parents)
        if (std::string problem = check_tree(b, begin, end, one_start); !problem.empty()) return problem;
    for (int64_t row = begin; row < end; ++row) {
        const int64_t expected = b.draft(row) ? b.positions[b.tree_parents[row]] + 1 : length - (end - row);
        if (b.positions[row] != expected)
            return "positions[" + std::to_string(row) + "] is " + std::to_string(b.positions[row]) + ", but " + name +
                   " of length " + std::to_string(length) + " has position " + std::to_string(expected) + " there";
    }
    const int64_t blocks = (length + block_size - 1) / block_size;
    if (blocks > b.table_width)
        return "block_tables: " + name + " needs " + std::to_string(blocks) + " blocks, the table has " +
               std::to_string(b.table_width);
    for (int64_t group = 0; group < b.groups; ++group)
        if (std::string problem = check_group(b, s, group, limits.windows[size_t(group)], num_blocks, block_size);
            !problem.empty())
            return problem;
    return "";
}

}  // namespace

std::string check_batch(const Batch &b, const Limits &limits, int64_t num_blocks, int64_t block_size, bool one_start) {
    if (b.tokens < 1 || b.tokens > limits.max_tokens)
        return "a step of " + std::to_string(b.tokens) + " tokens; it must have 1 to " +
               std::to_string(limits.max_tokens);
    if (b.sequences < 1 || b.sequences > limits.max_sequences)
        return "a step of " + std::to_string(b.sequences) + " sequences; it must have 1 to " +
               std::to_string(limits.max_sequences);
    if (b.outputs > limits.max_outputs)
        return "output_rows has " + std::to_string(b.outputs) + " rows, the limit is " +
               std::to_string(limits.max_outputs);
    if (b.groups != int64_t(limits.windows.size()))
        return "block_tables are of " + std::to_string(b.groups) + " KV groups, the program has " +
               std::to_string(limits.windows.size());
    if (b.query_start[0] != 0 || b.query_start[b.sequences] != b.tokens)
        return "query_start must run from 0 to the number of tokens";
    for (int64_t s = 0; s < b.sequences; ++s)
        if (b.query_start[s + 1] < b.query_start[s] || b.query_start[s + 1] > b.tokens)
            return "query_start must be ascending";
    for (int64_t i = 0; i < b.tokens; ++i)
        if (b.token_ids[i] < 0 || b.token_ids[i] >= limits.vocab_size)
            return out_of_range("token_ids", i, b.token_ids[i], limits.vocab_size);
    for (int64_t i = 0; i < b.outputs; ++i) {
        if (b.output_rows[i] < 0 || b.output_rows[i] >= b.tokens)
            return out_of_range("output_rows", i, b.output_rows[i], b.tokens);
        if (i > 0 && b.output_rows[i] <= b.output_rows[i - 1]) return "output_rows must be ascending";
    }
    for (int64_t s = 0; s < b.sequences; ++s)
        if (std::string problem = check_sequence(b, s, limits, num_blocks, block_size, one_start); !problem.empty())
            return problem;
    return "";
}

namespace {

// The first row of a sequence that does not go on with the row before it; `end` where all do. From there on each row reads
// keys along its own path.
int64_t first_branch(const Batch &b, int64_t begin, int64_t end) {
    int64_t row = begin;
    while (row < end && (!b.draft(row) || b.tree_parents[row] == row - 1)) ++row;
    return row;
}

void add_tiles(const Batch &b, int64_t s, int64_t begin, int64_t end, int64_t tree, std::vector<QueryTile> &tiles) {
    for (int64_t row = begin; row < end; row += kQueryTile) {
        const int64_t rows = std::min(kQueryTile, end - row);
        const int32_t *positions = b.positions + row;
        tiles.push_back({s, row, rows, tree < 0 ? *positions : *std::max_element(positions, positions + rows), tree});
    }
}

void place_drafts(const Batch &b, int64_t block_size, Step &step) {
    step.own_places.resize(size_t(b.tokens * b.groups));
    for (int64_t s = 0; s < b.sequences; ++s)
        for (int64_t row = b.query_start[s]; row < b.query_start[s + 1]; ++row)
            for (int64_t group = 0; group < b.groups; ++group)
                step.own_places[size_t(row * b.groups + group)] = slot_of(b, s, group, b.positions[row], block_size);
    step.places = step.own_places.data();
}

}  // namespace

void begin_step(const Batch &batch, uint64_t id, int64_t block_size, Step &step) {
    step.batch = batch;
    step.id = id;
    step.decode = batch.tokens == batch.sequences;
    step.tiles.clear();
    step.places = batch.slot_mapping;
    if (batch.tree_parents) place_drafts(batch, block_size, step);
    for (int64_t s = 0; s < batch.sequences; ++s) {
        const int64_t begin = batch.query_start[s], end = batch.query_start[s + 1];
        const int64_t branch = batch.tree_parents ? first_branch(batch, begin, end) : end;
        int64_t tree = INT64_MAX;
        for (int64_t row = branch; row < end; ++row)
            if (batch.tree_parents[row] != row - 1)
                tree = std::min<int64_t>(tree, batch.positions[batch.tree_parents[row]] + 1);
        add_tiles(batch, s, begin, branch, -1, step.tiles);
        add_tiles(batch, s, branch, end, tree, step.tiles);
    }
    step.tile_rows = 0;
    for (const QueryTile &tile : step.tiles) step.tile_rows = std::max(step.tile_rows, tile.rows);
    std::stable_sort(step.tiles.begin(), step.tiles.end(), [](const QueryTile &a, const QueryTile &b) {
        return (a.position + kKeyTile) * a.rows > (b.position + kKeyTile) * b.rows;
    });
}

}  // namespace kvarn
