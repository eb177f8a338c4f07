#include "kernels_internal.h"

#define KVARN_TEXT_(x) #x
#define KVARN_TEXT(x) KVARN_TEXT_(x)

KVARN_KERNELS_BEGIN

const Kernels &kernels() {
    static constexpr Kernels table = {
        KVARN_TEXT(KVARN_ISA), linear,     quantize, norm,     rope,      kv_write, attention,
        attention_merge,       activation, gated,           add_rows, scale_cap, read_sum, integer_peak,
        float_peak,
    };
    return table;
}

KVARN_KERNELS_END
