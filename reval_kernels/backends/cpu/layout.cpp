// Prepares operands of matmuls: transposes a matrix, interleaves two rows into pairs, converts to another dtype.
//
// This file is compiled once per instruction set. REVAL_ISA is the name of the instruction set and of the namespace.
// W is the number of fp32 numbers in a vector.
#include "simd.h"

namespace {

using reval::DType;

// One step of transposing a W x W matrix, given as W rows. The matrix is divided into squares of size 2 step x 2 step.
// In each square, the upper right and the lower left block (step x step) are exchanged.
template <int step>
inline void exchange(U (&x)[W]) {
  U low, high;
  for (uint32_t i = 0; i < W; ++i) {
    low[i] = i & step ? i - step + W : i;
    high[i] = i & step ? i + W : i + step;
  }
  for (int i = 0; i < W; ++i) {
    if (i & step) continue;
    U a = x[i], b = x[i + step];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + step] = __builtin_shuffle(a, b, high);
  }
}

void transpose(const uint32_t* from, int64_t ld_from, int64_t rows, int64_t columns, uint32_t* to, int64_t ld_to) {
  const int64_t whole_rows = rows / W * W, whole_columns = columns / W * W;
  for (int64_t i = 0; i < whole_rows; i += W) {
    for (int64_t j = 0; j < whole_columns; j += W) {
      U x[W];
      for (int k = 0; k < W; ++k) __builtin_memcpy(&x[k], from + (i + k) * ld_from + j, sizeof(U));
      exchange<1>(x);
      exchange<2>(x);
      if constexpr (W > 4) exchange<4>(x);
      if constexpr (W > 8) exchange<8>(x);
      for (int k = 0; k < W; ++k) __builtin_memcpy(to + (j + k) * ld_to + i, &x[k], sizeof(U));
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) to[j * ld_to + i] = from[i * ld_from + j];
  }
}

void interleave(const uint16_t* a, const uint16_t* b, int64_t n, uint32_t* out) {
  int64_t at = 0;
  for (; at + W <= n; at += W) {
    U pair = widen(load_bits(a + at));
    if (b) pair |= widen(load_bits(b + at)) << 16;
    __builtin_memcpy(out + at, &pair, sizeof pair);
  }
  for (; at < n; ++at) out[at] = a[at] | (b ? static_cast<uint32_t>(b[at]) << 16 : 0);
}

// A vector with the n <= W entries x[at], ..., x[at + n - 1] and zeros.
template <DType type>
F load_first(const void* x, int64_t at, int64_t n) {
  constexpr int size = type == reval::kFloat ? 4 : 2;
  alignas(64) char buffer[4 * W] = {};
  __builtin_memcpy(buffer, static_cast<const char*>(x) + at * size, n * size);
  return load<type>(buffer, 0);
}

template <DType from_type, DType to_type>
void convert_typed(const void* from, int64_t n, void* to) {
  constexpr int size = to_type == reval::kFloat ? 4 : 2;
  int64_t at = 0;
  for (; at + W <= n; at += W) store<to_type>(to, at, load<from_type>(from, at));
  if (at == n) return;
  alignas(64) char buffer[4 * W];
  store<to_type>(buffer, 0, load_first<from_type>(from, at, n - at));
  __builtin_memcpy(static_cast<char*>(to) + at * size, buffer, (n - at) * size);
}

template <DType from_type>
void convert_from(const void* from, int64_t n, DType to_type, void* to) {
  if (to_type == reval::kFloat) return convert_typed<from_type, reval::kFloat>(from, n, to);
  if (to_type == reval::kBFloat16) return convert_typed<from_type, reval::kBFloat16>(from, n, to);
  return convert_typed<from_type, reval::kHalf>(from, n, to);
}

void convert(DType from_type, const void* from, int64_t n, DType to_type, void* to) {
  if (from_type == reval::kFloat) return convert_from<reval::kFloat>(from, n, to_type, to);
  if (from_type == reval::kBFloat16) return convert_from<reval::kBFloat16>(from, n, to_type, to);
  return convert_from<reval::kHalf>(from, n, to_type, to);
}

}  // namespace

namespace reval::REVAL_ISA {

extern const LayoutKernels layout;
const LayoutKernels layout = {transpose, interleave, convert};

}  // namespace reval::REVAL_ISA
