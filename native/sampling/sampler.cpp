// One sequence's choice. Reductions run over fixed lanes in a fixed order, so a row's result depends on the row alone.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kvarn/sampling.h"

namespace kvarn {
namespace {

// These loops are compiled for several instruction sets and chosen when the module is loaded. With contraction off each
// gives the same bits.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define KVARN_WIDE __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define KVARN_WIDE
#endif

constexpr size_t LANES = 16;
constexpr float NEGATIVE_INFINITY = -std::numeric_limits<float>::infinity();

struct Candidate {
    float weight;
    int32_t id;
};

// Better first: more weight, then the lower id.
bool better(const Candidate &a, const Candidate &b) { return a.weight > b.weight || (a.weight == b.weight && a.id < b.id); }

// Largest value; NaN where any is NaN.
KVARN_WIDE float maximum(const float *x, size_t n) {
    float lane[LANES];
    int nan[LANES] = {};
    std::fill(lane, lane + LANES, NEGATIVE_INFINITY);
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; ++j) {
            lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
            nan[j] |= x[i + j] != x[i + j];
        }
    for (size_t j = 0; i < n; ++i, ++j) {
        lane[j] = std::max(lane[j], x[i]);
        nan[j] |= x[i] != x[i];
    }
    float best = lane[0];
    int any = nan[0];
    for (size_t j = 1; j < LANES; ++j) {
        best = std::max(best, lane[j]);
        any |= nan[j];
    }
    return any ? std::numeric_limits<float>::quiet_NaN() : best;
}

int32_t first_equal(const float *x, size_t n, float value) {
    for (size_t i = 0; i < n; ++i)
        if (x[i] == value) return static_cast<int32_t>(i);
    return -1;
}

// exp of a non-positive number to within 1 ulp or so of float: 2^k * polynomial on [-ln2/2, ln2/2], branch-free so that
// compilers vectorize it. Below -87 the result is 0.
inline float exp_nonpositive(float x) {
    const float clamped = x < -87.0f ? -87.0f : x;
    const float k = std::nearbyint(clamped * 1.44269504f);
    float r = clamped - k * 0.693145752f;
    r = r - k * 1.42860677e-6f;
    float p = 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666668e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const int32_t exponent = (static_cast<int32_t>(k) + 127) << 23;
    const float scale = std::bit_cast<float>(exponent);
    return x < -87.0f ? 0.0f : p * scale;
}

// weights[i] = exp((x[i] - top) * inverse_temperature).
KVARN_WIDE void exponentials(const float *x, size_t n, float top, float inverse_temperature, float *weights) {
    for (size_t i = 0; i < n; ++i) weights[i] = exp_nonpositive((x[i] - top) * inverse_temperature);
}

KVARN_WIDE double sum(const float *x, size_t n) {
    double lane[LANES] = {};
    size_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (size_t j = 0; j < LANES; ++j) lane[j] += static_cast<double>(x[i + j]);
    for (size_t j = 0; i < n; ++i, ++j) lane[j] += static_cast<double>(x[i]);
    double total = 0;
    for (double value : lane) total += value;
    return total;
}

// The k best of n weights, best first: a heap whose root is the worst kept, so most weights cost one comparison.
std::vector<Candidate> best_of(const float *weights, size_t n, size_t k) {
    std::vector<Candidate> heap;
    heap.reserve(k + 1);
    for (size_t i = 0; i < n; ++i) {
        const Candidate candidate{weights[i], static_cast<int32_t>(i)};
        if (heap.size() < k) {
            heap.push_back(candidate);
            std::push_heap(heap.begin(), heap.end(), better);
        } else if (better(candidate, heap.front())) {
            std::pop_heap(heap.begin(), heap.end(), better);
            heap.back() = candidate;
            std::push_heap(heap.begin(), heap.end(), better);
        }
    }
    std::sort_heap(heap.begin(), heap.end(), better);
    return heap;
}

// Weights at or above a threshold that together reach `wanted`, best first. The threshold comes from a histogram over
// exponent and upper mantissa bits, so that only the nucleus is sorted.
std::vector<Candidate> nucleus_candidates(const float *weights, size_t n, double wanted) {
    constexpr size_t BINS = 4096;
    std::vector<double> mass(BINS, 0.0);
    const auto bin_of = [](float weight) { return std::bit_cast<uint32_t>(weight) >> 19; };
    for (size_t i = 0; i < n; ++i) mass[bin_of(weights[i]) & (BINS - 1)] += static_cast<double>(weights[i]);
    double cumulative = 0;
    size_t threshold = BINS;
    while (threshold > 0 && cumulative < wanted) cumulative += mass[--threshold];
    // One bin more: the histogram's sums round otherwise than those of the sorted weights.
    threshold = threshold > 0 ? threshold - 1 : 0;
    std::vector<Candidate> kept;
    for (size_t i = 0; i < n; ++i)
        if (weights[i] > 0 && bin_of(weights[i]) >= threshold) kept.push_back({weights[i], static_cast<int32_t>(i)});
    std::sort(kept.begin(), kept.end(), better);
    return kept;
}

// Cuts the best-first list to the smallest prefix whose weights reach `wanted`; at least one stays.
void cut_nucleus(std::vector<Candidate> &sorted, double wanted) {
    double cumulative = 0;
    for (size_t i = 0; i < sorted.size(); ++i) {
        cumulative += static_cast<double>(sorted[i].weight);
        if (cumulative >= wanted) {
            sorted.resize(i + 1);
            return;
        }
    }
}

double total_of(const std::vector<Candidate> &candidates) {
    double total = 0;
    for (const Candidate &candidate : candidates) total += static_cast<double>(candidate.weight);
    return total;
}

// Inverse distribution function over the candidates in order of token id.
int32_t draw(std::vector<Candidate> &candidates, double u) {
    std::sort(candidates.begin(), candidates.end(), [](const Candidate &a, const Candidate &b) { return a.id < b.id; });
    const double target = u * total_of(candidates);
    double cumulative = 0;
    for (const Candidate &candidate : candidates) {
        cumulative += static_cast<double>(candidate.weight);
        if (cumulative > target) return candidate.id;
    }
    return candidates.back().id;
}

int32_t draw_all(const float *weights, size_t n, double u) {
    double total = 0;
    for (size_t i = 0; i < n; ++i) total += static_cast<double>(weights[i]);
    const double target = u * total;
    double cumulative = 0;
    int32_t last = 0;
    for (size_t i = 0; i < n; ++i) {
        cumulative += static_cast<double>(weights[i]);
        if (weights[i] > 0) last = static_cast<int32_t>(i);
        if (cumulative > target) return static_cast<int32_t>(i);
    }
    return last;
}

bool limits_count(const SamplingParameters &p, size_t n) { return p.top_k > 0 && static_cast<size_t>(p.top_k) < n; }

void drop_unlikely(const SamplingParameters &p, float *weights, size_t n) {
    if (p.min_p > 0)
        for (size_t i = 0; i < n; ++i)
            if (static_cast<double>(weights[i]) < p.min_p) weights[i] = 0;
}

// What top_k and top_p leave of the weights; one of them must be on.
std::vector<Candidate> likeliest(const SamplingParameters &p, const float *weights, size_t n) {
    std::vector<Candidate> kept;
    if (limits_count(p, n)) {
        kept = best_of(weights, n, static_cast<size_t>(p.top_k));
        if (p.top_p < 1.0) cut_nucleus(kept, p.top_p * total_of(kept));
    } else {
        const double wanted = p.top_p * sum(weights, n);
        kept = nucleus_candidates(weights, n, wanted);
        cut_nucleus(kept, wanted);
    }
    return kept;
}

int32_t draw_token(const SamplingParameters &p, float *weights, size_t n, double u) {
    drop_unlikely(p, weights, n);
    if (!limits_count(p, n) && p.top_p >= 1.0) return draw_all(weights, n, u);
    std::vector<Candidate> kept = likeliest(p, weights, n);
    return draw(kept, u);
}

// Zeroes the weights that min_p, top_k and top_p leave out; returns the sum of the others.
double keep_likeliest(const SamplingParameters &p, float *weights, size_t n) {
    drop_unlikely(p, weights, n);
    if (!limits_count(p, n) && p.top_p >= 1.0) return sum(weights, n);
    const std::vector<Candidate> kept = likeliest(p, weights, n);
    std::fill(weights, weights + n, 0.0f);
    for (const Candidate &candidate : kept) weights[candidate.id] = candidate.weight;
    return total_of(kept);
}

// A token drawn from max(0, p - q), p = weights / total; from p where nothing is left of that.
int32_t draw_residual(const float *weights, double total, const float *q, size_t n, double u) {
    const auto residual = [=](size_t i) {
        return std::max(0.0, static_cast<double>(weights[i]) / total - static_cast<double>(q[i]));
    };
    double mass = 0;
    for (size_t i = 0; i < n; ++i) mass += residual(i);
    if (!(mass > 0)) return draw_all(weights, n, u);
    const double target = u * mass;
    double cumulative = 0;
    int32_t last = 0;
    for (size_t i = 0; i < n; ++i) {
        const double part = residual(i);
        cumulative += part;
        if (part > 0) last = static_cast<int32_t>(i);
        if (cumulative > target) return static_cast<int32_t>(i);
    }
    return last;
}

// Log-softmax of the raw logits: the chosen token's, its rank, and the k best.
Logprobs logprobs_of(const float *logits, size_t n, float top, int32_t chosen, int64_t k, std::vector<float> &scratch) {
    scratch.resize(n);
    exponentials(logits, n, top, 1.0f, scratch.data());
    const double log_total = static_cast<double>(top) + std::log(sum(scratch.data(), n));
    Logprobs result;
    result.chosen = static_cast<double>(logits[chosen]) - log_total;
    result.rank = 1;
    for (size_t i = 0; i < n; ++i) result.rank += logits[i] > logits[chosen];
    if (k > 0)
        for (const Candidate &candidate : best_of(logits, n, std::min(static_cast<size_t>(k), n)))
            result.top.emplace_back(candidate.id, static_cast<double>(candidate.weight) - log_total);
    return result;
}

// The logits of the tokens that a mask allows; minus infinity for the others, which no rule after it changes. Masks allow
// nearly all tokens or few of them, so that most words need no look at their bits.
void copy_allowed(const float *logits, const uint32_t *mask, size_t vocab, float *out) {
    for (size_t first = 0; first < vocab; first += 32) {
        const uint32_t word = mask[first / 32];
        const size_t count = std::min<size_t>(32, vocab - first);
        if (word == UINT32_MAX)
            std::copy_n(logits + first, count, out + first);
        else if (word == 0)
            std::fill_n(out + first, count, NEGATIVE_INFINITY);
        else
            for (size_t i = first; i < first + count; ++i) out[i] = word >> (i - first) & 1 ? logits[i] : NEGATIVE_INFINITY;
    }
}

// Calls all(first, count) for runs of tokens that are allowed, and some(first, count, word) for each other word of a mask.
template <class All, class Some>
void over_mask(const uint32_t *mask, size_t vocab, All all, Some some) {
    for (size_t first = 0, end; first < vocab; first = end) {
        end = std::min(vocab, first + 32);
        if (mask[first / 32] != UINT32_MAX) {
            some(first, end - first, mask[first / 32]);
            continue;
        }
        while (end < vocab && mask[end / 32] == UINT32_MAX) end = std::min(vocab, end + 32);
        all(first, end - first);
    }
}

// The next three look at a mask in place where no other rule changes the logits: to copy a row takes as long as to look
// for its maximum. They are what maximum, first_equal and exponentials say of the copy.

float maximum_allowed(const float *logits, const uint32_t *mask, size_t vocab) {
    float best = NEGATIVE_INFINITY, words[32];
    over_mask(
        mask, vocab, [&](size_t first, size_t count) { best = std::max(best, maximum(logits + first, count)); },
        [&](size_t first, size_t count, uint32_t word) {
            if (word == 0) return;
            copy_allowed(logits + first, &word, count, words);
            for (size_t i = 0; i < count; ++i) best = std::max(best, words[i]);
        });
    return best;
}

int32_t first_allowed(const float *logits, const uint32_t *mask, size_t vocab, float value) {
    for (size_t i = 0; i < vocab; ++i)
        if (logits[i] == value && mask[i / 32] >> (i % 32) & 1) return static_cast<int32_t>(i);
    return -1;
}

void exponentials_allowed(const float *logits, const uint32_t *mask, size_t vocab, float top, float scale, float *out) {
    float words[32];
    over_mask(
        mask, vocab, [&](size_t first, size_t count) { exponentials(logits + first, count, top, scale, out + first); },
        [&](size_t first, size_t count, uint32_t word) {
            if (word == 0) {
                std::fill_n(out + first, count, 0.0f);
                return;
            }
            copy_allowed(logits + first, &word, count, words);
            exponentials(words, count, top, scale, out + first);
        });
}

int32_t likeliest_of(const float *logits, const uint32_t *mask, size_t vocab, float top) {
    return mask ? first_allowed(logits, mask, vocab, top) : first_equal(logits, vocab, top);
}

void weigh(const float *logits, const uint32_t *mask, size_t vocab, float top, float scale, std::vector<float> &weights) {
    weights.resize(vocab);
    if (mask)
        exponentials_allowed(logits, mask, vocab, top, scale, weights.data());
    else
        exponentials(logits, vocab, top, scale, weights.data());
}

}  // namespace

SequenceSampler::SequenceSampler(SamplingParameters parameters, const int32_t *prompt, size_t prompt_size)
    : parameters_(std::move(parameters)) {
    if (parameters_.repetition_penalty != 1.0f)
        for (size_t i = 0; i < prompt_size; ++i) ++prompt_counts_[prompt[i]];
}

bool SequenceSampler::penalizes() const {
    return parameters_.repetition_penalty != 1.0f || parameters_.presence_penalty != 0.0f ||
           parameters_.frequency_penalty != 0.0f;
}

bool SequenceSampler::adjusts() const {
    return !parameters_.bias.empty() || penalizes() ||
           (output_tokens_ < parameters_.min_tokens && !parameters_.stop_tokens.empty());
}

void SequenceSampler::adjust(float *logits, size_t vocab) const {
    const auto inside = [vocab](int32_t id) { return id >= 0 && static_cast<size_t>(id) < vocab; };
    for (const auto &[id, bias] : parameters_.bias)
        if (inside(id)) logits[id] += bias;
    if (output_tokens_ < parameters_.min_tokens)
        for (int32_t id : parameters_.stop_tokens)
            if (inside(id)) logits[id] = NEGATIVE_INFINITY;
    if (!penalizes()) return;
    const auto repeated = [&](int32_t id) {
        float &x = logits[id];
        x = x > 0 ? x / parameters_.repetition_penalty : x * parameters_.repetition_penalty;
    };
    if (parameters_.repetition_penalty != 1.0f)
        for (const auto &[id, count] : prompt_counts_)
            if (inside(id)) repeated(id);
    for (const auto &[id, count] : output_counts_) {
        if (!inside(id)) continue;
        if (parameters_.repetition_penalty != 1.0f && !prompt_counts_.contains(id)) repeated(id);
        logits[id] -= parameters_.frequency_penalty * static_cast<float>(count);
        logits[id] -= parameters_.presence_penalty;
    }
}

// A draft that was drawn from q: Leviathan et al. 2023, algorithm 1. All others do not matter to the choice.
int32_t SequenceSampler::choose(const Row &row, float *weights) const {
    const SamplingParameters &p = parameters_;
    const auto number = [&](Use use) { return uniform(p.seed, p.stream, row.position, use); };
    if (row.draft < 0 || !row.q) return draw_token(p, weights, row.vocab, number(Use::Token));
    const double total = keep_likeliest(p, weights, row.vocab);
    const double target = static_cast<double>(weights[row.draft]) / total;
    if (number(Use::Accept) * static_cast<double>(row.q[row.draft]) < target) return row.draft;
    return draw_residual(weights, total, row.q, row.vocab, number(Use::Residual));
}

// The row's mask, the sequence's, and the last tokens of what would complete a forbidden sequence, as one; null: all
// tokens are allowed.
const uint32_t *SequenceSampler::mask_of(const Row &row, std::vector<uint32_t> &mask) const {
    const SamplingParameters &p = parameters_;
    const size_t words = (row.vocab + 31) / 32;
    const uint32_t *result = row.mask;
    const auto own = [&] {
        if (result == mask.data() && !mask.empty()) return;
        mask.resize(words);
        if (result)
            std::copy_n(result, words, mask.data());
        else
            std::fill_n(mask.data(), words, UINT32_MAX);
        result = mask.data();
    };
    if (!p.allowed.empty()) {
        if (!result) {
            result = p.allowed.data();
        } else {
            own();
            for (size_t word = 0; word < words; ++word) mask[word] &= p.allowed[word];
        }
    }
    for (const std::vector<int32_t> &tokens : p.forbidden) {
        const size_t before = tokens.size() - 1;
        const int32_t last = tokens.back();
        if (outputs_.size() < before || static_cast<size_t>(last) >= row.vocab) continue;
        if (!std::equal(tokens.begin(), tokens.end() - 1, outputs_.end() - static_cast<ptrdiff_t>(before))) continue;
        own();
        mask[static_cast<size_t>(last) / 32] &= ~(1u << (last % 32));
    }
    return result;
}

SequenceSampler::Ruled SequenceSampler::rules(const Row &row, Scratch &scratch, float raw_top) const {
    const uint32_t *mask = mask_of(row, scratch.mask);
    if (!adjusts()) return {row.logits, mask, mask ? maximum_allowed(row.logits, mask, row.vocab) : raw_top};
    std::vector<float> &adjusted = scratch.adjusted;
    adjusted.resize(row.vocab);
    if (mask)
        copy_allowed(row.logits, mask, row.vocab, adjusted.data());
    else
        std::copy_n(row.logits, row.vocab, adjusted.data());
    adjust(adjusted.data(), row.vocab);
    return {adjusted.data(), nullptr, maximum(adjusted.data(), row.vocab)};
}

Sample SequenceSampler::sample(const Row &row, Scratch &scratch) {
    const size_t vocab = row.vocab;
    const float raw_top = maximum(row.logits, vocab);
    if (!std::isfinite(raw_top)) return {kNotFinite};
    const Ruled ruled = rules(row, scratch, raw_top);
    if (!std::isfinite(ruled.top)) return {kNothingLeft};
    Sample out;
    if (parameters_.temperature == 0.0f) {
        out.token = likeliest_of(ruled.logits, ruled.mask, vocab, ruled.top);
    } else {
        weigh(ruled.logits, ruled.mask, vocab, ruled.top, 1.0f / parameters_.temperature, scratch.weights);
        out.token = choose(row, scratch.weights.data());
    }
    out.has_logprobs = parameters_.logprobs >= 0;
    if (out.has_logprobs)
        out.logprobs = logprobs_of(row.logits, vocab, raw_top, out.token, parameters_.logprobs, scratch.weights);
    take(out.token);
    return out;
}

void SequenceSampler::take(int32_t token) {
    ++output_tokens_;
    if (penalizes()) ++output_counts_[token];
    if (!parameters_.forbidden.empty()) outputs_.push_back(token);
}

int32_t SequenceSampler::guess(const Row &row, const std::vector<int32_t> &ahead, float *q, Scratch &scratch) {
    for (const int32_t id : ahead) take(id);  // as if the tokens before it had been sampled
    const SamplingParameters &p = parameters_;
    const size_t vocab = row.vocab;
    int32_t token = -1;
    const float raw_top = maximum(row.logits, vocab);
    const Ruled ruled = rules(row, scratch, raw_top);
    if (std::isfinite(raw_top) && std::isfinite(ruled.top)) {
        if (p.temperature == 0.0f) {
            token = likeliest_of(ruled.logits, ruled.mask, vocab, ruled.top);
        } else {
            weigh(ruled.logits, ruled.mask, vocab, ruled.top, 1.0f / p.temperature, scratch.weights);
            float *weights = scratch.weights.data();
            if (!q) {
                token = draw_token(p, weights, vocab, uniform(p.seed, p.stream, row.position, Use::Token));
            } else {
                const double scale = 1.0 / keep_likeliest(p, weights, vocab);
                for (size_t i = 0; i < vocab; ++i) q[i] = static_cast<float>(static_cast<double>(weights[i]) * scale);
                token = draw_all(q, vocab, uniform(p.seed, p.stream, row.position, Use::Draft));
            }
        }
    }
    output_tokens_ -= static_cast<int64_t>(ahead.size());
    if (!p.forbidden.empty()) outputs_.resize(outputs_.size() - ahead.size());
    if (penalizes())
        for (const int32_t id : ahead)
            if (--output_counts_[id] == 0) output_counts_.erase(id);
    return token;
}

Sample logprobs_at(const float *logits, size_t vocab, int32_t token, int64_t k, std::vector<float> &scratch) {
    const float top = maximum(logits, vocab);
    if (!std::isfinite(top)) return {token};
    return {token, true, logprobs_of(logits, vocab, top, token, k, scratch)};
}

}  // namespace kvarn
