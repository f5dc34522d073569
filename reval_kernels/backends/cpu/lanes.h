// Online softmax by lanes, and the gradient of one vector of logits: what rows.cpp and columns.cpp share.
#pragma once

#include "simd.h"

namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLowest = -3.40282347e38f;  // stands for -inf as a maximum: -inf - kLowest is no NaN
constexpr int kUnroll = 8;
constexpr int kGroup = W == 16 ? 4 : 2;  // vectors at a time: more do not fit the registers

// A logit after the softcap, which is 0 where there is none.
template <bool capped>
INLINE F cap(F z, float softcap) {
  return capped ? softcap * tanh_(z / softcap) : z;
}

// What each lane has seen: its maximum, how many entries were at it, and sums over all others.
struct Lanes {
  F maximum = splat(kLowest), shift = splat(kLowest), count = {}, others = {}, spread = {};
};

// New maxima: what was summed under lower ones is scaled down.
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
  for (int k = 1; k < group; ++k) {  // first among themselves: one rounding to the digits of the sum so far, not several
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

// Takes in the `n` vectors of logits that `logits` gives by their number.
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

// RowGradient by lanes, with p = exp(z - row_max) / sum and 1 / sum a part of from_all and from_entropy: that takes no
// subtraction of log_sum from each entry, which would round p as well.
struct LaneGradients {
  F row_max, log_sum, entropy, from_all, from_entropy;

  INLINE void divide_by_sum() {
    const I finite = log_sum - log_sum == 0.0f;
    const F share = finite ? exp_(max_(splat(kLeast), -log_sum)) : splat(1.0f);
    row_max = finite ? row_max : row_max + log_sum;  // p is 0, but NaN at the infinities themselves
    log_sum = finite ? log_sum : F{};
    from_all *= share;
    from_entropy *= share;
  }
};

// The gradients of n vectors of logits, already capped, in their place.
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
