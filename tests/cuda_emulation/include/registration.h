// Included before each source of pixnorm: registers its CUDA kernels as CPU kernels of another library's ops.
#pragma once

#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(library##_emulated, CPU, m, C10_UID)
