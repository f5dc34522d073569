// The row kernels. `partial` reads a row of logits once and computes its maximum and sums (Partial in kernels.h).
// `gradient` reads the row again and writes the gradient of each logit (RowGradient in kernels.h).
//
// This file is compiled once per instruction set. REVAL_ISA is the name of the instruction set and of the namespace.
// All arithmetic is in fp32. The online softmax keeps separate sums in each of the W lanes of a vector and adds the
// lanes at the end of the row. Only the maximum is common to all lanes: a common maximum is higher, so later entries
// raise it less often.
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

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// A vector with n <= W entries. The missing entries become -inf after the softcap, because softcap(-inf) is finite.
template <DType type, bool capped>
inline F load_rest(const void* x, int64_t at, int64_t n, Transform t) {
  constexpr int size = type == reval::kFloat ? 4 : 2;
  alignas(64) char buffer[4 * W] = {};
  __builtin_memcpy(buffer, static_cast<const char*>(x) + at * size, n * size);
  F z = cap<capped>(load<type>(buffer, 0), t.softcap);
  for (int i = n; i < W; ++i) z[i] = -kInfinity;
  return z;
}

// exp is a long chain of operations that depend on each other. AVX-512 has enough registers to compute several vectors
// in parallel. AVX2 and the plain variant have fewer registers: there, a block of kBlock vectors goes through the first
// stage of exp and then through the second. So the processor always has vectors that do not wait for others.
constexpr bool kBlocks = W < 16;
constexpr int kBlock = 32;

class Block {
 public:
  // The first stage of exp, for the differences z * inv - shift. Returns false if a difference is above kStep * kBack,
  // or below kLeast. (`clamped` raises smaller differences to kLeast first.)
  template <DType type, bool clamped>
  INLINE bool reduce(const void* x, int64_t at, F inv, F shift) {
    fetch_ahead<type>(x, at);
    I common = I{} - 1;
#pragma GCC unroll 2
    for (int k = 0; k < kBlock; k += 2) {
      F z[2], n[2], rest[2];
      load_two<type>(x, at + k * W, z);
      for (F& d : z) d = clamped ? max_(splat(kLeast), d * inv - shift) : fused(d, inv, -shift);
      ::reduce(z, n, rest);
      for (int i = 0; i < 2; ++i) {
        common &= (I)n[i];
        shifted_[k + i] = n[i];
        r_[k + i] = rest[i];
      }
    }
    return all_negative((common & kNear) == kNear);
  }

  // The second stage of exp, for the vectors k and k + 1.
  INLINE void expand(int k, F times, Product (&e)[2]) const {
    const F n[2] = {shifted_[k], shifted_[k + 1]}, rest[2] = {r_[k], r_[k + 1]};
    ::expand(n, rest, times, e);
  }

  INLINE void add_to(Lanes& s) const {
    F others[2] = {};  // the new terms are added to each other first, as in add()
#pragma GCC unroll 2
    for (int k = 0; k < kBlock; k += 2) {
      Product e[2];
      expand(k, splat(1.0f), e);
      for (int i = 0; i < 2; ++i) others[i] = fused(e[i].scale, e[i].p, others[i]);
    }
    s.others += others[0] + others[1];
  }

 private:
  // Prefetches a block 4096 bytes ahead, because the processor's own prefetching stops at the end of each page.
  template <DType type>
  static INLINE void fetch_ahead(const void* x, int64_t at) {
    constexpr int size = type == reval::kFloat ? 4 : 2, ahead = 4096;
    const char* from = static_cast<const char*>(x) + at * size + ahead;
    for (int byte = 0; byte < kBlock * W * size; byte += 64) __builtin_prefetch(from + byte);
  }

  F shifted_[kBlock], r_[kBlock];
};

template <DType type, bool capped, bool entropy>
void partial_row(const void* x, int64_t n, Transform t, Partial* out) {
  const F inv = splat(t.inv_temperature);
  Lanes s;
  int64_t at = 0;
  while (at + kUnroll * W <= n) {
    int64_t end = at + kUnroll * W;
    if constexpr (kBlocks && !capped && !entropy) {
      if (at + kBlock * W <= n) {
        end = at + kBlock * W;
        // `others` may then contain an entry that is above the known maximum, by less than about ln 2. That loses no
        // precision: the weight of this entry is at most 2, next to the 1 of the known maximum, so its p is at most
        // 2/3.
        Block block;
        if (block.reduce<type, false>(x, at, inv, s.shift)) {
          block.add_to(s);
          at = end;
        }
      }
    }
    for (; at < end; at += kUnroll * W) {
      auto logits = [=](int k) {
        F z[2];
        load_two<type>(x, at + k / 2 * 2 * W, z);
        return cap<capped>(z[k % 2], t.softcap);
      };
      take<kUnroll, entropy, true>(s, logits, inv);
    }
  }
  for (; at < n; at += W) {
    const F z = load_rest<type, capped>(x, at, min(W, n - at), t);
    take<1, entropy, true>(s, [=](int) { return z; }, inv);
  }
  *out = {s.maximum[0], sum_lanes(s.others) + (sum_lanes(s.count) - 1.0f), sum_lanes(s.spread)};
}

template <DType type, bool capped, bool entropy, bool streaming>
void gradient_row(const void* x, int64_t n, Transform t, RowGradient row, void* out) {
  constexpr int size = type == reval::kFloat ? 4 : 2;
  const F inv = splat(t.inv_temperature);
  LaneGradients by = {
      splat(row.row_max), splat(row.log_sum), splat(row.entropy), splat(row.from_all * t.inv_temperature),
      splat(row.from_entropy * t.inv_temperature)};
  by.divide_by_sum();
  const float inv_softcap = capped ? 1.0f / t.softcap : 0.0f;
  auto rest = [&](int64_t at, int64_t count) {
    alignas(64) char buffer[4 * W];
    F z[1] = {load_rest<type, capped>(x, at, count, t)};
    gradients_of<capped, entropy>(z, inv, by, inv_softcap);
    store<type>(buffer, 0, z[0]);
    __builtin_memcpy(static_cast<char*>(out) + at * size, buffer, count * size);
  };
  int64_t at = 0;
  if (streaming) {  // streaming stores need aligned addresses: write single entries up to the first aligned vector
    const int64_t past = reinterpret_cast<uintptr_t>(out) % (4 * W) / size;
    const int64_t before = past == 0 ? 0 : min(4 * W / size - past, n);
    for (; at < before; at += min(W, before - at)) rest(at, min(W, before - at));
  }
  if constexpr (kBlocks && !capped && !entropy) {
    for (; at + kBlock * W <= n; at += kBlock * W) {
      Block block;
      block.reduce<type, true>(x, at, inv, by.row_max);
#pragma GCC unroll 2
      for (int k = 0; k < kBlock; k += 2) {
        Product e[2];
        block.expand(k, by.from_all, e);
        const F g[2] = {e[0].value(), e[1].value()};
        store_two<type, streaming>(out, at + k * W, g);
      }
    }
  }
  for (; at + kGroup * W <= n; at += kGroup * W) {
    F z[kGroup];
    for (int k = 0; k < kGroup; k += 2) load_two<type>(x, at + k * W, z + k);
    for (int k = 0; k < kGroup; ++k) z[k] = cap<capped>(z[k], t.softcap);
    gradients_of<capped, entropy>(z, inv, by, inv_softcap);
    for (int k = 0; k < kGroup; k += 2) store_two<type, streaming>(out, at + k * W, z + k);
  }
  for (; at < n; at += W) rest(at, min(W, n - at));
  if (streaming) streaming_done();
}

// --- from arguments to template parameters ---------------------------------------------------------------------------

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
  float tanh = tanh_(splat(x) / t.softcap)[0];
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
