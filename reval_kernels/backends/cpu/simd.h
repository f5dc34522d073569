// Vectors of floats: as wide as the instruction set this file is compiled for, with the same source for all.
//
// GCC's and Clang's vector extension does the arithmetic (on Arm too); intrinsics appear only where it has no word.
#pragma once

#include <cstdint>

#include "kernels.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Without it GCC leaves calls in the loops, and every vector goes through memory.
#define INLINE inline __attribute__((always_inline))

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

INLINE F splat(float x) { return x - F{}; }

// a * b + c in one rounding where the processor can. Written out wherever it is wanted: this file is compiled without
// fusing, because z * inv_temperature - maximum must be exactly 0 at the maximum.
INLINE F fused(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The second argument where either is NaN, so max_(bound, x) keeps a NaN in x.
INLINE F max_(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

INLINE bool all_negative(I x) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)x) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)x) == 0xff;
#else
  int32_t all = x[0];
  for (int i = 1; i < W; ++i) all &= x[i];
  return all < 0;
#endif
}

#if defined(__AVX2__) || defined(__AVX512F__)
// x[index], of which the lowest bits count.
INLINE I permuted(I x, I index) {
#if defined(__AVX512F__)
  return (I)_mm512_permutexvar_epi32((__m512i)index, (__m512i)x);
#else
  return (I)_mm256_permutevar8x32_epi32((__m256i)x, (__m256i)index);
#endif
}
#endif

// x = n * step + r with |r| <= step / 2, for a step of ln 2 over a power of two; shifted = n + kShift holds the whole
// number n - kBack in its low bits.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
constexpr int kBack = W == 16 ? 0 : W == 8 ? 8 : 1;  // for the sake of kNear
constexpr float kShift = kRound - kBack;
constexpr float kLn2 = 0.693147182f;
INLINE F shift_by(F x, float step) { return fused(x, splat(1.0f / step), splat(kShift)); }
INLINE F remainder(F x, F shifted, float step) {
  // ln 2 in two parts: the first has so few digits that its product is exact.
  F n = shifted - kShift;
  return fused(n, splat(step / kLn2 * 2.12194440e-4f), fused(n, splat(step / kLn2 * -0.693359375f), x));
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2, least relative error of exp: 3.1e-9.
INLINE F tail_polynomial(F r) {
  F p = fused(splat(0.00138143206f), r, splat(0.00836885162f));
  p = fused(p, r, splat(0.0416684002f));
  p = fused(p, r, splat(0.166665196f));
  return fused(p, r, splat(0.49999994f));
}

// 2^n for -126 <= n <= 127, and 0 for n = -127.
INLINE F power_of_two(F shifted) { return (F)(((I)shifted << 23) + ((127 + kBack) << 23)); }

constexpr float kLeast = -88.0296936f;  // -127 ln 2: exp of it is 0, and so is that of anything less

// An exponential as a product: a sum takes it in with one fused multiply and add.
struct Product {
  F scale, p;
  F value() const { return scale * p; }
};

// exp(x) in two stages, the first of which yields x = n * kStep + r. Every step is for all `m` vectors before the next: a
// vector's steps wait for each other, and the processor looks only so far ahead.
#if defined(__AVX2__) || defined(__AVX512F__)
constexpr float kStep = kLn2 / W;
#else
constexpr float kStep = kLn2;
#endif

// The bits that shifted has in any case where exp takes x as it is and x is below step * kBack, or little more: n then
// lies between -127 ln 2 / step and kBack - 1, and n - kBack has no more digits than the range from there to -1. Of AVX2
// and the plain variant.
constexpr int32_t kNear = W == 8 ? 0x4b3ffc00 : 0x4b3fff80;

template <int m>
INLINE void reduce(const F (&x)[m], F (&shifted)[m], F (&r)[m]) {
  for (int k = 0; k < m; ++k) shifted[k] = shift_by(x[k], kStep);
  for (int k = 0; k < m; ++k) r[k] = remainder(x[k], shifted[k], kStep);
}

#if defined(__AVX2__) || defined(__AVX512F__)
// The bits of 2^(k/W), less what n = k adds to the exponent.
struct Powers {
  static constexpr int kExponent = W == 16 ? 19 : 20;  // where n's bits go: 23 - log2 W
  alignas(4 * W) int32_t bits[W];
  constexpr Powers() : bits() {
    constexpr float powers[16] = {1.0f,        1.04427373f, 1.09050775f, 1.13878858f, 1.18920708f, 1.24185777f,
                                  1.29683955f, 1.35425556f, 1.41421354f, 1.47682619f, 1.54221082f, 1.61049032f,
                                  1.68179286f, 1.75625217f, 1.8340081f,  1.91520655f};
    for (int k = 0; k < W; ++k) bits[k] = __builtin_bit_cast(int32_t, powers[16 / W * k]) + ((kBack - k) << kExponent);
  }
};
constexpr Powers kPowers;
#endif

// times * exp(x), within 2 ulp for kLeast <= x <= 88 where it is a normal float.
template <int m>
INLINE void expand(const F (&shifted)[m], const F (&r)[m], F times, Product (&e)[m]) {
#if defined(__AVX2__) || defined(__AVX512F__)
  // The lowest bits of n choose among the powers, the others are the exponent; all are added to the power's bits at once.
  I powers;
  __builtin_memcpy(&powers, kPowers.bits, sizeof powers);
  for (int k = 0; k < m; ++k) {
    e[k].scale = (F)(permuted(powers, (I)shifted[k]) + ((I)shifted[k] << Powers::kExponent));
  }
  for (int k = 0; k < m; ++k) {  // as tail_polynomial, for |r| <= ln 2 / (2 W): 1.7e-9, or 2.6e-8 for W of 8
    e[k].p = W == 16 ? fused(times * 0.16668f, r[k], times * 0.5000165f)
                     : fused(times * 0.16666858f, r[k], times * 0.50006447f);
  }
#else
  for (int k = 0; k < m; ++k) e[k].scale = power_of_two(shifted[k]);
  for (int k = 0; k < m; ++k) e[k].p = times * tail_polynomial(r[k]);
#endif
  for (int k = 0; k < m; ++k) e[k].p = fused(e[k].p, r[k], times);
  for (int k = 0; k < m; ++k) e[k].p = fused(e[k].p, r[k], times);
}

template <int m>
INLINE void exp_(const F (&x)[m], F times, Product (&e)[m]) {
  F shifted[m], r[m];
  reduce(x, shifted, r);
  expand(shifted, r, times, e);
}

INLINE F exp_(F x) {
  const F all[1] = {x};
  Product e[1];
  exp_(all, splat(1.0f), e);
  return e[0].value();
}

// tanh(x) = e / (e + 2) with e = exp(2|x|) - 1, which keeps its relative precision near 0.
INLINE F tanh_(F x) {
  F twice = 2.0f * (F)((I)x & 0x7fffffff);
  twice = twice > 20.0f ? splat(20.0f) : twice;  // tanh is 1 to the last bit there; a NaN passes
  F shifted = shift_by(twice, kLn2), r = remainder(twice, shifted, kLn2);
  F power = power_of_two(shifted);
  F e = fused(power, fused(tail_polynomial(r) * r, r, r), power - 1.0f);
  F t = e / (e + 2.0f);
  return (F)((I)t | ((I)x & (int32_t)0x80000000));
}

INLINE H load_bits(const uint16_t* p) {
  H h;
  __builtin_memcpy(&h, p, sizeof h);
  return h;
}

INLINE U widen(H h) { return __builtin_convertvector(h, U); }

template <reval::DType type>
INLINE F load(const void* row, int64_t at) {
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

// Rounded to bf16, in the upper halves; the lower halves hold anything.
INLINE U round_to_bfloat16(F x) {
  U bits = (U)x;
  U rounded = bits + 0x7fff + ((bits >> 16) & 1);
  I nan = x != x;
  return (U)(nan ? I{} + 0x7fc00000 : (I)rounded);
}

INLINE H to_bfloat16(F x) {
#if defined(__AVX512BF16__)
  return (H)_mm512_cvtneps_pbh((__m512)x);  // subnormal numbers become 0
#else
  return __builtin_convertvector(round_to_bfloat16(x) >> 16, H);
#endif
}

// Both as bf16, alternating: low[0], high[0], low[1], ...
INLINE U pair_bfloat16(F low, F high) {
#if defined(__AVX512BF16__)
  typedef uint16_t Words __attribute__((vector_size(64)));
  Words alternate;
  for (int i = 0; i < 2 * W; ++i) alternate[i] = i % 2 * W + i / 2;
  return (U)_mm512_permutexvar_epi16((__m512i)alternate, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
#else
  return round_to_bfloat16(low) >> 16 | (round_to_bfloat16(high) & 0xffff0000u);
#endif
}

INLINE H to_half(F x) {
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

template <reval::DType type>
INLINE void store(void* row, int64_t at, F x) {
  if constexpr (type == reval::kFloat) {
    __builtin_memcpy(static_cast<float*>(row) + at, &x, sizeof x);
  } else {
    H h = type == reval::kBFloat16 ? to_bfloat16(x) : to_half(x);
    __builtin_memcpy(static_cast<uint16_t*>(row) + at, &h, sizeof h);
  }
}

// --- two vectors at a time, 2 W entries: half the work for bf16, of which the vectors take turns ---------------------

template <reval::DType type>
INLINE void load_two(const void* row, int64_t at, F* x) {
  if constexpr (type == reval::kBFloat16) {
    U both;
    __builtin_memcpy(&both, static_cast<const uint16_t*>(row) + at, sizeof both);
    x[0] = (F)(both << 16);
    x[1] = (F)(both & 0xffff0000u);
  } else {
    x[0] = load<type>(row, at);
    x[1] = load<type>(row, at + W);
  }
}

// `streaming`: past the cache; the address must then be a multiple of the vector's size.
template <bool streaming>
INLINE void store_bits(void* to, U x) {
#if defined(__AVX512F__)
  if constexpr (streaming) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)x);
#elif defined(__AVX2__)
  if constexpr (streaming) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)x);
#endif
  __builtin_memcpy(to, &x, sizeof x);
}

template <reval::DType type, bool streaming>
INLINE void store_two(void* row, int64_t at, const F* x) {
  if constexpr (type == reval::kFloat) {
    store_bits<streaming>(static_cast<float*>(row) + at, (U)x[0]);
    store_bits<streaming>(static_cast<float*>(row) + at + W, (U)x[1]);
  } else {
    U both;
    if constexpr (type == reval::kBFloat16) {
      both = pair_bfloat16(x[0], x[1]);
    } else {
      const H halves[2] = {to_half(x[0]), to_half(x[1])};
      __builtin_memcpy(&both, halves, sizeof both);
    }
    store_bits<streaming>(static_cast<uint16_t*>(row) + at, both);
  }
}

INLINE void streaming_done() {
#if defined(__AVX2__) || defined(__AVX512F__)
  _mm_sfence();
#endif
}

}  // namespace
