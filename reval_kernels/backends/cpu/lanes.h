// Online softmax by lanes, and the gradient of one vector of logits: what rows.cpp and columns.cpp share.
#pragma once

#include "simd.h"

namespace {

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLowest = -3.40282347e38f;  // stands for -inf as a maximum: -inf - kLowest is no NaN
constexpr int kUnroll = 8;

// A logit after the softcap, which is 0 where there is none.
template <bool capped>
inline F cap(F z, float softcap) {
  return capped ? softcap * tanh_(z * (1.0f / softcap)) : z;
}

// What each lane has seen: its maximum, how many entries were at it, and sums over all others.
struct Lanes {
  F maximum = splat(kLowest), shift = splat(kLowest), count = {}, others = {}, spread = {};
};

// New maxima: what was summed under lower ones is scaled down.
template <bool entropy>
inline void raise(Lanes& s, F maximum, F inv_temperature) {
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

// Takes in `n` vectors; `exact` when some of their entries reach the lanes' maxima, which then have been raised.
template <int n, bool entropy, bool exact>
inline void add(Lanes& s, const F (&z)[n], F inv_temperature) {
  F others[2] = {}, spread[2] = {};
  for (int k = 0; k < n; ++k) {
    F d = max_(splat(kLeast), z[k] * inv_temperature - s.shift);
    F e = exp_(d);
    if (exact) {
      I at_maximum = z[k] == s.maximum;
      s.count += at_maximum ? splat(1.0f) : F{};
      e = at_maximum ? F{} : e;
    }
    others[k % 2] += e;
    if (entropy) spread[k % 2] = fused(e, d, spread[k % 2]);
  }
  s.others += others[0] + others[1];
  if (entropy) s.spread += spread[0] + spread[1];
}

template <int n, bool entropy>
__attribute__((noinline)) void add_raising(Lanes& s, const F (&z)[n], F maximum, F inv_temperature) {
  raise<entropy>(s, max_(maximum, s.maximum), inv_temperature);
  add<n, entropy, true>(s, z, inv_temperature);
}

// The gradient of W logits, already capped.
template <bool capped, bool entropy>
inline F gradient_of(F z, F inv, F row_max, F log_sum, F from_all, F from_entropy, F own_entropy, float inv_softcap) {
  F log_p = (z * inv - row_max) - log_sum;
  F p = exp_(max_(splat(kLeast), log_p));
  F g = from_all;
  if (entropy) g = fused(-from_entropy, max_(splat(kLeast), log_p) + own_entropy, from_all);
  g = p * g;
  if (capped) {
    F tanh = z * inv_softcap;
    g = g * fused(-tanh, tanh, splat(1.0f));
  }
  return g;
}

}  // namespace
