// Interface of the vectorised kernels: one table of function pointers per instruction set.
//
// rows.cpp, columns.cpp and layout.cpp are compiled once per instruction set, with the compiler flags of this set.
// isa.cpp chooses a table at run time. This header and these three files must not include torch or templates of the
// standard library. Reason: the linker keeps only one copy of an inline function. If it keeps the copy that was
// compiled with AVX-512 flags, the process dies on an older processor.
//
// Letters: x is a logit, z the logit after softcap and temperature, p = softmax(z) its probability.
#pragma once

#include <cstdint>

namespace reval {

enum DType { kFloat, kBFloat16, kHalf };

// Softcap and temperature: z = softcap * tanh(x / softcap) * inv_temperature. A softcap of 0 means no softcap:
// z = x * inv_temperature.
struct Transform {
  float softcap;
  float inv_temperature;
};

// Sums over some of a row's logits, with m the largest z among them:
//   maximum  the largest logit, after the softcap and before the temperature (m = maximum * inv_temperature)
//   others   sum of exp(z - m) over all entries, without one entry at the maximum
//   spread   sum of exp(z - m) * (z - m), which only the entropy needs
// The weight of the maximum is exp(0) = 1. It is not part of `others`, because 1 + 1e-9 is 1 in fp32: for a confident
// state, where 1 - p is about 1e-9, the sum would lose all digits of 1 - p.
struct Partial {
  float maximum;
  float others;
  float spread;
};

// Numbers that give the gradient of a row. For each logit except the action's (action_gradient in tokens.h):
//   dloss/dz = p * (from_all - from_entropy * (log p + entropy)),  log p = (z - row_max) - log_sum
// row_max is the largest z of the row, log_sum is log(sum of exp(z - row_max)).
struct RowGradient {
  float row_max;
  float log_sum;
  float entropy;
  float from_all;
  float from_entropy;
};

// Kernels for a row of n contiguous logits.
struct RowKernels {
  void (*partial)(DType type, const void* x, int64_t n, Transform transform, bool with_entropy, Partial* out);
  // The gradient of the loss with respect to x, written to out. x and out have type `type`; x == out is allowed.
  // `streaming`: the stores bypass the cache.
  void (*gradient)(
      DType type, const void* x, int64_t n, Transform transform, RowGradient row, void* out, bool streaming);
  // The logit x after the softcap. *derivative is set to dz/dx.
  float (*capped)(float x, Transform transform, float* derivative);
  // z - row_max for a logit after the softcap, with the same rounding as in the other kernels.
  float (*shifted)(float capped, float inv_temperature, float row_max);
  void (*exp)(const float* x, int64_t n, float* out);
  void (*tanh)(const float* x, int64_t n, float* out);
};

// A strip is kStrip tokens. Its logits are an fp32 matrix [words, kStrip]: a row per word, a column per token. The
// column kernels process whole vectors of columns, so the number of columns (`tokens` below) must be a multiple of
// kColumns.
constexpr int64_t kStrip = 64;
constexpr int64_t kColumns = 16;

// Sums over some words for each token of a strip, as in Partial. The sums over several calls are in double.
struct ColumnSums {
  float maximum[kStrip];
  float factor[kStrip];  // the last call multiplied the sums of earlier calls by this factor
  double others[kStrip], spread[kStrip];
};

// RowGradient for each token of a strip. Here from_all and from_entropy are already multiplied by inv_temperature.
struct ColumnGradients {
  const float *row_max, *log_sum, *entropy, *from_all, *from_entropy;
  bool with_entropy;  // true if any from_entropy is not 0
};

// Memory that the caller needs after the call. The kernel prefetches it between its arithmetic, which takes no extra
// time.
struct Ahead {
  const void* memory;
  int64_t bytes;
};

struct ColumnKernels {
  // Adds `words` rows of logits to the sums.
  void (*partial)(
      const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature, bool with_entropy,
      ColumnSums* sums);
  // The gradient of each logit. out may be x; then ld_out must be kStrip.
  void (*gradient)(
      const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature,
      const ColumnGradients& by, Ahead ahead, float* out, int64_t ld_out);
  // The same in bf16, written twice: to `out` with a row per word (unless out is null), and to `pairs`
  // [(words + 1) / 2, kStrip], where an entry holds the gradients of two neighbouring words. If `words` is odd, the
  // second half of the last pair is 0.
  void (*gradient_bf16)(
      const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature,
      const ColumnGradients& by, Ahead ahead, uint16_t* out, int64_t ld_out, uint32_t* pairs);
  // Copies logits to memory aligned to 64 bytes. The stores bypass the cache.
  void (*keep)(const float* x, int64_t words, float* out);
  // Converts logits to 16-bit integers (kept.h) with stores that bypass the cache, and back. The integer is
  // (x - anchor) * step + kOffset, rounded, but at least -2^15, which stands for -inf.
  // keep_steps returns false if an integer would be above 2^15 - 1; with `all_of_them`, also if one would be -2^15.
  bool (*keep_steps)(
      const float* x, int64_t words, int64_t tokens, const float* anchor, const float* step, bool all_of_them,
      int16_t* out);
  void (*restore_steps)(
      const int16_t* from, int64_t words, int64_t tokens, const float* anchor, const float* inv_step, float* x);
};

struct LayoutKernels {
  // to[j][i] = from[i][j] for i < rows, j < columns; leading dimensions in entries.
  void (*transpose)(
      const uint32_t* from, int64_t ld_from, int64_t rows, int64_t columns, uint32_t* to, int64_t ld_to);
  // out[i] = {a[i], b[i]}. If b is null, zeros take its place.
  void (*interleave)(const uint16_t* a, const uint16_t* b, int64_t n, uint32_t* out);
  // Converts n numbers from one type to another.
  void (*convert)(DType from_type, const void* from, int64_t n, DType to_type, void* to);
};

struct Kernels {
  const char* name;
  const RowKernels& rows;
  const ColumnKernels& columns;
  const LayoutKernels& layout;
};

// The kernels for this processor. The environment variable REVAL_CPU_ISA (plain, avx2, avx512, avx512bf16) can choose a
// lower instruction set than the processor has.
const Kernels& kernels();

// True if these kernels are for a processor with bf16 multiplication (avx512bf16).
bool has_bf16_matmul();

inline float load_scalar(DType type, const void* row, int64_t index) {
  if (type == kFloat) return static_cast<const float*>(row)[index];
  uint32_t bits = static_cast<const uint16_t*>(row)[index];
  if (type == kBFloat16) {
    bits <<= 16;
  } else {
    // The exponent bias of fp16 is 15, that of fp32 is 127. So after the shift the number is too small by a factor of
    // 2^112. The multiplication corrects that, and it normalises subnormal numbers too.
    uint32_t magnitude = (bits & 0x7fff) << 13;
    float scaled;
    __builtin_memcpy(&scaled, &magnitude, 4);
    scaled *= 0x1p112f;
    __builtin_memcpy(&magnitude, &scaled, 4);
    if ((bits & 0x7c00) == 0x7c00) magnitude |= 0x7f800000;  // infinity and NaN
    bits = magnitude | (bits & 0x8000) << 16;
  }
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

}  // namespace reval
