// Of CUDA's runtime what decode_launch.h names.
#pragma once

using cudaStream_t = void*;
using cudaError_t = int;
