// What the forward and the backward pass from hidden states share: how the work is cut and handed out, and the operands
// of the matmuls.
//
// Letters: M unmasked tokens, V vocabulary, D width. The logits of a tile of words and a strip of tokens exist at a
// time, words by tokens: a tile of the head is then the left operand as it lies in memory, and the gradients of these
// logits are an operand of both matmuls that take them without being transposed. Strips are packed into blocks.
//
// The matmuls are oneDNN's brgemm, as torch exports it; docs/kernels_cpu.md says what that costs beside at::mm. It
// takes two bf16 numbers of a column next to each other ("VNNI"), and so do we, unless the processor lacks bf16: then,
// and for fp16 and mixed dtypes, everything is widened to fp32.
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
constexpr bool kPairs = sizeof(E) == 2;  // whether matmuls want pairs of bf16

template <typename E>
constexpr DType kType = kPairs<E> ? kBFloat16 : kFloat;

inline int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
inline int64_t multiple(int64_t n, int64_t of) { return parts(n, of) * of; }
// What a matmul takes of n summands.
template <typename E>
int64_t summands(int64_t n) { return kPairs<E> ? multiple(n, 2) : n; }

// Uninitialised memory, freed with the object.
template <typename E>
class Scratch {
 public:
  explicit Scratch(int64_t n) : tensor_(at::empty({n}, c10::CppTypeToScalarType<E>::value)) {}
  E* at(int64_t i) const { return data_ + i; }

 private:
  at::Tensor tensor_;
  E* data_ = tensor_.template mutable_data_ptr<E>();
};

// C [m, n] (+)= A [m, k] @ B [k, n] for n <= kStrip; leading dimensions in entries. bf16: k even, B in pairs.
//
// fp32 goes 64 summands at a time: brgemm goes through all of B for every few rows of A, and 64 rows of it are 16 KiB,
// which stay in a first-level cache.
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

// How [M, V] is cut.
struct Cut {
  int64_t tokens, vocabulary, width;
  int64_t words;               // of a tile: as many as keep a tile of the head well inside a second-level cache, and no
                               // more than a call's few MiB allow, of which fp32 takes twice as much a word
  int64_t tiles, strips;
  int64_t block, blocks;       // strips of a block, and how many blocks

  Cut(int64_t tokens, int64_t vocabulary, int64_t width, int64_t entry)
      : tokens(tokens), vocabulary(vocabulary), width(width),
        words(std::clamp<int64_t>(
            (448 << 10) / std::max<int64_t>(1, width * entry) / 64 * 64, 64, entry == 4 ? 128 : 192)),
        tiles(parts(vocabulary, words)), strips(parts(tokens, kStrip)),
        block(std::max<int64_t>(at::get_num_threads(), strips_of_a_block(entry))), blocks(parts(strips, block)) {}

  // As many as 2 MiB of hidden states, within limits; or all, if no more than twice as many: a single block needs no
  // second one's room.
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

// Items that the threads take in order. An item may wait for earlier ones, which somebody has taken, and for no others.
// So a core that is busy elsewhere holds up nobody for longer than its own item takes.
class Pipeline {
 public:
  // Runs f(item, thread).
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

// x[row] from `offset` on, whatever its dtype and the stride between its entries.
template <typename E>
void load_row(const at::Tensor& x, int64_t offset, int64_t stride, int64_t n, E* out) {
  const DType type = dtype_of(x);
  const char* from = static_cast<const char*>(x.const_data_ptr()) + offset * x.element_size();
  if (stride == 1 || n == 1) return kernels().layout.convert(type, from, n, kType<E>, out);
  for (int64_t i = 0; i < n; ++i) store_scalar(kType<E>, out, i, load_scalar(type, from, i * stride));
}

// The head, a tile at a time; two tiles are kept.
template <typename E>
class Head {
 public:
  Head(const at::Tensor& weight, const Cut& cut, bool transposed)
      : weight_(weight), cut_(cut), transposed_(transposed),
        in_place_(
            weight.scalar_type() == c10::CppTypeToScalarType<E>::value && weight.stride(1) == 1 &&
            weight.stride(0) >= weight.size(1)),
        rows_(in_place_ ? 0 : 2 * cut.words * cut.width), columns_(transposed ? 2 * cut.words * cut.width : 0) {}

  // Whether tiles must be loaded before they are used.
  bool loads() const { return !in_place_ || transposed_; }

  void load(int64_t tile) {
    const int64_t count = cut_.words_of(tile), width = cut_.width, slot = tile % 2 * cut_.words * width;
    for (int64_t w = 0; !in_place_ && w < count; ++w) {
      const int64_t offset = (tile * cut_.words + w) * weight_.stride(0);
      load_row(weight_, offset, weight_.stride(1), width, rows_.at(slot + w * width));
    }
    if (transposed_) transpose(rows(tile), ld_rows(), count, columns_.at(slot));
  }

  // [words, D]
  const E* rows(int64_t tile) const {
    return in_place_ ? static_cast<const E*>(weight_.const_data_ptr()) + tile * cut_.words * weight_.stride(0)
                     : rows_.at(tile % 2 * cut_.words * cut_.width);
  }
  int64_t ld_rows() const { return in_place_ ? weight_.stride(0) : cut_.width; }

  // [D, words], with a leading dimension of cut.words; an odd last column is followed by zeros in bf16.
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

// The hidden states of the unmasked tokens as right operands: `across`, of the logits, and `down`, of d_weight. In
// slots for a strip each; but `down` in fp32 is where the states are, or what is gathered of them for the moment.
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

  // Into these slots; -1: not wanted.
  void pack(int64_t strip, int64_t across_slot, int64_t down_slot, int64_t thread) {
    const int64_t count = cut_.tokens_of(strip), width = cut_.width;
    constexpr int64_t entries = 4 / sizeof(E);  // in 32 bits
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

  // [tokens, D]. bf16: of the slots from this one on, which hold the strips from this one on, with zeros up to a multiple
  // of kColumns. fp32: of this strip.
  const E* down(int64_t slot, int64_t strip, int64_t thread) const {
    if (kPairs<E>) return down_.at(slot * kStrip * cut_.width);
    return in_place_ ? rows(strip) : gather(strip, thread);
  }

  // [kStrip, D] for the moment: pack() and down() of the same thread may use it too.
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

// Of one strip: its logits for one tile [words, kStrip], with the bias.
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

// From [D, count] to [count, D], in place.
inline void to_rows(float* x, int64_t width, int64_t count, float* room) {
  std::copy(x, x + width * count, room);
  kernels().layout.transpose(
      reinterpret_cast<const uint32_t*>(room), count, width, count, reinterpret_cast<uint32_t*>(x), width);
}

// Runs f(r, action's place in the tile) for the strip's tokens r whose action is a word of the tile.
template <typename Function>
void for_actions(const Cut& cut, const Tokens& tokens, int64_t tile, int64_t strip, const Function& f) {
  for (int64_t r = 0; r < cut.tokens_of(strip); ++r) {
    const int64_t own = tokens.actions[strip * kStrip + r] - tile * cut.words;
    if (own >= 0 && own < cut.words) f(r, own);
  }
}

// 1 / temperature of every token, with 1 for those that fill up the last strip.
inline std::vector<float> inverse_temperatures(const Cut& cut, const Tokens& tokens) {
  std::vector<float> out(cut.strips * kStrip, 1.0f);
  for (int64_t i = 0; i < cut.tokens; ++i) out[i] = tokens.transform(i).inv_temperature;
  return out;
}

// Whether the matmuls take these as bf16.
bool takes_bf16(const at::Tensor& hidden, const at::Tensor& weight);

// [V] in fp32, or undefined.
inline at::Tensor wide_bias(const OptionalTensor& bias) {
  return bias ? bias->to(at::kFloat).contiguous() : at::Tensor();
}

// Where the fp32 sums of the unmasked tokens' gradients [M, D] go: into `out` itself when it is fp32.
at::Tensor accumulator(const at::Tensor& out, int64_t tokens);

// Rows [M, D] of `sums` to the unmasked tokens' rows of `out` in its dtype, zeros to the others.
void place(const at::Tensor& sums, const Tokens& tokens, const at::Tensor& out);

}  // namespace reval
