// Code that the forward and the backward pass from hidden states share: the division of the work, its distribution over
// threads, and the operands of the matmuls.
//
// Letters: M unmasked tokens, V vocabulary, D width, E the type of the operands (bf16 or fp32). A tile is about 64 to
// 192 words, a strip is kStrip tokens, a block is several strips. A thread computes the logits of one tile and one
// strip at a time, as a matrix [words, tokens]. In this layout, a tile of the head is the left operand without any
// copy, and the gradients of the logits are an operand of both matmuls of the backward pass without a transposition.
//
// The matmuls are oneDNN's brgemm, as torch exports it; docs/kernels_cpu.md has measurements of it. For bf16, brgemm
// needs two neighbouring numbers of a column next to each other in memory ("VNNI", here "pairs"). If the processor has
// no bf16 arithmetic, and for fp16 and mixed dtypes, all operands are converted to fp32.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <type_traits>
#include <vector>

#include "ops.h"

namespace reval {

template <typename E>
constexpr bool kPairs = sizeof(E) == 2;  // true if the matmuls take pairs of bf16 numbers

template <typename E>
constexpr DType kType = kPairs<E> ? kBFloat16 : kFloat;

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
inline int64_t multiple(int64_t n, int64_t of) { return parts(n, of) * of; }
// The number of summands that a matmul over n summands takes: pairs need an even number.
template <typename E>
int64_t summands(int64_t n) { return kPairs<E> ? multiple(n, 2) : n; }

// Uninitialised memory for n numbers, freed with the object.
template <typename E>
class Scratch {
 public:
  explicit Scratch(int64_t n) : tensor_(at::empty({n}, c10::CppTypeToScalarType<E>::value)) {}
  E* at(int64_t i) const { return data_ + i; }

 private:
  at::Tensor tensor_;
  E* data_ = tensor_.template mutable_data_ptr<E>();
};

// C = A @ B, or C += A @ B with `add`, for A [m, k], B [k, n], C [m, n], n <= kStrip. Leading dimensions are in
// entries. In bf16, k must be even and B must be in pairs.
//
// In fp32, the sum is computed in parts of 64 summands. brgemm reads all rows of B again for every few rows of A; 64
// rows of B are 16 KiB, which stay in a first-level cache.
template <typename E>
void matmul(
    int64_t m, int64_t n, int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb, bool add, float* c,
    int64_t ldc) {
  const int64_t at_once = kPairs<E> ? k : 64;
  for (int64_t i = 0; i < k; i += at_once) {
    at::native::cpublas::brgemm(
        m, n, std::min(at_once, k - i), lda, ldb, ldc, add || i > 0, a + i, b + i * ldb, c, kPairs<E>);
  }
}

// The division of the logits [M, V] into tiles, strips and blocks. `entry` is the size of an operand's entry in bytes.
struct Cut {
  int64_t tokens, vocabulary, width;  // M, V, D
  // Words per tile. A tile of the head must fit well inside a second-level cache (448 KiB). The upper limit keeps the
  // scratch memory of a call to a few MiB; fp32 takes twice as much memory per word as bf16, so its limit is lower.
  int64_t words;
  int64_t tiles, strips;
  int64_t block, blocks;  // strips per block, and number of blocks

  Cut(int64_t tokens, int64_t vocabulary, int64_t width, int64_t entry)
      : tokens(tokens), vocabulary(vocabulary), width(width),
        words(std::clamp<int64_t>(
            (448 << 10) / std::max<int64_t>(1, width * entry) / 64 * 64, 64, entry == 4 ? 128 : 192)),
        tiles(parts(vocabulary, words)), strips(parts(tokens, kStrip)),
        block(std::max<int64_t>(at::get_num_threads(), strips_of_a_block(entry))), blocks(parts(strips, block)) {}

  // Strips with 2 MiB of hidden states, but 4 to 16. If there are at most twice as many strips in all (and at most 16),
  // they form a single block: a single block needs no memory for a second one.
  int64_t strips_of_a_block(int64_t entry) const {
    const auto some = std::clamp<int64_t>((2 << 20) / std::max<int64_t>(1, kStrip * width * entry), 4, 16);
    return strips <= std::min<int64_t>(2 * some, 16) ? strips : some;
  }

  int64_t words_of(int64_t tile) const { return std::min(words, vocabulary - tile * words); }
  int64_t tokens_of(int64_t strip) const { return std::min(kStrip, tokens - strip * kStrip); }
  int64_t tokens_of_block(int64_t b) const { return std::min(block * kStrip, tokens - b * block * kStrip); }
  int64_t strips_of_block(int64_t b) const { return std::min(block, strips - b * block); }
};

using Counters = std::vector<std::atomic<int64_t>>;

// A list of items of work. Each thread takes the next item of the list when it has finished one. An item may wait only
// for earlier items. Every earlier item has been taken by a thread, so waiting always ends. If another program slows
// down a core, other threads wait at most for the one item of this core.
class Pipeline {
 public:
  // Runs f(item, thread) for items 0 to items - 1. `pairs`: the matmuls in f are in bf16.
  template <typename Function>
  void run(int64_t items, bool pairs, const Function& f) {
    at::parallel_for(0, std::min<int64_t>(items, at::get_num_threads()), 1, [&](int64_t, int64_t) {
      try {
        for (int64_t i = next_++; i < items; i = next_++) f(i, at::get_thread_num());
      } catch (const Stopped&) {
      } catch (...) {
        stopped_ = true;
        at::native::cpublas::brgemm_release(pairs);
        throw;
      }
      at::native::cpublas::brgemm_release(pairs);
    });
  }

  void wait(const std::atomic<int64_t>& done, int64_t target) const {
    for (int spins = 0; done.load(std::memory_order_acquire) < target; ++spins) {
      if (stopped_) throw Stopped();
      if (spins > 64) std::this_thread::yield();
    }
  }

  void wait(const Counters& done, int64_t begin, int64_t end, int64_t target) const {
    for (int64_t i = begin; i < end; ++i) wait(done[i], target);
  }

 private:
  struct Stopped {};
  std::atomic<int64_t> next_{0};
  std::atomic<bool> stopped_{false};
};

// Copies n entries of x, from `offset` on with distance `stride` (both in entries), to `out`, converted to type E.
template <typename E>
void load_row(const at::Tensor& x, int64_t offset, int64_t stride, int64_t n, E* out) {
  const DType type = dtype_of(x);
  const char* from = static_cast<const char*>(x.const_data_ptr()) + offset * x.element_size();
  if (stride == 1 || n == 1) return kernels().layout.convert(type, from, n, kType<E>, out);
  for (int64_t i = 0; i < n; ++i) store_scalar(kType<E>, out, i, load_scalar(type, from, i * stride));
}

// The head [V, D], one tile at a time. There is memory for two tiles: tile % 2 is the slot of a tile.
template <typename E>
class Head {
 public:
  Head(const at::Tensor& weight, const Cut& cut, bool transposed)
      : weight_(weight), cut_(cut), transposed_(transposed),
        in_place_(
            weight.scalar_type() == c10::CppTypeToScalarType<E>::value && weight.stride(1) == 1 &&
            weight.stride(0) >= weight.size(1)),
        rows_(in_place_ ? 0 : 2 * cut.words * cut.width), columns_(transposed ? 2 * cut.words * cut.width : 0) {}

  // True if load() must be called for a tile before the tile is used.
  bool loads() const { return !in_place_ || transposed_; }

  void load(int64_t tile) {
    const int64_t count = cut_.words_of(tile), width = cut_.width, slot = tile % 2 * cut_.words * width;
    for (int64_t w = 0; !in_place_ && w < count; ++w) {
      const int64_t offset = (tile * cut_.words + w) * weight_.stride(0);
      load_row(weight_, offset, weight_.stride(1), width, rows_.at(slot + w * width));
    }
    if (transposed_) transpose(rows(tile), ld_rows(), count, columns_.at(slot));
  }

  // The tile as [words, D], with leading dimension ld_rows().
  const E* rows(int64_t tile) const {
    return in_place_ ? static_cast<const E*>(weight_.const_data_ptr()) + tile * cut_.words * weight_.stride(0)
                     : rows_.at(tile % 2 * cut_.words * cut_.width);
  }
  int64_t ld_rows() const { return in_place_ ? weight_.stride(0) : cut_.width; }

  // The tile as [D, words], with leading dimension cut.words. In bf16, an odd last column is followed by zeros.
  const E* columns(int64_t tile) const { return columns_.at(tile % 2 * cut_.words * cut_.width); }

 private:
  void transpose(const E* from, int64_t ld, int64_t count, E* out) const {
    const int64_t width = cut_.width;
    auto to = reinterpret_cast<uint32_t*>(out);
    if constexpr (!kPairs<E>) {
      return kernels().layout.transpose(reinterpret_cast<const uint32_t*>(from), ld, count, width, to, cut_.words);
    }
    constexpr int64_t kAtOnce = 16;
    std::vector<uint32_t> pairs(kAtOnce * width);
    auto row = [&](int64_t w) { return w < count ? reinterpret_cast<const uint16_t*>(from + w * ld) : nullptr; };
    for (int64_t first = 0; first < count; first += 2 * kAtOnce) {
      const int64_t n = std::min(kAtOnce, parts(count - first, 2));
      for (int64_t i = 0; i < n; ++i) {
        kernels().layout.interleave(row(first + 2 * i), row(first + 2 * i + 1), width, pairs.data() + i * width);
      }
      kernels().layout.transpose(pairs.data(), width, n, width, to + first / 2, cut_.words / 2);
    }
  }

  const at::Tensor& weight_;
  const Cut& cut_;
  bool transposed_, in_place_;
  Scratch<E> rows_, columns_;
};

// The hidden states of the unmasked tokens as right operands of two matmuls: `across` [D, tokens] for the logits, and
// `down` [tokens, D] for d_weight. Both are packed into slots; a slot holds a strip. Exception: `down` in fp32 has no
// slots. It points to the hidden states themselves, or to a copy that is gathered when it is needed.
template <typename E>
class States {
 public:
  States(const at::Tensor& hidden, const Tokens& tokens, const Cut& cut, int64_t across, int64_t down)
      : hidden_(hidden.stride(-1) == 1 ? hidden : hidden.contiguous()), cut_(cut),
        offsets_(row_offsets(hidden_, tokens.index)),
        in_place_(
            hidden_.scalar_type() == c10::CppTypeToScalarType<E>::value && hidden_.is_contiguous() &&
            tokens.size() == tokens.all),
        room_(at::get_num_threads() * kStrip * cut.width), across_(across * kStrip * cut.width),
        down_((kPairs<E> ? down : 0) * kStrip * cut.width) {}

  // Packs a strip into these slots. A slot of -1 means that this operand is not needed.
  void pack(int64_t strip, int64_t across_slot, int64_t down_slot, int64_t thread) {
    const int64_t count = cut_.tokens_of(strip), width = cut_.width;
    constexpr int64_t entries = 4 / sizeof(E);  // entries in 32 bits
    if (across_slot < 0 && !kPairs<E>) return;
    const E* from = in_place_ ? rows(strip) : gather(strip, thread);
    if (across_slot >= 0) {
      E* across = across_.at(across_slot * kStrip * width);
      if (count < kStrip) std::fill(across, across + kStrip * width, E(0.0f));
      kernels().layout.transpose(
          reinterpret_cast<const uint32_t*>(from), width / entries, count, width / entries,
          reinterpret_cast<uint32_t*>(across), kStrip);
    }
    if constexpr (kPairs<E>) {
      if (down_slot < 0) return;
      E* down = down_.at(down_slot * kStrip * width);
      for (int64_t i = 0; i < count; i += 2) {
        auto first = reinterpret_cast<const uint16_t*>(from + i * width);
        auto to = reinterpret_cast<uint32_t*>(down + i * width);
        kernels().layout.interleave(first, i + 1 < count ? first + width : nullptr, width, to);
      }
      std::fill(down + multiple(count, 2) * width, down + multiple(count, kColumns) * width, E(0.0f));
    }
  }

  // [D, kStrip]
  const E* across(int64_t slot) const { return across_.at(slot * kStrip * cut_.width); }

  // [tokens, D]. In bf16: the strips in this slot and in the following slots, one after the other; the rows after the
  // last token are zeros, up to a multiple of kColumns. In fp32: only this strip.
  const E* down(int64_t slot, int64_t strip, int64_t thread) const {
    if (kPairs<E>) return down_.at(slot * kStrip * cut_.width);
    return in_place_ ? rows(strip) : gather(strip, thread);
  }

  // Temporary memory [kStrip, D] of a thread. pack() and down() of the same thread overwrite it.
  float* room(int64_t thread) const { return room_.at(thread * kStrip * cut_.width); }

 private:
  const E* rows(int64_t strip) const {
    return static_cast<const E*>(hidden_.const_data_ptr()) + strip * kStrip * cut_.width;
  }

  const E* gather(int64_t strip, int64_t thread) const {
    auto out = reinterpret_cast<E*>(room(thread));
    for (int64_t i = 0; i < cut_.tokens_of(strip); ++i) {
      load_row(hidden_, offsets_[strip * kStrip + i], 1, cut_.width, out + i * cut_.width);
    }
    return out;
  }

  const at::Tensor hidden_;
  const Cut& cut_;
  std::vector<int64_t> offsets_;
  bool in_place_;
  Scratch<float> room_;
  Scratch<E> across_, down_;
};

// The logits of one strip for one tile, with the bias, to out [words, kStrip].
template <typename E>
void strip_logits(
    const Cut& cut, int64_t tile, int64_t strip, const Head<E>& head, const E* across, const at::Tensor& bias,
    float* out) {
  const int64_t words = cut.words_of(tile);
  for (int64_t w = 0; bias.defined() && w < words; ++w) {
    std::fill_n(out + w * kStrip, kStrip, bias.const_data_ptr<float>()[tile * cut.words + w]);
  }
  matmul<E>(
      words, multiple(cut.tokens_of(strip), kColumns), cut.width, head.rows(tile), head.ld_rows(), across, kStrip,
      bias.defined(), out, kStrip);
}

// Transposes x from [D, count] to [count, D], in place. `room` has memory for D * count numbers.
inline void to_rows(float* x, int64_t width, int64_t count, float* room) {
  std::copy(x, x + width * count, room);
  kernels().layout.transpose(
      reinterpret_cast<const uint32_t*>(room), count, width, count, reinterpret_cast<uint32_t*>(x), width);
}

// Calls f(r, own) for each token r of the strip whose action is a word of the tile; `own` is the number of this word in
// the tile.
template <typename Function>
void for_actions(const Cut& cut, const Tokens& tokens, int64_t tile, int64_t strip, const Function& f) {
  for (int64_t r = 0; r < cut.tokens_of(strip); ++r) {
    const int64_t own = tokens.actions[strip * kStrip + r] - tile * cut.words;
    if (own >= 0 && own < cut.words) f(r, own);
  }
}

// 1 / temperature of every token. The unused columns of the last strip get 1.
inline std::vector<float> inverse_temperatures(const Cut& cut, const Tokens& tokens) {
  std::vector<float> out(cut.strips * kStrip, 1.0f);
  for (int64_t i = 0; i < cut.tokens; ++i) out[i] = tokens.transform(i).inv_temperature;
  return out;
}

// True if the matmuls take these operands as bf16; otherwise they are converted to fp32.
bool takes_bf16(const at::Tensor& hidden, const at::Tensor& weight);

// The bias [V] in fp32; an undefined tensor without a bias.
inline at::Tensor wide_bias(const OptionalTensor& bias) {
  return bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
}

// An fp32 tensor for the gradients [M, D] of the unmasked tokens. If `out` is fp32, it is the memory of `out` itself.
at::Tensor accumulator(const at::Tensor& out, int64_t tokens);

// Copies row i of sums [M, D] to the row of unmasked token i in `out`, converted to the dtype of `out`. All other rows
// of `out` become 0.
void place(const at::Tensor& sums, const Tokens& tokens, const at::Tensor& out);

}  // namespace reval
