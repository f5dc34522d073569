// Vectors of floats: as wide as the instruction set this file is compiled for, with the same source for all.
//
// GCC's and Clang's vector extension does the arithmetic (on Arm too); intrinsics appear only where it has no word.
#pragma once

#include <cstdint>

#include "kernels.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef uint16_t H __attribute__((vector_size(2 * W)));

inline F splat(float x) { return x - F{}; }

// a * b + c in one rounding where the processor can. Written out wherever it is wanted: this file is compiled without
// fusing, because z * inv_temperature - maximum must be exactly 0 at the maximum.
inline F fused(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The second argument where either is NaN, so max_(bound, x) keeps a NaN in x.
inline F max_(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

inline bool any_at_least(F a, F b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ)) != 0;
#else
  I at_least = a >= b;
  int32_t any = 0;
  for (int i = 0; i < W; ++i) any |= at_least[i];
  return any != 0;
#endif
}

// p * 2^n for a whole number n in [-220, 127] that `shifted` = n + 1.5 * 2^23 holds in its low bits.
inline F scale_by_power(F p, [[maybe_unused]] F n, [[maybe_unused]] F shifted) {
#if defined(__AVX512F__)
  return (F)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // In two steps, for 2^n may be no normal float; products, not sums of bits: a NaN stays one.
  I whole = ((I)shifted << 9) >> 9, half = whole >> 1;
  return p * (F)((half + 127) << 23) * (F)((whole - half + 127) << 23);
#endif
}

constexpr float kLeast = -150.0f;  // exp of it is 0, and so is that of anything less

struct Reduced {
  F n, shifted, r;
};

// x = n * ln 2 + r with |r| <= ln 2 / 2. ln 2 in two parts: the first has so few digits that its product is exact.
inline Reduced reduce(F x) {
  const F magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  F shifted = fused(x, splat(1.44269504f), magic);
  F n = shifted - magic;
  F r = fused(n, splat(-0.693359375f), x);
  return {n, shifted, fused(n, splat(2.12194440e-4f), r)};
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2, least relative error of exp: 3.1e-9.
inline F tail_polynomial(F r) {
  F p = fused(splat(0.00138143206f), r, splat(0.00836885162f));
  p = fused(p, r, splat(0.0416684002f));
  p = fused(p, r, splat(0.166665196f));
  return fused(p, r, splat(0.49999994f));
}

// exp(x) within 2 ulp for kLeast <= x <= 88 where that is a normal float.
inline F exp_(F x) {
  Reduced a = reduce(x);
  F p = fused(tail_polynomial(a.r), a.r, splat(1.0f));
  return scale_by_power(fused(p, a.r, splat(1.0f)), a.n, a.shifted);
}

// tanh(x) = e / (e + 2) with e = exp(2|x|) - 1, which keeps its relative precision near 0.
inline F tanh_(F x) {
  F twice = 2.0f * (F)((I)x & 0x7fffffff);
  twice = twice > 20.0f ? splat(20.0f) : twice;  // tanh is 1 to the last bit there; a NaN passes
  Reduced a = reduce(twice);
  F power = scale_by_power(splat(1.0f), a.n, a.shifted);
  F e = fused(power, fused(tail_polynomial(a.r) * a.r, a.r, a.r), power - 1.0f);
  F t = e / (e + 2.0f);
  return (F)((I)t | ((I)x & (int32_t)0x80000000));
}

inline H load_bits(const uint16_t* p) {
  H h;
  __builtin_memcpy(&h, p, sizeof h);
  return h;
}

inline U widen(H h) { return __builtin_convertvector(h, U); }

template <reval::DType type>
inline F load(const void* row, int64_t at) {
  if constexpr (type == reval::kFloat) {
    F x;
    __builtin_memcpy(&x, static_cast<const float*>(row) + at, sizeof x);
    return x;
  } else if constexpr (type == reval::kBFloat16) {
    return (F)(widen(load_bits(static_cast<const uint16_t*>(row) + at)) << 16);
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(row) + at;
#if defined(__AVX512F__)
    return (F)_mm512_cvtph_ps((__m256i)load_bits(p));
#elif defined(__AVX2__)
    return (F)_mm256_cvtph_ps((__m128i)load_bits(p));
#else
    F x;
    for (int i = 0; i < W; ++i) x[i] = reval::load_scalar(reval::kHalf, p, i);
    return x;
#endif
  }
}

inline H to_bfloat16(F x) {
  U bits = (U)x;
  U rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  I nan = x != x;
  return __builtin_convertvector((U)(nan ? I{} + 0x7fc0 : (I)rounded), H);
}

inline H to_half(F x) {
#if defined(__AVX512F__)
  return (H)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__)
  return (H)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
  U bits = (U)x, sign = bits & 0x80000000u, magnitude = bits ^ sign;
  // Below 2^-14 a half is subnormal: adding 0.5 leaves its 10 digits, rounded, in the low bits.
  U small = (U)((F)magnitude + 0.5f) - 0x3f000000u;
  U normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - (112u << 23)) >> 13;
  U half = (I)magnitude < 0x38800000 ? small : normal;
  half = (I)magnitude >= 0x477ff000 ? U{} + 0x7c00u : half;
  half = (I)magnitude > 0x7f800000 ? U{} + 0x7e00u : half;
  return __builtin_convertvector(half | (sign >> 16), H);
#endif
}

// `streaming`: past the cache; the address must then be a multiple of the vector's size.
template <bool streaming>
inline void store_bits(uint16_t* p, H h) {
#if defined(__AVX512F__)
  if constexpr (streaming) return _mm256_stream_si256((__m256i*)p, (__m256i)h);
#elif defined(__AVX2__)
  if constexpr (streaming) return _mm_stream_si128((__m128i*)p, (__m128i)h);
#endif
  __builtin_memcpy(p, &h, sizeof h);
}

template <reval::DType type, bool streaming>
inline void store(void* row, int64_t at, F x) {
  if constexpr (type == reval::kFloat) {
    float* p = static_cast<float*>(row) + at;
#if defined(__AVX512F__)
    if constexpr (streaming) return _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
    if constexpr (streaming) return _mm256_stream_ps(p, (__m256)x);
#endif
    __builtin_memcpy(p, &x, sizeof x);
  } else {
    H h = type == reval::kBFloat16 ? to_bfloat16(x) : to_half(x);
    store_bits<streaming>(static_cast<uint16_t*>(row) + at, h);
  }
}

inline void streaming_done() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace
