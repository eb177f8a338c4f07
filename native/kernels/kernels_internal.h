// The kernels of one ISA, as table.cpp lists them; what each does is said in kvarn/kernels.h.
#pragma once
#include <type_traits>

#include "isa.h"
#include "kvarn/kernels.h"

KVARN_KERNELS_BEGIN

// Weights are read in one direction: lines are asked for this far ahead of their use. Found by measuring
// (docs/dev/perf-log.md); hardware prefetchers alone reach half of the memory's bandwidth.
constexpr int64_t kPrefetchAhead = 4096;

void linear(const LinearArgs &a);
void quantize(const QuantizeArgs &a);
void norm(const NormArgs &a);
void rope(const RopeArgs &a);
void kv_write(const KvLayerView &kv, int64_t slot, int64_t place, int64_t head, const float *k, const float *v);
void attention(const AttentionArgs &a);
void attention_merge(const float *partial, int64_t spans, int64_t span_stride, int64_t value_dim, float *scratch,
                     float *out);
void activation(Function f, const float *x, float *out, int64_t n);
void gated(Function f, const float *gate, const float *up, float *out, int64_t n);
void add_rows(const float *a, const float *b, float *out, int64_t n);
void scale_cap(float scale, float softcap, float *x, int64_t n);
uint32_t read_sum(const uint8_t *data, int64_t bytes);
int64_t integer_peak(int64_t iterations, int32_t *result);
int64_t float_peak(int64_t iterations, float *result);

KVARN_KERNELS_END
