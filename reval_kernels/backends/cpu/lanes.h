// Code that rows.cpp and columns.cpp share: the online softmax, with separate sums in each lane of a vector, and the
// gradient of vectors of logits.
//
// Letters: here z is a logit after the softcap and before the temperature; inv = 1 / temperature; W is the number of
// lanes of a vector.
#pragma once

#include "simd.h"

namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLowest = -3.40282347e38f;  // replaces -inf as a maximum, because -inf - -inf is NaN
constexpr int kUnroll = 8;
constexpr int kGroup = W == 16 ? 4 : 2;  // vectors processed together; more vectors do not fit in the registers

// A logit after the softcap. `capped` is false if there is no softcap.
template <bool capped>
INLINE F cap(F z, float softcap) {
  return capped ? softcap * tanh_(z / softcap) : z;
}

// State of the online softmax, separate for each lane:
//   maximum         the largest logit so far, after the softcap and before the temperature
//   shift           maximum * inv_temperature, at least kLowest
//   count           number of entries equal to the maximum
//   others, spread  sums over all entries below the maximum, as in Partial
struct Lanes {
  F maximum = splat(kLowest), shift = splat(kLowest), count = {}, others = {}, spread = {};
};

// Sets new maxima. The sums so far are relative to the old maxima, so they are multiplied by exp(old shift - new
// shift). Where the maximum rises, the entries at the old maximum (`joining`) become part of the sums.
template <bool entropy>
INLINE void raise(Lanes& s, F maximum, F inv_temperature) {
  F shift = max_(splat(kLowest), maximum * inv_temperature);
  F d = max_(splat(kLeast), s.shift - shift);
  I raised = maximum > s.maximum;
  F factor = raised ? exp_(d) : splat(1.0f), joining = raised ? s.count : F{};
  if (entropy) s.spread = factor * (s.spread + (raised ? d : F{}) * (s.others + joining));
  s.others = factor * (s.others + joining);
  s.count -= joining;
  s.maximum = maximum;
  s.shift = shift;
}

template <int n, bool entropy>
INLINE void add(Lanes& s, const F (&d)[n]) {
  constexpr int group = n < kGroup ? n : kGroup;
  F others[group] = {}, spread[group] = {};
  for (int first = 0; first < n; first += group) {
    F x[group];
    Product e[group];
    for (int k = 0; k < group; ++k) x[k] = max_(splat(kLeast), d[first + k]);
    exp_(x, splat(1.0f), e);
    for (int k = 0; k < group; ++k) {
      others[k] = fused(e[k].scale, e[k].p, others[k]);
      if (entropy) spread[k] = fused(e[k].value(), x[k], spread[k]);
    }
  }
  // The new terms are added to each other first. Then only one addition rounds to the precision of the large sum so
  // far.
  for (int k = 1; k < group; ++k) {
    others[0] += others[k];
    spread[0] += spread[k];
  }
  s.others += others[0];
  s.spread += spread[0];
}

template <int n, bool entropy, bool one_row, typename Logits>
__attribute__((noinline)) Lanes add_raising(Lanes s, Logits logits, F inv_temperature) {
  F z[n], d[n], maximum = s.maximum;
  for (int k = 0; k < n; ++k) {
    z[k] = logits(k);
    maximum = max_(z[k], maximum);
  }
  if (one_row) {
    for (int i = 1; i < W; ++i) maximum[0] = maximum[i] > maximum[0] ? maximum[i] : maximum[0];
    maximum = splat(maximum[0]);
  }
  raise<entropy>(s, maximum, inv_temperature);
  for (int k = 0; k < n; ++k) {
    I at_maximum = z[k] == s.maximum;
    s.count += at_maximum ? splat(1.0f) : F{};
    d[k] = at_maximum ? splat(-kInfinity) : z[k] * inv_temperature - s.shift;
  }
  add<n, entropy>(s, d);
  return s;
}

// Adds n vectors of logits to the sums. logits(k) returns vector k. d is z * inv_temperature - shift: if every d is
// negative, no logit reaches the maximum, and the fast path needs no comparison per entry.
template <int n, bool entropy, bool one_row, typename Logits>
INLINE void take(Lanes& s, const Logits& logits, F inv_temperature) {
  F d[n];
  I below;
  for (int k = 0; k < n; ++k) {
    d[k] = logits(k) * inv_temperature - s.shift;
    below = k ? below & (I)d[k] : (I)d[k];
  }
  if (__builtin_expect(all_negative(below), 1)) {
    add<n, entropy>(s, d);
  } else {
    s = add_raising<n, entropy, one_row>(s, logits, inv_temperature);
  }
}

// RowGradient for each lane. divide_by_sum() multiplies from_all and from_entropy by 1 / sum = exp(-log_sum). Then
// gradients_of computes p as exp(z * inv - row_max) and need not subtract log_sum from each entry. The subtraction
// would also round, and so change p.
struct LaneGradients {
  F row_max, log_sum, entropy, from_all, from_entropy;

  INLINE void divide_by_sum() {
    const I finite = log_sum - log_sum == 0.0f;
    const F share = finite ? exp_(max_(splat(kLeast), -log_sum)) : splat(1.0f);
    // If log_sum is infinite, p = exp(z * inv - infinity) is 0, or NaN for an infinite entry.
    row_max = finite ? row_max : row_max + log_sum;
    log_sum = finite ? log_sum : F{};
    from_all *= share;
    from_entropy *= share;
  }
};

// Replaces n vectors of logits z (after the softcap) by their gradients.
template <bool capped, bool entropy, int n>
INLINE void gradients_of(F (&z)[n], F inv, const LaneGradients& by, float inv_softcap) {
  F d[n];
  Product e[n];
  for (int k = 0; k < n; ++k) d[k] = z[k] * inv - by.row_max;
  for (int k = 0; k < n; ++k) d[k] = max_(splat(kLeast), d[k]);
  exp_(d, entropy ? splat(1.0f) : by.from_all, e);
  for (int k = 0; k < n; ++k) {
    F g = e[k].value();
    if (entropy) g *= fused(-by.from_entropy, (d[k] - by.log_sum) + by.entropy, by.from_all);
    if (capped) {
      F tanh = z[k] * inv_softcap;
      g = g * fused(-tanh, tanh, splat(1.0f));
    }
    z[k] = g;
  }
}

}  // namespace
