// Includes LK_LOOPS once for each version, in a namespace of its own and compiled for its
// instructions. No include guard: each *_pass.cpp includes this, after every other header, since
// what the standard library inlines must not be compiled for more than every processor has.
//
// For a version LK_VERSION is its namespace, LK_REGISTER_BYTES and LK_REGISTERS the width and the
// number of its vector registers.

#if defined(__x86_64__)
#include <immintrin.h>

#define LK_VERSION avx512
#define LK_REGISTER_BYTES 64
#define LK_REGISTERS 32
#ifdef __clang__
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#include "lanes.h"
#include LK_LOOPS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef LK_VERSION
#undef LK_REGISTER_BYTES
#undef LK_REGISTERS

#define LK_VERSION avx2
#define LK_REGISTER_BYTES 32
#define LK_REGISTERS 16
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "lanes.h"
#include LK_LOOPS
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef LK_VERSION
#undef LK_REGISTER_BYTES
#undef LK_REGISTERS

// What every x86-64 has.
#define LK_VERSION sse2
#define LK_REGISTER_BYTES 16
#define LK_REGISTERS 16

#else

#ifdef __aarch64__
#define LK_VERSION neon
#define LK_REGISTERS 32
#else
#define LK_VERSION plain
#define LK_REGISTERS 16
#endif
#define LK_REGISTER_BYTES 16

#endif

#include "lanes.h"
#include LK_LOOPS
#undef LK_VERSION
#undef LK_REGISTER_BYTES
#undef LK_REGISTERS
#undef LK_LOOPS
