// From hidden states: token values and gradients of logits = hidden @ weight.T + bias, which never exist as a whole.
//
// Letters: M unmasked tokens, V vocabulary, D width. The outer loop runs over tiles of the vocabulary, the inner one
// over blocks of tokens, so a tile of the weight's gradient is finished while it is in the cache, in fp32, and needs no
// V x D accumulator. Within a block the threads share out strips of tokens (and rows of the tile's gradient), and each
// result is summed up by one thread in a fixed order: it does not depend on the number of threads.
//
// The matmuls are oneDNN's brgemm, as torch exports it. Measured on Zen 4 at D = 576 it reaches 220 GFLOP/s in fp32 and
// 455 in bf16 on tiles that stay in the cache, where at::mm reaches 190 and 400; so computing the logits twice costs
// less than writing them to memory and reading them back. It takes two bf16 numbers of a column next to each other
// ("VNNI"), and so do we, unless the processor lacks bf16: then, and for fp16 and mixed dtypes, tiles are widened.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "ops.h"

namespace reval {
namespace {

using at::BFloat16;
using at::Tensor;

constexpr int64_t kWords = 256;  // of a tile
constexpr int64_t kStrip = 64;   // tokens that a thread takes at a time

template <typename E>
constexpr bool kPairs = sizeof(E) == 2;  // whether matmuls want pairs of bf16

template <typename E>
constexpr DType kType = kPairs<E> ? kBFloat16 : kFloat;

int64_t even(int64_t n) { return n + n % 2; }

template <typename E>
Tensor scratch(at::IntArrayRef shape) {
  return at::empty(shape, c10::CppTypeToScalarType<E>::value);
}

// C [m, n] (+)= A [m, k] @ B [k, n]; leading dimensions in entries. bf16: k even, B in pairs.
template <typename E>
void matmul(
    int64_t m, int64_t n, int64_t k, const E* a, int64_t lda, const E* b, int64_t ldb, bool add, float* c,
    int64_t ldc) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, kPairs<E>);
}

// Runs f(first, count, thread) for the strips of `step` out of n. A thread takes the next strip when it is done with
// one, so a core that is busy elsewhere does not hold up the rest.
template <typename Function>
void parallel_strips(int64_t n, int64_t step, bool pairs, const Function& f) {
  std::atomic<int64_t> next{0};
  const int64_t strips = (n + step - 1) / step;
  at::parallel_for(0, std::min<int64_t>(strips, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const int64_t thread = at::get_thread_num();
    for (int64_t i = next++; i < strips; i = next++) f(i * step, std::min(step, n - i * step), thread);
    at::native::cpublas::brgemm_release(pairs);
  });
}

// Rows 2 i and 2 i + 1 of [n, width] side by side, as a matmul over the rows takes its second operand in bf16.
void pair_rows(const uint16_t* rows, int64_t n, int64_t width, int64_t i, uint32_t* out) {
  const uint16_t* first = rows + 2 * i * width;
  kernels().interleave(first, 2 * i + 1 < n ? first + width : nullptr, width, out + i * width);
}

// Some rows of the head.
template <typename E>
struct Tile {
  int64_t first, count;
  Tensor rows;    // [count, D]
  Tensor across;  // [D, kWords]: the second operand of hidden @ rows.T
  Tensor pairs;   // the second operand of dlogits @ rows; fp32: the rows themselves
  Tensor bias;    // [count] fp32, or undefined

  Tile(const Tensor& weight, const OptionalTensor& all_bias, int64_t first, bool backward)
      : first(first), count(std::min(kWords, weight.size(0) - first)) {
    const int64_t width = weight.size(1), per_entry = 4 / sizeof(E), columns = width / per_entry;
    rows = weight.narrow(0, first, count).to(c10::CppTypeToScalarType<E>::value).contiguous();
    if (all_bias) bias = all_bias->narrow(0, first, count).to(at::kFloat).contiguous();
    across = scratch<E>({columns, kWords * per_entry});
    pairs = kPairs<E> && backward ? scratch<E>({even(count), width}) : rows;
    auto entries = static_cast<const uint32_t*>(rows.const_data_ptr());
    auto to = static_cast<uint32_t*>(across.mutable_data_ptr());
    auto paired = kPairs<E> && backward ? static_cast<uint32_t*>(pairs.mutable_data_ptr()) : nullptr;
    const int64_t strips = (columns + 63) / 64, pair_strips = paired ? even(count) / 2 : 0;
    at::parallel_for(0, strips, 1, [&](int64_t begin, int64_t end) {
      const int64_t last = std::min(columns, end * 64);
      kernels().transpose(entries + begin * 64, columns, count, last - begin * 64, to + begin * 64 * kWords, kWords);
      for (int64_t i = begin * pair_strips / strips; i < end * pair_strips / strips; ++i) {
        pair_rows(reinterpret_cast<const uint16_t*>(entries), count, width, i, paired);
      }
    });
  }

  // The logits [n, count] of n tokens' hidden states [n, D].
  void logits(const E* hidden, int64_t n, float* out) const {
    const int64_t width = rows.size(1);
    matmul<E>(n, count, width, hidden, width, across.const_data_ptr<E>(), kWords, false, out, kWords);
    for (int64_t i = 0; bias.defined() && i < n; ++i) {
      for (int64_t j = 0; j < count; ++j) out[i * kWords + j] += bias.const_data_ptr<float>()[j];
    }
  }
};

// The hidden states of the unmasked tokens, a block at a time.
template <typename E>
struct Blocks {
  Tensor hidden;  // [N, D]
  Tensor index;   // [M], undefined when all tokens are unmasked
  int64_t tokens, size;
  bool paired_too;
  int64_t first = -1, count = 0;
  Tensor rows, pairs;  // [count, D], and the second operand of dlogits.T @ rows

  Blocks(const Tensor& hidden, const Tokens& unmasked, bool paired_too)
      : hidden(hidden.reshape({-1, hidden.size(-1)})), tokens(unmasked.size()),
        size(kStrip * std::max<int64_t>(16, at::get_num_threads())), paired_too(paired_too) {
    if (tokens == unmasked.all) return;
    index = at::empty({tokens}, at::kLong);
    std::copy(unmasked.index.begin(), unmasked.index.end(), index.mutable_data_ptr<int64_t>());
  }

  void load(int64_t from) {
    if (from == first) return;
    first = from;
    count = std::min(size, tokens - from);
    rows = pairs = Tensor();  // the last block's room is free before this one takes its own
    rows = index.defined() ? hidden.index_select(0, index.narrow(0, from, count)) : hidden.narrow(0, from, count);
    rows = rows.to(c10::CppTypeToScalarType<E>::value).contiguous();
    pairs = rows;
    if (!kPairs<E> || !paired_too) return;
    pairs = scratch<E>({even(count), rows.size(1)});
    auto from_rows = static_cast<const uint16_t*>(rows.const_data_ptr());
    auto to = static_cast<uint32_t*>(pairs.mutable_data_ptr());
    at::parallel_for(0, even(count) / 2, 32, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pair_rows(from_rows, count, rows.size(1), i, to);
    });
  }
};

// The logits of the first tiles, when the forward pass keeps them for the backward one: [tiles, M, kWords] fp32.
struct Kept {
  Tensor logits;
  float* at(int64_t first_word, int64_t token) const {
    if (!logits.defined() || first_word / kWords >= logits.size(0)) return nullptr;
    return logits.mutable_data_ptr<float>() + (first_word / kWords * logits.size(1) + token) * kWords;
  }
};

// --- forward --------------------------------------------------------------------------------------------------------

// One forward pass. With `expected` [M, D], also sum over all words but the action of p * dz/dlogit * weight[word].
template <typename E>
class Forward {
 public:
  Forward(
      const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tokens& tokens, bool with_entropy,
      float* expected, const Tensor& kept = {})
      : tokens_(tokens), with_entropy_(with_entropy), expected_(expected), width_(weight.size(1)),
        kept_{kept}, sums_(tokens.size()), action_logits_(tokens.size()),
        logits_(scratch<float>({at::get_num_threads(), kStrip, kWords})),
        weights_(kPairs<E> && expected ? scratch<E>({at::get_num_threads(), kStrip, kWords}) : logits_) {
    Blocks<E> blocks(hidden, tokens, false);
    for (int64_t word = 0; word < weight.size(0); word += kWords) {
      const Tile<E> tile(weight, bias, word, expected != nullptr);
      for (int64_t first = 0; first < tokens.size(); first += blocks.size) {
        blocks.load(first);
        parallel_strips(blocks.count, kStrip, kPairs<E>, [&](int64_t from, int64_t count, int64_t thread) {
          strip(tile, blocks, from, count, thread);
        });
      }
    }
  }

  std::vector<Tensor> finish(at::IntArrayRef shape) {
    TokenOutputs out(shape);
    for (int64_t i = 0; i < tokens_.size(); ++i) {
      out.set(tokens_.index[i], sums_[i].finish(tokens_.transform(i), action_logits_[i], with_entropy_));
      if (!expected_) continue;
      const float scale = static_cast<float>(1.0 / (1.0 + sums_[i].others));
      for (int64_t d = 0; d < width_; ++d) expected_[i * width_ + d] *= scale;
    }
    return out.tensors;
  }

 private:
  void strip(const Tile<E>& tile, const Blocks<E>& blocks, int64_t from, int64_t count, int64_t thread) {
    float* logits = kept_.at(tile.first, blocks.first + from);
    if (!logits) logits = logits_.mutable_data_ptr<float>() + thread * kStrip * kWords;
    E* weights = static_cast<E*>(weights_.mutable_data_ptr()) + thread * kStrip * kWords;
    tile.logits(blocks.rows.template const_data_ptr<E>() + from * width_, count, logits);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = blocks.first + from + r, own = tokens_.actions[i] - tile.first;
      const bool owned = own >= 0 && own < tile.count;
      const Transform transform = tokens_.transform(i);
      float* row = logits + r * kWords;
      Partial part;
      kernels().partial(kFloat, row, tile.count, transform, with_entropy_, &part);
      if (owned) action_logits_[i] = row[own];
      sums_[i].add(part, transform.inv_temperature);
      if (!expected_) continue;
      const auto scale = static_cast<float>(sums_[i].factor);
      float* sum = expected_ + i * width_;
      for (int64_t d = 0; scale != 1.0f && tile.first > 0 && d < width_; ++d) sum[d] *= scale;
      const RowGradient unscaled{sums_[i].maximum * transform.inv_temperature, 0, 0, 1, 0};
      E* weight_row = weights + r * kWords;
      kernels().gradient(kFloat, row, tile.count, transform, unscaled, kType<E>, weight_row, false);
      if (owned) weight_row[own] = 0;
      if (kPairs<E> && tile.count % 2) weight_row[tile.count] = 0;
    }
    if (!expected_) return;
    matmul<E>(
        count, width_, kPairs<E> ? even(tile.count) : tile.count, weights, kWords,
        tile.pairs.template const_data_ptr<E>(), width_, tile.first > 0,
        expected_ + (blocks.first + from) * width_, width_);
  }

  const Tokens& tokens_;
  bool with_entropy_;
  float* expected_;
  int64_t width_;
  Kept kept_;
  std::vector<Sums> sums_;
  std::vector<float> action_logits_;
  Tensor logits_, weights_;
};

// n fp32 numbers to bf16 or fp16, from entry `at` of `out` on.
void narrow(const float* from, int64_t n, const Tensor& out, int64_t at) {
  if (out.scalar_type() == at::kHalf) {
    std::copy(from, from + n, out.mutable_data_ptr<at::Half>() + at);
  } else {
    std::copy(from, from + n, out.mutable_data_ptr<BFloat16>() + at);
  }
}

// --- backward -------------------------------------------------------------------------------------------------------

// Gradients from logits computed anew, tile by tile. Null pointers for what is not needed.
template <typename E>
class Backward {
 public:
  Backward(
      const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tokens& tokens,
      const TokenInputs& inputs, float* d_hidden, const Tensor& d_weight, float* d_bias, const OptionalTensor& kept)
      : tokens_(tokens), inputs_(inputs), d_hidden_(d_hidden), d_bias_(d_bias), width_(weight.size(1)),
        kept_{kept.value_or(Tensor())}, needs_weight_(d_weight.numel() > 0),
        logits_(scratch<float>({at::get_num_threads(), kStrip, kWords})),
        gradients_(kPairs<E> ? scratch<E>({at::get_num_threads(), kStrip, kWords}) : logits_),
        paired_(scratch<E>({kPairs<E> ? at::get_num_threads() : 0, kStrip, kWords})),
        blocks_(hidden, tokens, needs_weight_) {
    const bool in_place = d_weight.scalar_type() == at::kFloat;
    last_block_ = (tokens.size() - 1) / blocks_.size * blocks_.size;
    by_word_ = scratch<E>({needs_weight_ || d_bias ? kWords : 0, even(blocks_.size)});
    if (needs_weight_ && !in_place) tile_gradient_ = scratch<float>({kWords, width_});
    for (int64_t word = 0; word < weight.size(0); word += kWords) {
      const Tile<E> tile(weight, bias, word, d_hidden != nullptr);
      float* target = !needs_weight_ ? nullptr
                      : in_place     ? d_weight.mutable_data_ptr<float>() + word * width_
                                     : tile_gradient_.template mutable_data_ptr<float>();
      for (int64_t first = 0; first < tokens.size(); first += blocks_.size) {
        blocks_.load(first);
        parallel_strips(blocks_.count, kStrip, kPairs<E>, [&](int64_t from, int64_t count, int64_t thread) {
          tokens_strip(tile, from, count, thread);
        });
        words(tile, target, in_place ? Tensor() : d_weight);
      }
    }
  }

 private:
  // dlogits of some tokens, their share of d_hidden, and dlogits once more by words.
  void tokens_strip(const Tile<E>& tile, int64_t from, int64_t count, int64_t thread) {
    float* logits = logits_.mutable_data_ptr<float>() + thread * kStrip * kWords;
    E* gradients = static_cast<E*>(gradients_.mutable_data_ptr()) + thread * kStrip * kWords;
    if (float* known = kept_.at(tile.first, blocks_.first + from)) {
      logits = known;
    } else {
      tile.logits(blocks_.rows.template const_data_ptr<E>() + from * width_, count, logits);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = blocks_.first + from + r, own = tokens_.actions[i] - tile.first;
      const bool owned = own >= 0 && own < tile.count;
      const RowGradient row = inputs_.gradient(tokens_.index[i]);
      const Transform transform = tokens_.transform(i);
      const float logit = owned ? logits[r * kWords + own] : 0.0f;
      E* out = gradients + r * kWords;
      kernels().gradient(kFloat, logits + r * kWords, tile.count, transform, row, kType<E>, out, false);
      if (owned) out[own] = action_gradient(inputs_.cotangents(tokens_.index[i]), row, logit, transform);
      if (kPairs<E> && tile.count % 2) out[tile.count] = 0;
    }
    if (d_hidden_) {
      matmul<E>(
          count, width_, kPairs<E> ? even(tile.count) : tile.count, gradients, kWords,
          tile.pairs.template const_data_ptr<E>(), width_, tile.first > 0,
          d_hidden_ + (blocks_.first + from) * width_, width_);
    }
    if (by_word_.numel() > 0) transpose(gradients, from, count, tile.count, thread);
  }

  // gradients [count, words] into by_word_ [words, from : from + count]; bf16 in pairs of tokens, which move as one.
  void transpose(const E* gradients, int64_t from, int64_t count, int64_t words, int64_t thread) {
    const int64_t ld = by_word_.size(1);
    if constexpr (kPairs<E>) {
      auto pairs = reinterpret_cast<uint32_t*>(paired_.template mutable_data_ptr<E>() + thread * kStrip * kWords);
      auto rows = reinterpret_cast<const uint16_t*>(gradients);
      for (int64_t r = 0; r < count; r += 2) {
        const uint16_t* second = r + 1 < count ? rows + (r + 1) * kWords : nullptr;
        kernels().interleave(rows + r * kWords, second, words, pairs + r / 2 * kWords);
      }
      auto to = reinterpret_cast<uint32_t*>(by_word_.template mutable_data_ptr<E>());
      kernels().transpose(pairs, kWords, even(count) / 2, words, to + from / 2, ld / 2);
    } else {
      auto to = reinterpret_cast<uint32_t*>(by_word_.template mutable_data_ptr<E>());
      kernels().transpose(reinterpret_cast<const uint32_t*>(gradients), kWords, count, words, to + from, ld);
    }
  }

  // The block's share of the tile's d_weight [count, D] (into `target`) and d_bias, from by_word_. After the last block
  // `target` is copied to `narrower`, if there is one.
  void words(const Tile<E>& tile, float* target, const Tensor& narrower) {
    if (by_word_.numel() == 0) return;
    const int64_t threads = at::get_num_threads(), ld = by_word_.size(1), tokens = blocks_.count;
    const int64_t step = std::max<int64_t>(16, (kWords / threads + 15) / 16 * 16);
    const bool more = blocks_.first > 0;
    parallel_strips(tile.count, step, kPairs<E>, [&](int64_t from, int64_t count, int64_t) {
      const E* rows = by_word_.template const_data_ptr<E>() + from * ld;
      if (target) {
        matmul<E>(
            count, width_, kPairs<E> ? even(tokens) : tokens, rows, ld, blocks_.pairs.template const_data_ptr<E>(),
            width_, more, target + from * width_, width_);
      }
      if (target && narrower.defined() && narrower.numel() > 0 && blocks_.first == last_block_) {
        narrow(target + from * width_, count * width_, narrower, (tile.first + from) * width_);
      }
      for (int64_t w = 0; d_bias_ && w < count; ++w) {
        float sum = 0;
        for (int64_t t = 0; t < tokens; ++t) sum += static_cast<float>(rows[w * ld + t]);
        float& total = d_bias_[tile.first + from + w];
        total = more ? total + sum : sum;
      }
    });
  }

  const Tokens& tokens_;
  const TokenInputs& inputs_;
  float* d_hidden_;
  float* d_bias_;
  int64_t width_;
  Kept kept_;
  bool needs_weight_;
  int64_t last_block_;  // where the last block begins
  Tensor logits_, gradients_, paired_;
  Blocks<E> blocks_;
  Tensor by_word_;        // dlogits [kWords, tokens of a block]
  Tensor tile_gradient_;  // [kWords, D] fp32, when the weight is narrower
};

// --- which element the matmuls take ---------------------------------------------------------------------------------

// A small product with known result: brgemm's packed layout is oneDNN's affair, so it is tried before it is trusted.
bool bf16_matmul_works() {
  if (!has_bf16_matmul() || !at::globalContext().userEnabledMkldnn()) return false;
  Tensor a = scratch<BFloat16>({2, 4}), b = scratch<BFloat16>({2, 64});
  auto x = a.mutable_data_ptr<BFloat16>(), y = b.mutable_data_ptr<BFloat16>();
  for (int k = 0; k < 8; ++k) x[k] = static_cast<float>(k + 1);
  for (int k = 0; k < 4; ++k) {
    for (int n = 0; n < 32; ++n) y[k / 2 * 64 + 2 * n + k % 2] = static_cast<float>(k * 32 + n);
  }
  std::vector<float> c(64);
  try {
    matmul<BFloat16>(2, 32, 4, x, 4, y, 32, false, c.data(), 32);
    at::native::cpublas::brgemm_release(true);
  } catch (const c10::Error&) {
    return false;
  }
  for (int m = 0; m < 2; ++m) {
    for (int n = 0; n < 32; ++n) {
      float expected = 0;
      for (int k = 0; k < 4; ++k) expected += static_cast<float>((4 * m + k + 1) * (k * 32 + n));
      if (c[32 * m + n] != expected) return false;
    }
  }
  return true;
}

bool takes_bf16(const Tensor& hidden, const Tensor& weight) {
  static const bool works = bf16_matmul_works();
  return works && hidden.scalar_type() == at::kBFloat16 && weight.scalar_type() == at::kBFloat16 &&
         weight.size(1) % 2 == 0;
}

// --- the gradient of the hidden states in its own dtype and places --------------------------------------------------

// Where the fp32 sums of the unmasked tokens' gradients [M, D] go: into `out` itself when it is fp32.
Tensor accumulator(const Tensor& out, int64_t tokens) {
  if (out.scalar_type() == at::kFloat) return out.view({-1, out.size(-1)});
  return scratch<float>({tokens, out.size(-1)});
}

// Rows [M, D] of `sums` to the unmasked tokens' rows of `out`, zeros to the others. In place it runs from the end:
// no row moves towards the front.
template <typename T>
void place_rows(const float* sums, const Tokens& tokens, int64_t width, T* out) {
  int64_t i = tokens.size() - 1;
  for (int64_t token = tokens.all - 1; token >= 0; --token) {
    const bool unmasked = i >= 0 && tokens.index[i] == token;
    T* to = out + token * width;
    if constexpr (std::is_same_v<T, float>) {
      if (unmasked && sums + i * width == to) return;  // so are all before it
    }
    for (int64_t d = 0; d < width; ++d) to[d] = unmasked ? static_cast<T>(sums[i * width + d]) : static_cast<T>(0.0f);
    i -= unmasked;
  }
}

void place(const Tensor& sums, const Tokens& tokens, const Tensor& out) {
  const float* from = sums.const_data_ptr<float>();
  const int64_t width = out.size(-1);
  if (out.scalar_type() == at::kFloat) return place_rows(from, tokens, width, out.mutable_data_ptr<float>());
  if (out.scalar_type() == at::kHalf) return place_rows(from, tokens, width, out.mutable_data_ptr<at::Half>());
  place_rows(from, tokens, width, out.mutable_data_ptr<BFloat16>());
}

}  // namespace

std::vector<Tensor> linear_token_values(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap,
    bool with_entropy, int64_t keep_bytes) {
  const Tokens tokens(actions, mask, weight.size(0), temperature, temperatures, softcap);
  Tensor kept;
  if (keep_bytes > 0 && tokens.size() > 0) {
    const int64_t tiles = (weight.size(0) + kWords - 1) / kWords, bytes = tokens.size() * kWords * 4;
    kept = huge(scratch<float>({std::min(tiles, keep_bytes / bytes), tokens.size(), kWords}));
  }
  auto out = takes_bf16(hidden, weight)
                 ? Forward<BFloat16>(hidden, weight, bias, tokens, with_entropy, nullptr, kept).finish(actions.sizes())
                 : Forward<float>(hidden, weight, bias, tokens, with_entropy, nullptr, kept).finish(actions.sizes());
  if (kept.defined()) out.push_back(kept);
  return out;
}

std::vector<Tensor> linear_token_values_backward(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap,
    at::TensorList statistics, at::TensorList cotangents, bool needs_hidden, bool needs_weight, bool needs_bias,
    const OptionalTensor& kept) {
  const Tokens tokens(actions, mask, weight.size(0), temperature, temperatures, softcap);
  const TokenInputs inputs(statistics, cotangents);
  Tensor d_hidden = at::empty(needs_hidden ? hidden.sizes() : at::IntArrayRef{0}, hidden.options());
  Tensor d_weight = huge(at::empty(needs_weight ? weight.sizes() : at::IntArrayRef{0}, weight.options()));
  Tensor d_bias = at::zeros({needs_bias ? weight.size(0) : 0}, at::kFloat);
  if (tokens.size() == 0) {
    d_weight.zero_();
    d_hidden.zero_();
    return {d_hidden, d_weight, d_bias.to(bias ? bias->scalar_type() : weight.scalar_type())};
  }
  Tensor sums = needs_hidden ? accumulator(d_hidden, tokens.size()) : Tensor();
  float* to_hidden = needs_hidden ? sums.mutable_data_ptr<float>() : nullptr;
  float* to_bias = needs_bias ? d_bias.mutable_data_ptr<float>() : nullptr;
  if (takes_bf16(hidden, weight)) {
    Backward<BFloat16>(hidden, weight, bias, tokens, inputs, to_hidden, d_weight, to_bias, kept);
  } else {
    Backward<float>(hidden, weight, bias, tokens, inputs, to_hidden, d_weight, to_bias, kept);
  }
  if (needs_hidden) place(sums, tokens, d_hidden);
  return {d_hidden, d_weight, d_bias.to(bias ? bias->scalar_type() : weight.scalar_type())};
}

std::vector<Tensor> linear_expected(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures,
    std::optional<double> softcap) {
  const Tokens tokens(actions, mask, weight.size(0), temperature, temperatures, softcap);
  Tensor expected = scratch<float>({tokens.size(), weight.size(1)});
  float* to = expected.mutable_data_ptr<float>();
  auto out = takes_bf16(hidden, weight)
                 ? Forward<BFloat16>(hidden, weight, bias, tokens, false, to).finish(actions.sizes())
                 : Forward<float>(hidden, weight, bias, tokens, false, to).finish(actions.sizes());
  out.push_back(expected);
  return out;
}

Tensor linear_expected_backward(
    const Tensor& expected, const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias,
    const Tensor& actions, const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures,
    std::optional<double> softcap, at::TensorList statistics, at::TensorList cotangents) {
  const Tokens tokens(actions, mask, weight.size(0), temperature, temperatures, softcap);
  const TokenInputs inputs(statistics, cotangents);
  const int64_t width = weight.size(1);
  Tensor flat = hidden.reshape({-1, width});
  float* sums = expected.mutable_data_ptr<float>();
  at::parallel_for(0, tokens.size(), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t token = tokens.index[i], action = tokens.actions[i];
      const Tensor word = weight.select(0, action).to(at::kFloat).contiguous();
      const Tensor state = flat.select(0, token).to(at::kFloat).contiguous();
      const float* w = word.const_data_ptr<float>();
      const float* h = state.const_data_ptr<float>();
      double logit = bias ? bias->select(0, action).to(at::kFloat).item<float>() : 0.0;
      for (int64_t d = 0; d < width; ++d) logit += static_cast<double>(w[d]) * h[d];
      const RowGradient row = inputs.gradient(token);
      const float own = action_gradient(
          inputs.cotangents(token), row, static_cast<float>(logit), tokens.transform(i));
      for (int64_t d = 0; d < width; ++d) sums[i * width + d] = row.from_all * sums[i * width + d] + own * w[d];
    }
  });
  Tensor out = at::empty(hidden.sizes(), hidden.options());
  place(expected, tokens, out);
  return out;
}

}  // namespace reval
