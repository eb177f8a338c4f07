// The sampler as a Python class: one call a step, for all rows, without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

#include "kvarn/sampling.h"
#include "runtime/pool.h"

namespace nb = nanobind;
using namespace kvarn;

namespace {

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Probabilities = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bits = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// The first token of a draft after the one at `parent` that is `token`; -1: there is none.
int64_t child(const std::vector<int32_t> &draft, const std::vector<int32_t> &parents, int64_t parent, int32_t token) {
    for (size_t i = size_t(parent + 1); i < draft.size(); ++i)
        if (parents[i] == parent && draft[i] == token) return int64_t(i);
    return -1;
}

// (token, None) or (token, (logprob, rank, [(id, logprob), ...]))
nb::tuple described(const Sample &sample) {
    if (!sample.has_logprobs) return nb::make_tuple(sample.token, nb::none());
    nb::list top;
    for (const auto &[id, logprob] : sample.logprobs.top) top.append(nb::make_tuple(id, logprob));
    return nb::make_tuple(sample.token, nb::make_tuple(sample.logprobs.chosen, sample.logprobs.rank, top));
}

class Sampler {
  public:
    void add(int64_t sequence, const std::vector<int32_t> &prompt, float temperature, int64_t top_k, double top_p,
             double min_p, float repetition, float presence, float frequency, int64_t min_tokens, int64_t logprobs,
             uint64_t seed, uint32_t stream, std::vector<std::pair<int32_t, float>> bias,
             std::vector<int32_t> stop_tokens, std::vector<uint32_t> allowed,
             std::vector<std::vector<int32_t>> forbidden) {
        for (const auto &tokens : forbidden)
            if (tokens.size() < 2) throw std::invalid_argument("a forbidden sequence has two tokens or more");
        SamplingParameters p;
        p.temperature = temperature, p.top_k = top_k, p.top_p = top_p, p.min_p = min_p;
        p.repetition_penalty = repetition, p.presence_penalty = presence, p.frequency_penalty = frequency;
        p.min_tokens = min_tokens, p.logprobs = logprobs, p.seed = seed, p.stream = stream;
        p.bias = std::move(bias), p.stop_tokens = std::move(stop_tokens);
        p.allowed = std::move(allowed), p.forbidden = std::move(forbidden);
        sequences_.insert_or_assign(sequence, SequenceSampler(std::move(p), prompt.data(), prompt.size()));
    }

    void remove(int64_t sequence) { sequences_.erase(sequence); }

    // A list with what is `described` of each row; a token below 0: there is none (`kNothingLeft`, `kNotFinite`). pool:
    // whose threads share the rows; null: the caller does them.
    nb::list sample(const Logits &logits, const std::vector<int64_t> &sequences, const std::vector<uint64_t> &positions,
                    Pool *pool) {
        const size_t rows = logits.shape(0), vocab = logits.shape(1);
        if (sequences.size() != rows || positions.size() != rows || vocab == 0)
            throw std::invalid_argument("one sequence and one position a row of logits");
        const std::vector<SequenceSampler *> state = states(sequences, vocab);
        std::vector<Sample> samples(rows);
        {
            nb::gil_scoped_release release;
            share(pool, state, [&](size_t r, Scratch &scratch) {
                samples[r] = state[r]->sample({logits.data() + r * vocab, vocab, positions[r]}, scratch);
            });
        }
        nb::list result;
        for (const Sample &sample : samples) result.append(described(sample));
        return result;
    }

    // Each sequence has a row of logits for what is known of it and one for each token of its draft, whose parents are
    // earlier ones, or -1. A list of (place of the sequence, what is `described` of a token): of each sequence the tokens
    // up to the first that is not the draft's, going from each on to its child that is the next. One below 0 as above.
    nb::list verify(const Logits &logits, const std::vector<int64_t> &sequences, const std::vector<uint64_t> &positions,
                    const std::vector<std::vector<int32_t>> &drafts, const std::vector<std::vector<int32_t>> &parents,
                    const std::vector<std::optional<Logits>> &q, const std::optional<Bits> &bits,
                    const std::optional<std::vector<int32_t>> &mask_rows, Pool *pool) {
        const size_t vocab = logits.shape(1), count = sequences.size();
        if (positions.size() != count || drafts.size() != count || q.size() != count || vocab == 0)
            throw std::invalid_argument("one position, draft and q a sequence");
        check_trees(drafts, parents);
        check_rows(logits, drafts, q, bits, mask_rows);
        const std::vector<SequenceSampler *> state = states(sequences, vocab);
        std::vector<size_t> first(count);
        for (size_t s = 1; s < count; ++s) first[s] = first[s - 1] + drafts[s - 1].size() + 1;
        std::vector<std::vector<Sample>> samples(count);
        {
            nb::gil_scoped_release release;
            share(pool, state, [&](size_t s, Scratch &scratch) {
                for (int64_t level = 0, place = -1; level == 0 || place >= 0; ++level) {
                    const size_t next = size_t(place + 1), r = first[s] + next;
                    Row row{logits.data() + r * vocab, vocab, positions[s] + uint64_t(level)};
                    if (bits && (*mask_rows)[r] >= 0) row.mask = bits->data() + size_t((*mask_rows)[r]) * bits->shape(1);
                    if (q[s] && next < drafts[s].size()) {
                        row.draft = drafts[s][next];
                        row.q = q[s]->data() + next * vocab;
                    }
                    samples[s].push_back(state[s]->sample(row, scratch));
                    place = child(drafts[s], parents[s], place, samples[s].back().token);
                }
            });
        }
        nb::list result;
        for (size_t s = 0; s < count; ++s)
            for (const Sample &sample : samples[s]) result.append(nb::make_tuple(s, described(sample)));
        return result;
    }

    // For each row of another model's logits, of which the first `vocab` count, a draft's token; see
    // `SequenceSampler::guess`. q_rows: the row of `q` that its distribution goes to; -1: none. A token of -1: none.
    std::vector<int32_t> guess(const Logits &logits, size_t vocab, const std::vector<int64_t> &sequences,
                               const std::vector<uint64_t> &positions, const std::vector<std::vector<int32_t>> &ahead,
                               const Probabilities &q, const std::vector<int64_t> &q_rows, Pool *pool) {
        const size_t rows = logits.shape(0);
        if (sequences.size() != rows || positions.size() != rows || ahead.size() != rows || q_rows.size() != rows)
            throw std::invalid_argument("one sequence, position, draft and row of q a row of logits");
        if (vocab == 0 || vocab > logits.shape(1) || vocab > q.shape(1))
            throw std::invalid_argument("the vocabulary is wider than logits or q");
        for (const int64_t row : q_rows)
            if (row >= 0 && size_t(row) >= q.shape(0)) throw std::invalid_argument("there is no such row of q");
        const std::vector<SequenceSampler *> state = states(sequences, vocab);
        std::vector<int32_t> tokens(rows);
        nb::gil_scoped_release release;
        share(pool, state, [&](size_t r, Scratch &scratch) {
            float *to = q_rows[r] < 0 ? nullptr : q.data() + size_t(q_rows[r]) * q.shape(1);
            tokens[r] = state[r]->guess({logits.data() + r * logits.shape(1), vocab, positions[r]}, ahead[r], to, scratch);
        });
        return tokens;
    }

    // What is `described` of the given token of each row, with its logprobs and those of the k best; without where the
    // row's logits are not finite.
    nb::list logprobs(const Logits &logits, const std::vector<int32_t> &tokens, const std::vector<int64_t> &k, Pool *pool) {
        const size_t rows = logits.shape(0), vocab = logits.shape(1);
        if (tokens.size() != rows || k.size() != rows) throw std::invalid_argument("one token and one k a row of logits");
        for (const int32_t token : tokens)
            if (token < 0 || size_t(token) >= vocab) throw std::invalid_argument("a token is outside the vocabulary");
        std::vector<Sample> found(rows);
        {
            nb::gil_scoped_release release;
            share(pool, rows, [&](size_t r, Scratch &scratch) {
                found[r] = logprobs_at(logits.data() + r * vocab, vocab, tokens[r], k[r], scratch.weights);
            });
        }
        nb::list result;
        for (const Sample &sample : found) result.append(described(sample));
        return result;
    }

  private:
    std::vector<SequenceSampler *> states(const std::vector<int64_t> &sequences, size_t vocab) {
        std::vector<SequenceSampler *> result;
        for (const int64_t sequence : sequences) {
            const auto found = sequences_.find(sequence);
            if (found == sequences_.end())
                throw std::invalid_argument("sequence " + std::to_string(sequence) + " was not added");
            if (found->second.width() && found->second.width() < vocab)
                throw std::invalid_argument("what sequence " + std::to_string(sequence) + " may say is of fewer tokens");
            result.push_back(&found->second);
        }
        return result;
    }

    // Calls body(i, scratch) for each of the sequences, on the threads of the pool where each is there once.
    template <class Body>
    void share(Pool *pool, std::vector<SequenceSampler *> sequences, Body body) {
        const size_t count = sequences.size();
        std::sort(sequences.begin(), sequences.end());
        const bool distinct = std::adjacent_find(sequences.begin(), sequences.end()) == sequences.end();
        share(distinct ? pool : nullptr, count, body);
    }

    // Calls body(i, scratch) for 0 … count - 1, in any order.
    template <class Body>
    void share(Pool *pool, size_t count, Body body) {
        if (!pool || count < 2 || count > Job::kMaxItems) {
            for (size_t i = 0; i < count; ++i) body(i, scratch_[0]);
            return;
        }
        if (scratch_.size() < size_t(pool->threads())) scratch_.resize(size_t(pool->threads()));
        pool->parallel_for(uint32_t(count), [&](uint32_t i, int thread) { body(i, scratch_[size_t(thread)]); });
    }

    static void check_trees(const std::vector<std::vector<int32_t>> &drafts,
                            const std::vector<std::vector<int32_t>> &parents) {
        if (parents.size() != drafts.size()) throw std::invalid_argument("parents for each draft");
        for (size_t s = 0; s < drafts.size(); ++s) {
            if (parents[s].size() != drafts[s].size()) throw std::invalid_argument("a parent for each token of a draft");
            for (size_t i = 0; i < parents[s].size(); ++i)
                if (parents[s][i] < -1 || parents[s][i] >= int64_t(i))
                    throw std::invalid_argument("a parent comes before its own, or is -1");
        }
    }

    static void check_rows(const Logits &logits, const std::vector<std::vector<int32_t>> &drafts,
                           const std::vector<std::optional<Logits>> &q, const std::optional<Bits> &bits,
                           const std::optional<std::vector<int32_t>> &mask_rows) {
        const size_t vocab = logits.shape(1);
        size_t rows = 0;
        for (size_t s = 0; s < drafts.size(); ++s) {
            rows += drafts[s].size() + 1;
            for (const int32_t token : drafts[s])
                if (token < 0 || size_t(token) >= vocab) throw std::invalid_argument("a draft is outside the vocabulary");
            if (q[s] && (q[s]->shape(0) != drafts[s].size() || q[s]->shape(1) != vocab))
                throw std::invalid_argument("q needs a row for each token of its draft");
        }
        if (rows != logits.shape(0)) throw std::invalid_argument("one row of logits a token of a draft, and one more");
        if (bits.has_value() != mask_rows.has_value()) throw std::invalid_argument("masks and their rows go together");
        if (!bits) return;
        if (bits->shape(1) != (vocab + 31) / 32 || mask_rows->size() != rows)
            throw std::invalid_argument("masks do not fit the logits");
        for (const int32_t row : *mask_rows)
            if (row >= 0 && size_t(row) >= bits->shape(0)) throw std::invalid_argument("there is no such row of masks");
    }

    std::unordered_map<int64_t, SequenceSampler> sequences_;
    std::vector<Scratch> scratch_{1};  // of each thread
};

std::vector<uint32_t> philox(std::vector<uint32_t> counter, uint32_t key0, uint32_t key1) {
    if (counter.size() != 4) throw std::invalid_argument("a counter has four words");
    philox4x32(counter.data(), key0, key1);
    return counter;
}

}  // namespace

void bind_sampling(nb::module_ &m) {
    nb::class_<Sampler>(m, "Sampler", "State and choice of all running sequences. Not thread-safe.")
        .def(nb::init<>())
        .def("add", &Sampler::add, nb::arg("sequence"), nb::arg("prompt"), nb::arg("temperature"), nb::arg("top_k"),
             nb::arg("top_p"), nb::arg("min_p"), nb::arg("repetition_penalty"), nb::arg("presence_penalty"),
             nb::arg("frequency_penalty"), nb::arg("min_tokens"), nb::arg("logprobs"), nb::arg("seed"),
             nb::arg("stream"), nb::arg("bias"), nb::arg("stop_tokens"), nb::arg("allowed"), nb::arg("forbidden"))
        .def("remove", &Sampler::remove, nb::arg("sequence"))
        .def("sample", &Sampler::sample, nb::arg("logits"), nb::arg("sequences"), nb::arg("positions"),
             nb::arg("pool").none() = nb::none())
        .def("verify", &Sampler::verify, nb::arg("logits"), nb::arg("sequences"), nb::arg("positions"),
             nb::arg("drafts"), nb::arg("parents"), nb::arg("q"), nb::arg("bits").none(), nb::arg("mask_rows").none(),
             nb::arg("pool").none() = nb::none())
        .def("logprobs", &Sampler::logprobs, nb::arg("logits"), nb::arg("tokens"), nb::arg("k"),
             nb::arg("pool").none() = nb::none())
        .def("guess", &Sampler::guess, nb::arg("logits"), nb::arg("vocab"), nb::arg("sequences"), nb::arg("positions"),
             nb::arg("ahead"), nb::arg("q"), nb::arg("q_rows"), nb::arg("pool").none() = nb::none());
    m.def("philox4x32", &philox, nb::arg("counter"), nb::arg("key0"), nb::arg("key1"), "Philox4x32-10, for tests.");
    m.def(
        "uniform",
        [](uint64_t seed, uint32_t stream, uint64_t position, uint32_t use) {
            return uniform(seed, stream, position, static_cast<Use>(use));
        },
        nb::arg("seed"), nb::arg("stream"), nb::arg("position"), nb::arg("use") = 0);
}
