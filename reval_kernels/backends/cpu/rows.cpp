// The row kernels: what one read of a row's logits yields (`partial`), and its gradient from another (`gradient`).
//
// Compiled once per instruction set (REVAL_ISA, its namespace). Everything is fp32 inside. Online softmax by lanes:
// each lane of the vector keeps its own maximum, so nothing crosses lanes until the row ends.
#include "lanes.h"

namespace {

using reval::DType;
using reval::Partial;
using reval::RowGradient;
using reval::Transform;

inline float sum_lanes(F x) {
  float total = 0;
  for (int i = 0; i < W; ++i) total += x[i];
  return total;
}

template <DType type, bool capped>
inline F load_capped(const void* x, int64_t at, Transform t) {
  return cap<capped>(load<type>(x, at), t.softcap);
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

template <DType type, bool capped, bool entropy>
void partial_row(const void* x, int64_t n, Transform t, Partial* out) {
  const F inv = splat(t.inv_temperature);
  Lanes s;
  int64_t at = 0;
  for (; at + kUnroll * W <= n; at += kUnroll * W) {
    F z[kUnroll];
    for (int k = 0; k < kUnroll; ++k) z[k] = load_capped<type, capped>(x, at + k * W, t);
    F maximum = max_(max_(max_(z[0], z[1]), max_(z[2], z[3])), max_(max_(z[4], z[5]), max_(z[6], z[7])));
    if (__builtin_expect(any_at_least(maximum, s.maximum), 0)) {
      add_raising<kUnroll, entropy>(s, z, maximum, inv);
    } else {
      add<kUnroll, entropy, false>(s, z, inv);
    }
  }
  for (; at < n; at += W) {
    F z[1] = {
        at + W <= n ? load_capped<type, capped>(x, at, t) : load_rest<type, capped>(x, at, n - at, t, -kInfinity)};
    add_raising<1, entropy>(s, z, z[0], inv);
  }
  float maximum = kLowest;
  for (int i = 0; i < W; ++i) maximum = s.maximum[i] > maximum ? s.maximum[i] : maximum;
  raise<entropy>(s, splat(maximum), inv);
  *out = {maximum, sum_lanes(s.others) + (sum_lanes(s.count) - 1.0f), sum_lanes(s.spread)};
}

template <DType type, bool capped, bool entropy, bool streaming>
void gradient_row(const void* x, int64_t n, Transform t, RowGradient row, void* out) {
  constexpr int size = type == reval::kFloat ? 4 : 2;
  const F inv = splat(t.inv_temperature), row_max = splat(row.row_max), log_sum = splat(row.log_sum);
  const F from_all = splat(row.from_all * t.inv_temperature);
  const F from_entropy = splat(row.from_entropy * t.inv_temperature), own_entropy = splat(row.entropy);
  const float inv_softcap = capped ? 1.0f / t.softcap : 0.0f;
  auto one = [&](F z) {
    return gradient_of<capped, entropy>(z, inv, row_max, log_sum, from_all, from_entropy, own_entropy, inv_softcap);
  };
  auto rest = [&](int64_t at, int64_t count) {
    alignas(64) char buffer[4 * W];
    store<type, false>(buffer, 0, one(load_rest<type, capped>(x, at, count, t, -kInfinity)));
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
      store<type, streaming>(out, at + k * W, one(load_capped<type, capped>(x, at + k * W, t)));
    }
  }
  for (; at + W <= n; at += W) store<type, streaming>(out, at, one(load_capped<type, capped>(x, at, t)));
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

template <DType type, bool streaming>
void gradient_typed(const void* x, int64_t n, Transform t, RowGradient row, void* out) {
  if (t.softcap > 0) {
    return row.from_entropy != 0 ? gradient_row<type, true, true, streaming>(x, n, t, row, out)
                                 : gradient_row<type, true, false, streaming>(x, n, t, row, out);
  }
  return row.from_entropy != 0 ? gradient_row<type, false, true, streaming>(x, n, t, row, out)
                               : gradient_row<type, false, false, streaming>(x, n, t, row, out);
}

template <bool streaming>
void gradient_any(DType type, const void* x, int64_t n, Transform t, RowGradient row, void* out) {
  if (type == reval::kFloat) return gradient_typed<reval::kFloat, streaming>(x, n, t, row, out);
  if (type == reval::kBFloat16) return gradient_typed<reval::kBFloat16, streaming>(x, n, t, row, out);
  return gradient_typed<reval::kHalf, streaming>(x, n, t, row, out);
}

void gradient(DType type, const void* x, int64_t n, Transform t, RowGradient row, void* out, bool streaming) {
  if (streaming) return gradient_any<true>(type, x, n, t, row, out);
  return gradient_any<false>(type, x, n, t, row, out);
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

namespace reval::REVAL_ISA {

extern const RowKernels rows;
const RowKernels rows = {partial, gradient, capped, shifted, map<exp_>, map<tanh_>};

}  // namespace reval::REVAL_ISA
