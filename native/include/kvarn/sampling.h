// Logits to tokens. Every rule is defined by ReferenceSampler (src/kvarn/sampling/reference.py); this is the fast twin.
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <utility>
#include <vector>

namespace kvarn {

struct SamplingParameters {
    float temperature = 1.0f;  // 0: greedy
    int64_t top_k = 0;         // <= 0: off
    double top_p = 1.0;
    double min_p = 0.0;
    float repetition_penalty = 1.0f;
    float presence_penalty = 0.0f;
    float frequency_penalty = 0.0f;
    int64_t min_tokens = 0;
    int64_t logprobs = -1;  // -1: off; k: the chosen token's and the k best
    uint64_t seed = 0;
    uint32_t stream = 0;
    std::vector<std::pair<int32_t, float>> bias;
    std::vector<int32_t> stop_tokens;  // masked while fewer than min_tokens are out
    std::vector<uint32_t> allowed;     // a mask as in Row, of the whole vocabulary; empty: all tokens are
    // Sequences of at least two tokens that are never completed by the output. (One token is left out of `allowed`.)
    std::vector<std::vector<int32_t>> forbidden;
};

struct Logprobs {
    double chosen = 0;
    int64_t rank = 0;
    std::vector<std::pair<int32_t, double>> top;
};

// In place of a token, as in src/kvarn/backends/row_rules.py: the rules leave none; the logits hold NaN or infinity, or
// nothing but minus infinity.
constexpr int32_t kNothingLeft = -1, kNotFinite = -2;

struct Sample {
    int32_t token = kNothingLeft;
    bool has_logprobs = false;
    Logprobs logprobs{};
};

// What a random number is for: to draw a token; a draft's token; whether a draft is accepted; a token in its place.
enum class Use : uint32_t { Token, Draft, Accept, Residual };

// One uniform double in [0, 1): Philox4x32-10 (Salmon et al. 2011) of the counter (position, stream, use) under key
// `seed`.
double uniform(uint64_t seed, uint32_t stream, uint64_t position, Use use = Use::Token);
void philox4x32(uint32_t counter[4], uint32_t key0, uint32_t key1);

// One row of logits and what is known of its token. mask: ceil(vocab / 32) words, bit i of word w set: token 32 w + i is
// allowed; null: all are. draft: a guess of the token, -1: none. q: float[vocab], what the guess was drawn from; null:
// it was not drawn, and does not matter to the choice.
struct Row {
    const float *logits;
    size_t vocab;
    uint64_t position;
    const uint32_t *mask = nullptr;
    int32_t draft = -1;
    const float *q = nullptr;
};

// Room for one row at a time, kept from row to row: to have a vocabulary's worth of pages anew for each takes longer than
// to fill them.
struct Scratch {
    std::vector<float> weights, adjusted;
    std::vector<uint32_t> mask;
};

// The log-softmax of a row of logits at a token, its rank, and the k best; without logprobs where they are not finite.
Sample logprobs_at(const float *logits, size_t vocab, int32_t token, int64_t k, std::vector<float> &scratch);

// The state of one sequence: its parameters and which tokens it has seen.
class SequenceSampler {
  public:
    SequenceSampler(SamplingParameters parameters, const int32_t *prompt, size_t prompt_size);

    // Chooses the row's token, and takes it into the state, which is unchanged where there is none to choose.
    Sample sample(const Row &row, Scratch &scratch);

    // Chooses a draft's token from another model's logits by the same rules; the state stays as it is. ahead: the draft's
    // tokens before it. q: float[row.vocab], set to the distribution that the token is drawn from, with a number of its
    // own; null: it is drawn with the number that `sample` will have for the position. Greedy ones leave q alone.
    // -1 where there is none to choose.
    int32_t guess(const Row &row, const std::vector<int32_t> &ahead, float *q, Scratch &scratch);

    // Logits that it can be asked about; none: any.
    size_t width() const { return parameters_.allowed.size() * 32; }

  private:
    // Logits after all rules. They are those of the row where no rule but the mask changes any: then it is still to be
    // minded, and `top` is the maximum of the allowed ones. top: finite, or there is nothing to choose.
    struct Ruled {
        const float *logits;
        const uint32_t *mask;  // null: none, or minded already
        float top;
    };
    Ruled rules(const Row &row, Scratch &scratch, float raw_top) const;
    const uint32_t *mask_of(const Row &row, std::vector<uint32_t> &mask) const;
    int32_t choose(const Row &row, float *weights) const;
    void take(int32_t token);
    bool adjusts() const;
    bool penalizes() const;
    void adjust(float *logits, size_t vocab) const;

    SamplingParameters parameters_;
    std::unordered_map<int32_t, int32_t> output_counts_;  // kept only where a penalty needs them
    std::unordered_map<int32_t, int32_t> prompt_counts_;
    std::vector<int32_t> outputs_;  // kept only where sequences are forbidden
    int64_t output_tokens_ = 0;
};

}  // namespace kvarn
