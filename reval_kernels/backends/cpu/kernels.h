// The vectorised kernels as the rest of the library sees them: one table of functions per instruction set.
//
// rows.cpp, columns.cpp and layout.cpp are compiled once per instruction set, with that set's compiler flags; isa.cpp
// picks a table when the library is loaded. Nothing here may include torch or the standard library's templates: an
// inline function compiled with AVX-512 flags could replace its plain twin at link time and kill an older processor.
#pragma once

#include <cstdint>

namespace reval {

enum DType { kFloat, kBFloat16, kHalf };

// Softcap and temperature: z = cap * tanh(x / cap), then z * inv_temperature. softcap 0 stands for none.
struct Transform {
  float softcap;
  float inv_temperature;
};

// What is known of a row after some of its logits: their maximum (after the softcap, before the temperature); the sum
// of exp(z - maximum) over all but one entry at the maximum; and the sum of exp(z - maximum) * (z - maximum), which
// only the entropy needs. The largest weight, 1, stays out of the sum: next to it the rest would lose the digits in
// which a confident state's 1 - p is written.
struct Partial {
  float maximum;
  float others;
  float spread;
};

// The gradient of a row: p * (from_all - from_entropy * (log p + entropy)), log p = (z - row_max) - log_sum.
struct RowGradient {
  float row_max;
  float log_sum;
  float entropy;
  float from_all;
  float from_entropy;
};

// A row of logits lies in one piece.
struct RowKernels {
  void (*partial)(DType type, const void* x, int64_t n, Transform transform, bool with_entropy, Partial* out);
  // From x to out, both of the type; x == out is allowed. `streaming` writes past the cache.
  void (*gradient)(
      DType type, const void* x, int64_t n, Transform transform, RowGradient row, void* out, bool streaming);
  // One logit after the softcap, and the derivative of z by it.
  float (*capped)(float x, Transform transform, float* derivative);
  // z - row_max of a capped logit, rounded as in the other kernels.
  float (*shifted)(float capped, float inv_temperature, float row_max);
  void (*exp)(const float* x, int64_t n, float* out);
  void (*tanh)(const float* x, int64_t n, float* out);
};

// A strip of tokens side by side: the logits of a word are a row, those of a token a column of [words, kStrip] fp32.
// Kernels take the columns in whole vectors: their number must be a multiple of kColumns.
constexpr int64_t kStrip = 64;
constexpr int64_t kColumns = 16;

// What is known of each token after some of its words, as in Partial; summed in double over the calls.
struct ColumnSums {
  float maximum[kStrip];
  float factor[kStrip];  // what the last call scaled the sums before it by
  double others[kStrip], spread[kStrip];
};

// RowGradient for each token, the last two times inv_temperature.
struct ColumnGradients {
  const float *row_max, *log_sum, *entropy, *from_all, *from_entropy;
  bool with_entropy;  // whether any from_entropy is not 0
};

// Memory that will be needed next: fetched between the arithmetic, it costs nothing.
struct Ahead {
  const void* memory;
  int64_t bytes;
};

struct ColumnKernels {
  // Takes `words` rows of logits into the sums.
  void (*partial)(
      const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature, bool with_entropy,
      ColumnSums* sums);
  // The gradient of each logit; out may be x (then ld_out is kStrip).
  void (*gradient)(
      const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature,
      const ColumnGradients& by, Ahead ahead, float* out, int64_t ld_out);
  // In bf16, twice: by word (unless null) and as [words / 2, kStrip] pairs of words (odd words: the last with 0).
  void (*gradient_bf16)(
      const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature,
      const ColumnGradients& by, Ahead ahead, uint16_t* out, int64_t ld_out, uint32_t* pairs);
  // Copies logits past the cache, to memory aligned to 64 bytes.
  void (*keep)(const float* x, int64_t words, float* out);
  // Logits to 16 bits, past the cache, and back (kept.h): (x - anchor) * step + kOffset, whole and from -2^15 on, which
  // stands for -inf.
  // False if one of them is not below 2^15, or with `all_of_them` is -2^15.
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
  // out[i] = {a[i], b[i]}; b null: zeros.
  void (*interleave)(const uint16_t* a, const uint16_t* b, int64_t n, uint32_t* out);
  // n numbers of one type to another.
  void (*convert)(DType from_type, const void* from, int64_t n, DType to_type, void* to);
};

struct Kernels {
  const char* name;
  const RowKernels& rows;
  const ColumnKernels& columns;
  const LayoutKernels& layout;
};

// Those for this processor, or those that REVAL_CPU_ISA (plain, avx2, avx512, avx512bf16) names, if it runs them.
const Kernels& kernels();

// Whether these kernels are for a processor that multiplies bf16 itself.
bool has_bf16_matmul();

inline float load_scalar(DType type, const void* row, int64_t index) {
  if (type == kFloat) return static_cast<const float*>(row)[index];
  uint32_t bits = static_cast<const uint16_t*>(row)[index];
  if (type == kBFloat16) {
    bits <<= 16;
  } else {
    // The half's exponent and fraction, moved into place, are 2^112 too small; this also mends subnormals.
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
