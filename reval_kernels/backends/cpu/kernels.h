// The row kernels as the rest of the library sees them: one table of functions per instruction set.
//
// rows.cpp is compiled once per instruction set, with that set's compiler flags; isa.cpp picks a table when the library
// is loaded. Nothing here may include torch or the standard library's templates: an inline function compiled with
// AVX-512 flags could replace its plain twin at link time and kill an older processor.
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

struct Kernels {
  const char* name;
  // x: n logits of the type; the action's own entry is the caller's to put right.
  void (*partial)(DType type, const void* x, int64_t n, Transform transform, bool with_entropy, Partial* out);
  // From x to out; `out_type` is `type`, or any type when `type` is kFloat. x == out is allowed.
  // `streaming` writes past the cache.
  void (*gradient)(
      DType type, const void* x, int64_t n, Transform transform, RowGradient row, DType out_type, void* out,
      bool streaming);
  // One logit after the softcap, and the derivative of z by it.
  float (*capped)(float x, Transform transform, float* derivative);
  // z - row_max of a capped logit, rounded as in the other kernels.
  float (*shifted)(float capped, float inv_temperature, float row_max);
  // to[j][i] = from[i][j] for i < rows, j < columns; leading dimensions in entries.
  void (*transpose)(
      const uint32_t* from, int64_t ld_from, int64_t rows, int64_t columns, uint32_t* to, int64_t ld_to);
  // out[i] = {a[i], b[i]}; b null: zeros.
  void (*interleave)(const uint16_t* a, const uint16_t* b, int64_t n, uint32_t* out);
  void (*exp)(const float* x, int64_t n, float* out);
  void (*tanh)(const float* x, int64_t n, float* out);
};

extern const Kernels kernels_plain;
#ifdef REVAL_X86_VARIANTS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

// The table for this processor, or the one that REVAL_CPU_ISA (plain, avx2, avx512) names.
const Kernels& kernels();

// Whether the processor multiplies bf16 itself (and REVAL_CPU_ISA does not forbid it).
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
