// The row kernels: what one read of a row's logits yields (`partial`), and its gradient from another (`gradient`).
//
// Compiled once per instruction set (REVAL_TABLE names the table). Everything is fp32 inside. Online softmax by lanes:
// each lane of the vector keeps its own maximum, so nothing crosses lanes until the row ends.
#include "simd.h"

namespace {

using reval::DType;
using reval::Partial;
using reval::RowGradient;
using reval::Transform;

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLowest = -3.40282347e38f;  // stands for -inf as a maximum: -inf - kLowest is no NaN
constexpr int kUnroll = 8;

inline float sum_lanes(F x) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}

template <DType type, bool capped>
inline F load_capped(const void* x, int64_t at, Transform t) {
  F z = load<type>(x, at);
  return capped ? t.softcap * tanh_(z * (1.0f / t.softcap)) : z;
}

// The last n < W entries, the missing ones filled with `fill` after the softcap.
template <DType type, bool capped>
inline F load_rest(const void* x, int64_t at, int64_t n, Transform t, float fill) {
  constexpr int size = type == reval::kFloat ? 4 : 2;
  alignas(64) char buffer[4 * W] = {};
  __builtin_memcpy(buffer, static_cast<const char*>(x) + at * size, n * size);
  F z = load_capped<type, capped>(buffer, 0, t);
  for (int i = n; i < W; ++i) z[i] = fill;
  return z;
}

// What each lane has seen: its maximum, how many entries were at it, and sums over all others.
struct Lanes {
  F maximum = splat(kLowest), shift = splat(kLowest), count = {}, others = {}, spread = {};
};

// New maxima: what was summed under lower ones is scaled down.
template <bool entropy>
inline void raise(Lanes& s, F maximum, float inv_temperature) {
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
inline void add(Lanes& s, const F (&z)[n], float inv_temperature) {
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
__attribute__((noinline)) void add_raising(Lanes& s, const F (&z)[n], F maximum, float inv_temperature) {
  raise<entropy>(s, max_(maximum, s.maximum), inv_temperature);
  add<n, entropy, true>(s, z, inv_temperature);
}

template <DType type, bool capped, bool entropy>
void partial_row(const void* x, int64_t n, Transform t, Partial* out) {
  Lanes s;
  int64_t at = 0;
  for (; at + kUnroll * W <= n; at += kUnroll * W) {
    F z[kUnroll];
    for (int k = 0; k < kUnroll; ++k) z[k] = load_capped<type, capped>(x, at + k * W, t);
    F maximum = max_(max_(max_(z[0], z[1]), max_(z[2], z[3])), max_(max_(z[4], z[5]), max_(z[6], z[7])));
    if (__builtin_expect(any_at_least(maximum, s.maximum), 0)) {
      add_raising<kUnroll, entropy>(s, z, maximum, t.inv_temperature);
    } else {
      add<kUnroll, entropy, false>(s, z, t.inv_temperature);
    }
  }
  for (; at < n; at += W) {
    F z[1] = {
        at + W <= n ? load_capped<type, capped>(x, at, t) : load_rest<type, capped>(x, at, n - at, t, -kInfinity)};
    add_raising<1, entropy>(s, z, z[0], t.inv_temperature);
  }
  float maximum = kLowest;
  for (int i = 0; i < W; ++i) maximum = s.maximum[i] > maximum ? s.maximum[i] : maximum;
  raise<entropy>(s, splat(maximum), t.inv_temperature);
  *out = {maximum, sum_lanes(s.others) + (sum_lanes(s.count) - 1.0f), sum_lanes(s.spread)};
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

template <DType type, DType out_type, bool capped, bool entropy, bool streaming>
void gradient_row(const void* x, int64_t n, Transform t, RowGradient row, void* out) {
  constexpr int size = out_type == reval::kFloat ? 4 : 2;
  const F inv = splat(t.inv_temperature), row_max = splat(row.row_max), log_sum = splat(row.log_sum);
  const F from_all = splat(row.from_all * t.inv_temperature);
  const F from_entropy = splat(row.from_entropy * t.inv_temperature), own_entropy = splat(row.entropy);
  const float inv_softcap = capped ? 1.0f / t.softcap : 0.0f;
  auto one = [&](F z) {
    return gradient_of<capped, entropy>(z, inv, row_max, log_sum, from_all, from_entropy, own_entropy, inv_softcap);
  };
  auto rest = [&](int64_t at, int64_t count) {
    alignas(64) char buffer[4 * W];
    store<out_type, false>(buffer, 0, one(load_rest<type, capped>(x, at, count, t, -kInfinity)));
    __builtin_memcpy(static_cast<char*>(out) + at * size, buffer, count * size);
  };
  int64_t at = 0;
  if (streaming) {  // up to the first whole vector of `out`
    int64_t past = reinterpret_cast<uintptr_t>(out) / size % W;
    at = past == 0 ? 0 : (W - past < n ? W - past : n);
    if (at > 0) rest(0, at);
  }
  for (; at + 4 * W <= n; at += 4 * W) {
    for (int k = 0; k < 4; ++k) {
      store<out_type, streaming>(out, at + k * W, one(load_capped<type, capped>(x, at + k * W, t)));
    }
  }
  for (; at + W <= n; at += W) store<out_type, streaming>(out, at, one(load_capped<type, capped>(x, at, t)));
  if (at < n) rest(at, n - at);
  if (streaming) streaming_done();
}

// --- from run-time values to the template's -------------------------------------------------------------------------

template <DType type>
void partial_typed(const void* x, int64_t n, Transform t, bool entropy, Partial* out) {
  if (t.softcap > 0) {
    return entropy ? partial_row<type, true, true>(x, n, t, out) : partial_row<type, true, false>(x, n, t, out);
  }
  return entropy ? partial_row<type, false, true>(x, n, t, out) : partial_row<type, false, false>(x, n, t, out);
}

void partial(DType type, const void* x, int64_t n, Transform t, bool entropy, Partial* out) {
  if (type == reval::kFloat) return partial_typed<reval::kFloat>(x, n, t, entropy, out);
  if (type == reval::kBFloat16) return partial_typed<reval::kBFloat16>(x, n, t, entropy, out);
  return partial_typed<reval::kHalf>(x, n, t, entropy, out);
}

template <DType type, DType out_type, bool streaming>
void gradient_typed(const void* x, int64_t n, Transform t, RowGradient row, void* out) {
  if (t.softcap > 0) {
    return row.from_entropy != 0 ? gradient_row<type, out_type, true, true, streaming>(x, n, t, row, out)
                                 : gradient_row<type, out_type, true, false, streaming>(x, n, t, row, out);
  }
  return row.from_entropy != 0 ? gradient_row<type, out_type, false, true, streaming>(x, n, t, row, out)
                               : gradient_row<type, out_type, false, false, streaming>(x, n, t, row, out);
}

template <bool streaming>
void gradient_any(DType type, const void* x, int64_t n, Transform t, RowGradient row, DType out_type, void* out) {
  using namespace reval;
  if (type == kBFloat16) return gradient_typed<kBFloat16, kBFloat16, streaming>(x, n, t, row, out);
  if (type == kHalf) return gradient_typed<kHalf, kHalf, streaming>(x, n, t, row, out);
  if (out_type == kBFloat16) return gradient_typed<kFloat, kBFloat16, streaming>(x, n, t, row, out);
  return gradient_typed<kFloat, kFloat, streaming>(x, n, t, row, out);
}

void gradient(
    DType type, const void* x, int64_t n, Transform t, RowGradient row, DType out_type, void* out, bool streaming) {
  if (streaming) return gradient_any<true>(type, x, n, t, row, out_type, out);
  return gradient_any<false>(type, x, n, t, row, out_type, out);
}

float capped(float x, Transform t, float* derivative) {
  *derivative = t.inv_temperature;
  if (!(t.softcap > 0)) return x;
  float tanh = tanh_(splat(x * (1.0f / t.softcap)))[0];
  *derivative *= 1.0f - tanh * tanh;
  return t.softcap * tanh;
}

float shifted(float capped, float inv_temperature, float row_max) {
  return (splat(capped) * splat(inv_temperature) - splat(row_max))[0];
}

// Exchanges the off-diagonal blocks of size `step` in a W x W matrix of rows.
template <int step>
inline void exchange(U (&x)[W]) {
  U low, high;
  for (uint32_t i = 0; i < W; ++i) {
    low[i] = i & step ? i - step + W : i;
    high[i] = i & step ? i + W : i + step;
  }
  for (int i = 0; i < W; ++i) {
    if (i & step) continue;
    U a = x[i], b = x[i + step];
    x[i] = __builtin_shuffle(a, b, low);
    x[i + step] = __builtin_shuffle(a, b, high);
  }
}

void transpose(const uint32_t* from, int64_t ld_from, int64_t rows, int64_t columns, uint32_t* to, int64_t ld_to) {
  const int64_t whole_rows = rows / W * W, whole_columns = columns / W * W;
  for (int64_t i = 0; i < whole_rows; i += W) {
    for (int64_t j = 0; j < whole_columns; j += W) {
      U x[W];
      for (int k = 0; k < W; ++k) __builtin_memcpy(&x[k], from + (i + k) * ld_from + j, sizeof(U));
      exchange<1>(x);
      exchange<2>(x);
      if constexpr (W > 4) exchange<4>(x);
      if constexpr (W > 8) exchange<8>(x);
      for (int k = 0; k < W; ++k) __builtin_memcpy(to + (j + k) * ld_to + i, &x[k], sizeof(U));
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) to[j * ld_to + i] = from[i * ld_from + j];
  }
}

void interleave(const uint16_t* a, const uint16_t* b, int64_t n, uint32_t* out) {
  int64_t at = 0;
  for (; at + W <= n; at += W) {
    U pair = widen(load_bits(a + at));
    if (b) pair |= widen(load_bits(b + at)) << 16;
    __builtin_memcpy(out + at, &pair, sizeof pair);
  }
  for (; at < n; ++at) out[at] = a[at] | (b ? static_cast<uint32_t>(b[at]) << 16 : 0);
}

template <F function(F)>
void map(const float* x, int64_t n, float* out) {
  for (int64_t at = 0; at < n; at += W) {
    F y = splat(0.0f);
    int64_t count = n - at < W ? n - at : W;
    __builtin_memcpy(&y, x + at, 4 * count);
    y = function(y);
    __builtin_memcpy(out + at, &y, 4 * count);
  }
}

}  // namespace

namespace reval {

extern const Kernels REVAL_TABLE;
const Kernels REVAL_TABLE = {REVAL_NAME, partial, gradient, capped, shifted, transpose,
                             interleave,  map<exp_>, map<tanh_>};

}  // namespace reval
