// What nvcc compiles for host and card, and a plain C++ compiler for the host alone.
#pragma once

#ifdef __CUDACC__
#define LK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define LK_HOST_DEVICE inline
#endif

// Loops over registers have to be unrolled: a register has no address.
#ifdef __CUDA_ARCH__
#define LK_UNROLL _Pragma("unroll")
#else
#define LK_UNROLL
#endif
