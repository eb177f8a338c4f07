#include "runtime/step.h"

#include <algorithm>

namespace kvarn {
namespace {

std::string out_of_range(const char *field, int64_t index, int64_t value, int64_t limit) {
    return std::string(field) + "[" + std::to_string(index) + "] is " + std::to_string(value) +
           ", outside of 0 to " + std::to_string(limit - 1);
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
        const int64_t position = b.positions[row];
        if (b.slot(row, group) != table[position / block_size] * block_size + position % block_size)
            return "slot_mapping[" + std::to_string(row) + "] is " + std::to_string(b.slot(row, group)) +
                   ", which is not where the block table of sequence " + std::to_string(s) + " has position " +
                   std::to_string(position);
    }
    return "";
}

std::string check_sequence(const Batch &b, int64_t s, const Limits &limits, int64_t num_blocks, int64_t block_size) {
    const int64_t begin = b.query_start[s], end = b.query_start[s + 1], length = b.seq_lens[s];
    const std::string name = "sequence " + std::to_string(s);
    if (end <= begin) return "query_start: " + name + " has no tokens";
    if (length < end - begin || length > limits.max_model_len)
        return "seq_lens: " + name + " has length " + std::to_string(length) + ", which must be between its " +
               std::to_string(end - begin) + " tokens and the limit of " + std::to_string(limits.max_model_len);
    for (int64_t row = begin; row < end; ++row)
        if (b.positions[row] != length - (end - row))
            return "positions[" + std::to_string(row) + "] is " + std::to_string(b.positions[row]) + ", but " + name +
                   " of length " + std::to_string(length) + " has position " + std::to_string(length - (end - row)) +
                   " there";
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

std::string check_batch(const Batch &b, const Limits &limits, int64_t num_blocks, int64_t block_size) {
    if (b.tokens < 1 || b.tokens > limits.max_tokens)
        return "a step of " + std::to_string(b.tokens) + " tokens; it must have 1 to " +
               std::to_string(limits.max_tokens);
    if (b.sequences < 1 || b.sequences > limits.max_sequences)
        return "a step of " + std::to_string(b.sequences) + " sequences; it must have 1 to " +
               std::to_string(limits.max_sequences);
    if (b.outputs > limits.max_sequences)
        return "output_rows has " + std::to_string(b.outputs) + " rows, the limit is " +
               std::to_string(limits.max_sequences);
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
        if (std::string problem = check_sequence(b, s, limits, num_blocks, block_size); !problem.empty())
            return problem;
    return "";
}

void begin_step(const Batch &batch, uint64_t id, Step &step) {
    step.batch = batch;
    step.id = id;
    step.decode = batch.tokens == batch.sequences;
    step.tiles.clear();
    for (int64_t s = 0; s < batch.sequences; ++s) {
        const int64_t begin = batch.query_start[s], end = batch.query_start[s + 1];
        for (int64_t row = begin; row < end; row += kQueryTile)
            step.tiles.push_back({s, row, std::min(kQueryTile, end - row), batch.positions[row]});
    }
    std::stable_sort(step.tiles.begin(), step.tiles.end(), [](const QueryTile &a, const QueryTile &b) {
        return (a.position + kKeyTile) * a.rows > (b.position + kKeyTile) * b.rows;
    });
}

}  // namespace kvarn
