// Vectors of numbers, exp, tanh, and conversions to bf16 and fp16, with one source for all instruction sets.
//
// W is the number of fp32 lanes of a vector of the instruction set that this file is compiled for. F, I, U and H are
// vectors of W numbers: fp32, int32, uint32 and uint16. The arithmetic uses the vector extension of GCC and Clang,
// which works on Arm too. Intrinsics are used only for operations that the extension does not have.
#pragma once

#include <cstdint>

#include "kernels.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

// Without always_inline, GCC keeps function calls in the loops, and each vector argument is passed through memory.
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

// a * b + c with a single rounding, if the processor has this instruction. The compiler must not fuse operations by
// itself (-ffp-contract=off), because z * inv_temperature - maximum must be exactly 0 at the maximum. So the code calls
// fused() where one rounding is better.
INLINE F fused(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// The maximum. If a or b is NaN, the result is b. So max_(bound, x) keeps a NaN of x.
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
// x[index] for each lane. Only the lowest bits of an index are used.
INLINE I permuted(I x, I index) {
#if defined(__AVX512F__)
  return (I)_mm512_permutexvar_epi32((__m512i)index, (__m512i)x);
#else
  return (I)_mm256_permutevar8x32_epi32((__m256i)x, (__m256i)index);
#endif
}
#endif

// First part of exp(x): x = n * step + r with a whole number n and |r| <= step / 2. step is ln 2 or ln 2 / W.
// shifted = n + kShift; the low bits of this float are the integer n - kBack.
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
constexpr int kBack = W == 16 ? 0 : W == 8 ? 8 : 1;  // needed by kNear
constexpr float kShift = kRound - kBack;
constexpr float kLn2 = 0.693147182f;
INLINE F shift_by(F x, float step) { return fused(x, splat(1.0f / step), splat(kShift)); }
INLINE F remainder(F x, F shifted, float step) {
  // ln 2 is split into two parts. The first part has so few digits that its product with n is exact.
  F n = shifted - kShift;
  return fused(n, splat(step / kLn2 * 2.12194440e-4f), fused(n, splat(step / kLn2 * -0.693359375f), x));
}

// (exp(r) - 1 - r) / r^2 for |r| <= ln 2 / 2. The coefficients minimise the relative error of exp(r), which is 3.1e-9.
INLINE F tail_polynomial(F r) {
  F p = fused(splat(0.00138143206f), r, splat(0.00836885162f));
  p = fused(p, r, splat(0.0416684002f));
  p = fused(p, r, splat(0.166665196f));
  return fused(p, r, splat(0.49999994f));
}

// 2^n for -126 <= n <= 127, and 0 for n = -127. `shifted` holds n as above.
INLINE F power_of_two(F shifted) { return (F)(((I)shifted << 23) + ((127 + kBack) << 23)); }

constexpr float kLeast = -88.0296936f;  // -127 ln 2: exp_ of this number is 0; smaller numbers are raised to it first

// An exponential as a product scale * p. A sum adds it with one fused multiply-add.
struct Product {
  F scale, p;
  F value() const { return scale * p; }
};

// exp(x) is computed in two stages: reduce() finds x = n * kStep + r, expand() computes the exponential from n and r.
// Each loop does one operation for all m vectors. The operations on one vector depend on each other, and the processor
// overlaps only instructions that are close together, so the independent vectors must be close together.
#if defined(__AVX2__) || defined(__AVX512F__)
constexpr float kStep = kLn2 / W;
#else
constexpr float kStep = kLn2;
#endif

// Bits that are set in `shifted` for every x from kLeast up to about kStep * kBack. For these x, n lies between
// -127 ln 2 / kStep and kBack - 1, so n - kBack is negative and small: from -1024 to -1 for W = 8, from -128 to -1 for
// W = 4. Then all bits above the lowest 10 (or 7) bits are constant. Testing these bits checks the range of many x at
// once. Only AVX2 and the plain variant use kNear.
constexpr int32_t kNear = W == 8 ? 0x4b3ffc00 : 0x4b3fff80;

template <int m>
INLINE void reduce(const F (&x)[m], F (&shifted)[m], F (&r)[m]) {
  for (int k = 0; k < m; ++k) shifted[k] = shift_by(x[k], kStep);
  for (int k = 0; k < m; ++k) r[k] = remainder(x[k], shifted[k], kStep);
}

#if defined(__AVX2__) || defined(__AVX512F__)
// The bits of 2^(k/W), minus the number that n = k adds to these bits in expand().
struct Powers {
  static constexpr int kExponent = W == 16 ? 19 : 20;  // n is shifted left by this number of bits: 23 - log2 W
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

// times * exp(x). The error is at most 2 ulp for kLeast <= x <= 88, if the result is a normal float.
template <int m>
INLINE void expand(const F (&shifted)[m], const F (&r)[m], F times, Product (&e)[m]) {
#if defined(__AVX2__) || defined(__AVX512F__)
  // exp(n * kStep) = 2^(n / W). The lowest bits of n choose the power 2^(k/W), the other bits are the exponent. One
  // integer addition puts both together.
  I powers;
  __builtin_memcpy(&powers, kPowers.bits, sizeof powers);
  for (int k = 0; k < m; ++k) {
    e[k].scale = (F)(permuted(powers, (I)shifted[k]) + ((I)shifted[k] << Powers::kExponent));
  }
  // A shorter tail_polynomial, because |r| <= ln 2 / (2 W). Relative error 1.7e-9 for W = 16, 2.6e-8 for W = 8.
  for (int k = 0; k < m; ++k) {
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

// tanh(x) = e / (e + 2) with e = exp(2|x|) - 1, with the sign of x. This form keeps the relative precision near 0.
INLINE F tanh_(F x) {
  F twice = 2.0f * (F)((I)x & 0x7fffffff);
  twice = twice > 20.0f ? splat(20.0f) : twice;  // tanh(x) rounds to 1 for larger x; a NaN stays a NaN
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

// Rounds to bf16. The result is in the upper 16 bits of each lane; the lower 16 bits are undefined.
INLINE U round_to_bfloat16(F x) {
  U bits = (U)x;
  U rounded = bits + 0x7fff + ((bits >> 16) & 1);
  I nan = x != x;
  return (U)(nan ? I{} + 0x7fc00000 : (I)rounded);
}

INLINE H to_bfloat16(F x) {
#if defined(__AVX512BF16__)
  return (H)_mm512_cvtneps_pbh((__m512)x);  // this instruction turns subnormal numbers into 0
#else
  return __builtin_convertvector(round_to_bfloat16(x) >> 16, H);
#endif
}

// Both vectors as bf16, interleaved: low[0], high[0], low[1], high[1], ...
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
  // Below 2^-14, the fp16 number is subnormal. Adding 0.5 rounds it to 10 binary digits, in the low bits of the sum.
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

// --- two vectors at a time (2 W entries) -----------------------------------------------------------------------------
//
// For bf16, x[0] gets the even entries and x[1] the odd entries of 2 W neighbouring ones. Then widening 2 W numbers is
// one shift and one mask, half of the work that widening two vectors takes.

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

// `streaming`: the store bypasses the cache. The address must then be a multiple of the size of a vector.
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
