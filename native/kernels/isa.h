// The namespace of the instruction set a kernel file is being compiled for.
#pragma once
#ifndef KVARN_ISA
#error "kernels are compiled once per instruction set, with KVARN_ISA naming it"
#endif
#define KVARN_KERNELS_BEGIN namespace kvarn::KVARN_ISA {
#define KVARN_KERNELS_END }
