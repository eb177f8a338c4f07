#include "isa.h"

#define KVARN_TEXT_(x) #x
#define KVARN_TEXT(x) KVARN_TEXT_(x)

KVARN_KERNELS_BEGIN
const char *isa_name() { return KVARN_TEXT(KVARN_ISA); }
KVARN_KERNELS_END
