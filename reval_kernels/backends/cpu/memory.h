// Memory for large gradients that is ready to be written.
#pragma once

#include <ATen/core/Tensor.h>

namespace reval {

// Uninitialised (where torch is deterministic: as at::empty), contiguous. From 32 MiB on (Linux) the memory is in huge pages and, once freed, serves the next such
// tensor: the kernel hands out new pages filled with zeros, which takes longer than the gradient that replaces them. What
// waits for the next tensor is marked MADV_FREE: it still counts as resident, and the kernel takes it when it is short.
at::Tensor empty_gradient(at::IntArrayRef sizes, at::ScalarType type);

}  // namespace reval
