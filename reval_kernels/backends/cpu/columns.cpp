// The column kernels: maximum, sums and gradients as in rows.cpp, for logits [words, kStrip] that come out of a matmul.
// Here a column is a token. A lane of a vector is a token too, so no operation crosses lanes.
//
// This file is compiled once per instruction set. REVAL_ISA is the name of the instruction set and of the namespace.
// All arithmetic is in fp32. `tokens` is the number of columns, a multiple of kColumns.
#include "lanes.h"

namespace {

using reval::Ahead;
using reval::ColumnGradients;
using reval::ColumnSums;
using reval::kStrip;

constexpr int kVectors = kStrip / W;

INLINE F get(const float* x, int64_t at) { return load<reval::kFloat>(x, at); }

inline void put(float* x, int64_t at, F value) { store<reval::kFloat>(x, at, value); }

// Adds the sums `s` of one call to the sums of all earlier calls. The maxima in `s` already include the earlier maxima.
template <bool entropy>
void merge(const Lanes& s, F inv, int64_t at, ColumnSums* sums) {
  const F known = get(sums->maximum, at), one_at_maximum = s.maximum > kLowest ? splat(1.0f) : F{};
  F d = max_(splat(kLowest), known * inv) - s.shift;
  d = s.maximum > known ? max_(splat(kLeast), d) : F{};
  const F factor = exp_(d), others = s.others + (s.count - one_at_maximum);
  put(sums->maximum, at, s.maximum);
  put(sums->factor, at, factor);
  for (int i = 0; i < W; ++i) {
    double& total = sums->others[at + i];
    double& spread = sums->spread[at + i];
    if (entropy) spread = factor[i] * (spread + static_cast<double>(d[i]) * total) + s.spread[i];
    total = factor[i] * total + others[i];
  }
}

template <bool capped, bool entropy>
void partial_columns(
    const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature, ColumnSums* sums) {
  const int vectors = tokens / W;
  Lanes lanes[kVectors];
  for (int v = 0; v < vectors; ++v) {
    Lanes& s = lanes[v];
    s.maximum = get(sums->maximum, v * W);
    s.shift = max_(splat(kLowest), s.maximum * get(inv_temperature, v * W));
    s.count = s.maximum > kLowest ? splat(1.0f) : F{};
  }
  int64_t word = 0;
  for (; word + kUnroll <= words; word += kUnroll) {
    for (int v = 0; v < vectors; ++v) {
      take<kUnroll, entropy, false>(
          lanes[v], [=](int k) { return cap<capped>(get(x, (word + k) * kStrip + v * W), softcap); },
          get(inv_temperature, v * W));
    }
  }
  for (; word < words; ++word) {
    for (int v = 0; v < vectors; ++v) {
      take<1, entropy, false>(
          lanes[v], [=](int) { return cap<capped>(get(x, word * kStrip + v * W), softcap); },
          get(inv_temperature, v * W));
    }
  }
  for (int v = 0; v < vectors; ++v) merge<entropy>(lanes[v], get(inv_temperature, v * W), v * W, sums);
}

void partial(
    const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature, bool with_entropy,
    ColumnSums* sums) {
  if (softcap > 0) {
    return with_entropy ? partial_columns<true, true>(x, words, tokens, softcap, inv_temperature, sums)
                        : partial_columns<true, false>(x, words, tokens, softcap, inv_temperature, sums);
  }
  return with_entropy ? partial_columns<false, true>(x, words, tokens, softcap, inv_temperature, sums)
                      : partial_columns<false, false>(x, words, tokens, softcap, inv_temperature, sums);
}

// Computes the gradients of the logits of n words, for W tokens at a time, and calls write(word, first token,
// gradients).
template <bool capped, bool entropy, int n, typename Write>
INLINE void gradient_words(
    const float* x, int64_t word, int64_t tokens, float softcap, const float* inv_temperature,
    const LaneGradients* by, const Write& write) {
  const float inv_softcap = capped ? 1.0f / softcap : 0.0f;
  for (int64_t at = 0; at < tokens; at += W) {
    F z[n];
    for (int k = 0; k < n; ++k) z[k] = cap<capped>(get(x, (word + k) * kStrip + at), softcap);
    gradients_of<capped, entropy>(z, get(inv_temperature, at), by[at / W], inv_softcap);
    write(word, at, z);
  }
}

template <bool capped, bool entropy, typename Write>
void gradient_columns(
    const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature,
    const ColumnGradients& by, Ahead ahead, const Write& write) {
  LaneGradients lanes[kVectors];
  for (int64_t at = 0; at < tokens; at += W) {
    lanes[at / W] = {
        get(by.row_max, at), get(by.log_sum, at), entropy ? get(by.entropy, at) : F{}, get(by.from_all, at),
        entropy ? get(by.from_entropy, at) : F{}};
    lanes[at / W].divide_by_sum();
  }
  constexpr int64_t line = 64;
  const char* soon = static_cast<const char*>(ahead.memory);
  const int64_t step = (ahead.bytes / line * kGroup + words - 1) / words * line;
  int64_t word = 0;
  for (; word + kGroup <= words; word += kGroup) {
    for (int64_t i = word / kGroup * step; i < word / kGroup * step + step && i < ahead.bytes; i += line) {
      __builtin_prefetch(soon + i, 0, 2);
    }
    gradient_words<capped, entropy, kGroup>(x, word, tokens, softcap, inv_temperature, lanes, write);
  }
  for (; word + 2 <= words; word += 2) {
    gradient_words<capped, entropy, 2>(x, word, tokens, softcap, inv_temperature, lanes, write);
  }
  if (word < words) gradient_words<capped, entropy, 1>(x, word, tokens, softcap, inv_temperature, lanes, write);
}

template <typename Write>
inline void gradient_any(
    const float* x, int64_t words, int64_t tokens, float softcap, const float* inv, const ColumnGradients& by,
    Ahead ahead, const Write& write) {
  if (softcap > 0) {
    return by.with_entropy ? gradient_columns<true, true>(x, words, tokens, softcap, inv, by, ahead, write)
                           : gradient_columns<true, false>(x, words, tokens, softcap, inv, by, ahead, write);
  }
  return by.with_entropy ? gradient_columns<false, true>(x, words, tokens, softcap, inv, by, ahead, write)
                         : gradient_columns<false, false>(x, words, tokens, softcap, inv, by, ahead, write);
}

void gradient(
    const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature,
    const ColumnGradients& by, Ahead ahead, float* out, int64_t ld_out) {
  gradient_any(x, words, tokens, softcap, inv_temperature, by, ahead, [=](int64_t word, int64_t at, const auto& g) {
    for (const F& one : g) put(out, word++ * ld_out + at, one);
  });
}

void gradient_bf16(
    const float* x, int64_t words, int64_t tokens, float softcap, const float* inv_temperature,
    const ColumnGradients& by, Ahead ahead, uint16_t* out, int64_t ld_out, uint32_t* pairs) {
  gradient_any(x, words, tokens, softcap, inv_temperature, by, ahead, [=](int64_t word, int64_t at, const auto& g) {
    constexpr int n = sizeof g / sizeof(F);
    for (int k = 0; k < n; k += 2) {
      const U pair = pair_bfloat16(g[k], k + 1 < n ? g[k + 1] : F{});
      __builtin_memcpy(pairs + (word + k) / 2 * kStrip + at, &pair, sizeof pair);
    }
    if (!out) return;
    for (int k = 0; k < n; ++k) store<reval::kBFloat16>(out, (word + k) * ld_out + at, g[k]);
  });
}

constexpr float kLeastKept = -32768.0f, kMostKept = 32767.0f;
constexpr float kOffset = 8192.0f;  // shifts the range, so that it reaches 40 below the anchor and 24 above, in log p

void keep(const float* x, int64_t words, float* out) {
  for (int64_t i = 0; i < words * kStrip; i += W) store_bits<true>(out + i, (U)get(x, i));
  streaming_done();
}

// The integers of two vectors of a word are stored as one vector, interleaved.
bool keep_steps(
    const float* x, int64_t words, int64_t tokens, const float* anchor, const float* step, bool all_of_them,
    int16_t* out) {
  F most = splat(kLeastKept), least = splat(kMostKept);
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t first = 0; first < tokens; first += 2 * W) {
      U bits[2] = {};
      for (int64_t at = first; at < first + 2 * W && at < tokens; at += W) {
        F steps = fused(get(x, word * kStrip + at) - get(anchor, at), get(step, at), splat(kOffset));
        // `most` ignores NaN. The results of a token with NaN are NaN in any case, but other tokens share its lane.
        most = max_(steps, most);
        least = steps < least ? steps : least;
        steps = steps > kLeastKept ? steps : splat(kLeastKept);
        bits[at > first] = (U)(steps + kRound);
      }
      store_bits<true>(out + word * kStrip + first, (bits[0] & 0xffff) | bits[1] << 16);
    }
  }
  streaming_done();
  const bool low = !all_negative((I)(kLeastKept + 1.0f - least));
  return all_negative((I)(most - kMostKept)) && !(all_of_them && low);
}

void restore_steps(
    const int16_t* from, int64_t words, int64_t tokens, const float* anchor, const float* inv_step, float* x) {
  for (int64_t word = 0; word < words; ++word) {
    for (int64_t first = 0; first < tokens; first += 2 * W) {
      U bits;
      __builtin_memcpy(&bits, from + word * kStrip + first, sizeof bits);
      for (int64_t at = first; at < first + 2 * W && at < tokens; at += W) {
        const F steps = __builtin_convertvector((I)(at > first ? bits : bits << 16) >> 16, F);
        const F logit = fused(steps - kOffset, get(inv_step, at), get(anchor, at));
        put(x, word * kStrip + at, steps > kLeastKept ? logit : splat(-kInfinity));
      }
    }
  }
}

}  // namespace

namespace reval::REVAL_ISA {

extern const ColumnKernels columns;
const ColumnKernels columns = {partial, gradient, gradient_bf16, keep, keep_steps, restore_steps};

}  // namespace reval::REVAL_ISA
