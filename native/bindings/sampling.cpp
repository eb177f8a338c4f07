// The sampler as a Python class: one call a step, for all rows, without the GIL.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>

#include "kvarn/sampling.h"

namespace nb = nanobind;
using namespace kvarn;

namespace {

using Logits = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

class Sampler {
  public:
    void add(int64_t sequence, const std::vector<int32_t> &prompt, float temperature, int64_t top_k, double top_p,
             double min_p, float repetition, float presence, float frequency, int64_t min_tokens, int64_t logprobs,
             uint64_t seed, uint32_t stream, std::vector<std::pair<int32_t, float>> bias,
             std::vector<int32_t> stop_tokens) {
        SamplingParameters p;
        p.temperature = temperature, p.top_k = top_k, p.top_p = top_p, p.min_p = min_p;
        p.repetition_penalty = repetition, p.presence_penalty = presence, p.frequency_penalty = frequency;
        p.min_tokens = min_tokens, p.logprobs = logprobs, p.seed = seed, p.stream = stream;
        p.bias = std::move(bias), p.stop_tokens = std::move(stop_tokens);
        sequences_.insert_or_assign(sequence, SequenceSampler(std::move(p), prompt.data(), prompt.size()));
    }

    void remove(int64_t sequence) { sequences_.erase(sequence); }

    // A list with, for each row, (token, None) or (token, (logprob, rank, [(id, logprob), ...])).
    nb::list sample(const Logits &logits, const std::vector<int64_t> &sequences, const std::vector<uint64_t> &positions) {
        const size_t rows = logits.shape(0), vocab = logits.shape(1);
        if (sequences.size() != rows || positions.size() != rows || vocab == 0)
            throw std::invalid_argument("one sequence and one position a row of logits");
        std::vector<SequenceSampler *> state(rows);
        for (size_t r = 0; r < rows; ++r) {
            const auto found = sequences_.find(sequences[r]);
            if (found == sequences_.end())
                throw std::invalid_argument("sequence " + std::to_string(sequences[r]) + " was not added");
            state[r] = &found->second;
        }
        std::vector<Sample> samples(rows);
        int64_t failed = -1;
        {
            nb::gil_scoped_release release;
            for (size_t r = 0; r < rows && failed < 0; ++r)
                if (!state[r]->sample(logits.data() + r * vocab, vocab, positions[r], scratch_, samples[r]))
                    failed = sequences[r];
        }
        if (failed >= 0)
            throw std::invalid_argument("the logits of sequence " + std::to_string(failed) +
                                        " hold NaN or infinity, or leave no token");
        nb::list result;
        for (const Sample &sample : samples) {
            if (!sample.has_logprobs) {
                result.append(nb::make_tuple(sample.token, nb::none()));
                continue;
            }
            nb::list top;
            for (const auto &[id, logprob] : sample.logprobs.top) top.append(nb::make_tuple(id, logprob));
            result.append(
                nb::make_tuple(sample.token, nb::make_tuple(sample.logprobs.chosen, sample.logprobs.rank, top)));
        }
        return result;
    }

  private:
    std::unordered_map<int64_t, SequenceSampler> sequences_;
    std::vector<float> scratch_;
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
             nb::arg("stream"), nb::arg("bias"), nb::arg("stop_tokens"))
        .def("remove", &Sampler::remove, nb::arg("sequence"))
        .def("sample", &Sampler::sample, nb::arg("logits"), nb::arg("sequences"), nb::arg("positions"));
    m.def("philox4x32", &philox, nb::arg("counter"), nb::arg("key0"), nb::arg("key1"), "Philox4x32-10, for tests.");
    m.def("uniform", &uniform, nb::arg("seed"), nb::arg("stream"), nb::arg("position"));
}
