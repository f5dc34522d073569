// Allocates memory for large gradients, and reuses freed memory for the next gradient.
#pragma once

#include <ATen/core/Tensor.h>

namespace reval {

// A contiguous, uninitialised tensor. (If torch fills uninitialised memory in its deterministic mode, this tensor is
// filled too, as by at::empty.)
//
// On Linux, a tensor of 32 MiB or more is in huge pages, and its memory is kept after it is freed, for the next such
// tensor. Reason: the operating system fills new pages with zeros, and that takes longer than writing the gradient.
// Kept memory is marked MADV_FREE: it still counts as resident memory of the process, but the system takes it back when
// memory is short.
at::Tensor empty_gradient(at::IntArrayRef sizes, at::ScalarType type);

}  // namespace reval
