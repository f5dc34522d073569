// Token values (q, v, log_prob, entropy) from hidden states. With a frozen head, the same pass also computes the part
// of the gradient of the hidden states that does not depend on the loss (`expected`).
//
// One pass over the tiles of the head: a matmul computes the logits of a tile, and the online logsumexp adds them to
// the sums. With a frozen head, a second matmul multiplies the exponentials of the tile by the words of the tile. The
// exponentials exist only at this moment.
//
// Letters as in linear.h: M unmasked tokens, V vocabulary, D width, E the type of the operands.
#include <ATen/ops/ones.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <numeric>

#include "kept.h"
#include "memory.h"

namespace reval {
namespace {

using at::BFloat16;
using at::Tensor;

// If `expected` [M, D] is not null, it gets, for each token, the sum over all words except the action of
// p * dz/dlogit * weight[word]. If kept.room is defined, logits are kept there for the backward pass.
template <typename E>
class Forward {
 public:
  Forward(
      const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tokens& tokens, bool with_entropy,
      float* expected, const KeptTensors& kept)
      : tokens_(tokens), with_entropy_(with_entropy), expected_(expected),
        cut_(tokens.size(), weight.size(0), weight.size(1), sizeof(E)), head_(weight, cut_, expected != nullptr),
        bias_(wide_bias(bias)), kept_(kept, cut_, tokens), threads_(at::get_num_threads()),
        states_(hidden, tokens, cut_, cut_.blocks > 1 ? threads_ : cut_.strips, 0), sums_(cut_.strips),
        action_logits_(kept.action_logits.mutable_data_ptr<float>()),
        inv_temperature_(inverse_temperatures(cut_, tokens)),
        logits_(threads_ * kStrip * cut_.words), pairs_(expected && kPairs<E> ? threads_ * kStrip * cut_.words : 0),
        strips_done_(cut_.strips) {
    for (ColumnSums& sums : sums_) std::fill_n(sums.maximum, kStrip, Sums::kLowest);
    if (cut_.tokens == 0) return;
    // The items of a tile are its strips and, halfway, the loading of the next tile. So a tile is loaded while the
    // strips of the tile before it are computed. Tile -1 has no strips; it only loads tile 0.
    const int64_t per_tile = cut_.strips + head_.loads(), load_at = parts(cut_.strips, 2);
    const int64_t first = head_.loads() ? -1 : 0;
    pipeline_.run((cut_.tiles - first) * per_tile, kPairs<E>, [&](int64_t item, int64_t thread) {
      const int64_t tile = item / per_tile + first, i = item % per_tile;
      if (head_.loads() && i == load_at) return load(tile + 1);
      if (tile >= 0) strip(tile, i - (head_.loads() && i > load_at), thread);
    });
  }

  std::vector<Tensor> finish(at::IntArrayRef shape) {
    TokenOutputs out(shape);
    for (int64_t i = 0; i < cut_.tokens; ++i) {
      out.set(tokens_.index[i], sums(i).finish(tokens_.transform(i), action_logits_[i], with_entropy_));
    }
    return out.tensors;
  }

 private:
  Sums sums(int64_t token) const {
    const ColumnSums& of = sums_[token / kStrip];
    const int64_t r = token % kStrip;
    // `others` must not contain one entry at the maximum. If the maximum is kLowest, the kernels cannot know whether
    // there is such an entry (or only -inf), so they take none out; it is subtracted here.
    return {of.maximum[r], of.others[r] - (of.maximum[r] == Sums::kLowest), of.spread[r]};
  }

  void load(int64_t tile) {
    if (tile == cut_.tiles) return;
    pipeline_.wait(strips_done_, 0, cut_.strips, tile - 1);
    pipeline_.wait(loaded_, tile);
    head_.load(tile);
    loaded_.store(tile + 1, std::memory_order_release);
  }

  void strip(int64_t tile, int64_t s, int64_t thread) {
    const int64_t slot = cut_.blocks > 1 ? thread : s;
    if (head_.loads()) pipeline_.wait(loaded_, tile + 1);
    pipeline_.wait(strips_done_[s], tile);
    if (tile == 0 || cut_.blocks > 1) states_.pack(s, slot, -1, thread);
    float* x = logits_.at(thread * kStrip * cut_.words);
    strip_logits<E>(cut_, tile, s, head_, states_.across(slot), bias_, x);
    for_actions(cut_, tokens_, tile, s, [&](int64_t r, int64_t own) {
      action_logits_[s * kStrip + r] = x[own * kStrip + r];
    });
    kernels().columns.partial(
        x, cut_.words_of(tile), multiple(cut_.tokens_of(s), kColumns), tokens_.softcap,
        inv_temperature_.data() + s * kStrip, with_entropy_, &sums_[s]);
    if (kept_.has(s)) kept_.put(tile, s, x);
    if (expected_) expect(tile, s, x, thread);
    strips_done_[s].store(tile + 1, std::memory_order_release);
  }

  // Adds the part of `expected` that comes from this tile. Until the last tile, a strip of `expected` is [D, tokens],
  // relative to the maximum so far. The last tile transposes it and divides it by the sum of the exponentials.
  void expect(int64_t tile, int64_t s, float* x, int64_t thread) {
    const int64_t count = cut_.tokens_of(s), words = cut_.words_of(tile), width = cut_.width;
    const float* inv = inv_temperature_.data() + s * kStrip;
    float* sum = expected_ + s * kStrip * width;
    const ColumnSums& of = sums_[s];
    if (tile > 0 && std::any_of(of.factor, of.factor + count, [](float f) { return f != 1.0f; })) {
      for (int64_t d = 0; d < width; ++d) {
        for (int64_t r = 0; r < count; ++r) sum[d * count + r] *= of.factor[r];
      }
    }
    float row_max[kStrip];
    // A column with only -inf so far has the maximum -inf, and -inf - -inf is NaN. So the maximum is at least kLowest.
    for (int64_t r = 0; r < kStrip; ++r) row_max[r] = std::max(Sums::kLowest, of.maximum[r] * inv[r]);
    static const float zeros[kStrip] = {};
    const ColumnGradients weights{row_max, zeros, zeros, inv, zeros, false};
    const Ahead ahead{sum, width * count * 4};
    const E* right = reinterpret_cast<E*>(x);
    const int64_t columns = multiple(count, kColumns);
    if constexpr (kPairs<E>) {
      E* pairs = pairs_.at(thread * kStrip * cut_.words);
      auto bits = reinterpret_cast<uint16_t*>(pairs);
      kernels().columns.gradient_bf16(
          x, words, columns, tokens_.softcap, inv, weights, ahead, nullptr, 0, reinterpret_cast<uint32_t*>(pairs));
      for_actions(cut_, tokens_, tile, s, [&](int64_t r, int64_t own) {
        bits[(own / 2 * kStrip + r) * 2 + own % 2] = 0;
      });
      right = pairs;
    } else {
      kernels().columns.gradient(x, words, columns, tokens_.softcap, inv, weights, ahead, x, kStrip);
      for_actions(cut_, tokens_, tile, s, [&](int64_t r, int64_t own) { x[own * kStrip + r] = 0; });
    }
    matmul<E>(
        width, count, summands<E>(words), head_.columns(tile), cut_.words, right, kStrip, tile > 0, sum, count);
    if (tile + 1 < cut_.tiles) return;
    to_rows(sum, width, count, states_.room(thread));
    for (int64_t r = 0; r < count; ++r) {
      const double all = 1.0 + sums(s * kStrip + r).others;
      // `all` is 0 if every logit is -inf; `expected` is 0 then, so the scale does not matter.
      const auto scale = static_cast<float>(1.0 / (all < 1.0 ? 1.0 : all));
      for (int64_t d = 0; d < width; ++d) sum[r * width + d] *= scale;
    }
  }

  const Tokens& tokens_;
  bool with_entropy_;
  float* expected_;
  Cut cut_;
  Head<E> head_;
  Tensor bias_;
  Kept kept_;
  int64_t threads_;
  States<E> states_;
  std::vector<ColumnSums> sums_;
  float* action_logits_;
  std::vector<float> inv_temperature_;
  Scratch<float> logits_;
  Scratch<E> pairs_;
  Pipeline pipeline_;
  Counters strips_done_;            // for each strip, the number of tiles that are finished
  std::atomic<int64_t> loaded_{0};  // number of tiles that are loaded
};

std::vector<Tensor> forward(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& actions, const Tokens& tokens,
    bool with_entropy, float* expected, KeptTensors kept = {}) {
  if (!kept.action_logits.defined()) kept.action_logits = at::empty({tokens.size()}, at::kFloat);
  if (takes_bf16(hidden, weight)) {
    return Forward<BFloat16>(hidden, weight, bias, tokens, with_entropy, expected, kept).finish(actions.sizes());
  }
  return Forward<float>(hidden, weight, bias, tokens, with_entropy, expected, kept).finish(actions.sizes());
}

// Approximate logits of the actions [M]. They differ from the logits of the matmuls in the order of the summation.
Tensor anchors(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tokens& tokens) {
  const int64_t width = weight.size(1);
  const auto offsets = row_offsets(hidden, tokens.index);
  Tensor out = bias ? wide_bias(bias).index_select(0, at::tensor(tokens.actions, at::kLong))
                    : at::zeros({tokens.size()}, at::kFloat);
  float* to = out.mutable_data_ptr<float>();
  at::parallel_for(0, tokens.size(), 16, [&](int64_t begin, int64_t end) {
    std::vector<float> word(width), state(width);
    for (int64_t i = begin; i < end; ++i) {
      load_row(weight, tokens.actions[i] * weight.stride(0), weight.stride(1), width, word.data());
      load_row(hidden, offsets[i], hidden.stride(-1), width, state.data());
      to[i] = std::inner_product(word.begin(), word.end(), state.begin(), to[i]);
    }
  });
  return out;
}

}  // namespace

std::vector<Tensor> linear_token_values(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap,
    bool with_entropy) {
  const Tokens tokens(actions, mask, temperature, temperatures, softcap);
  return forward(hidden, weight, bias, actions, tokens, with_entropy, nullptr);
}

std::vector<Tensor> linear_keeping(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures,
    std::optional<double> softcap) {
  const Tokens tokens(actions, mask, temperature, temperatures, softcap);
  const bool narrow = hidden.element_size() == 2 && weight.element_size() == 2;
  // Number of strips whose logits fit into d_weight: each word has D entries, and a strip needs kStrip logits per word.
  const int64_t room = weight.size(1) * weight.element_size() / (kStrip * (narrow ? 2 : 4));
  KeptTensors kept{
      empty_gradient(weight.sizes(), weight.scalar_type()),
      at::ones({std::min(room, parts(tokens.size(), kStrip))}, at::kBool),
      narrow ? anchors(hidden, weight, bias, tokens) : at::empty({0}, at::kFloat),
      at::empty({tokens.size()}, at::kFloat)};
  auto out = forward(hidden, weight, bias, actions, tokens, false, nullptr, kept);
  for (const Tensor& x : kept.list()) out.push_back(x);
  return out;
}

std::vector<Tensor> linear_expected(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures,
    std::optional<double> softcap) {
  const Tokens tokens(actions, mask, temperature, temperatures, softcap);
  Tensor expected = at::empty({tokens.size(), weight.size(1)}, at::kFloat);
  auto out = forward(hidden, weight, bias, actions, tokens, false, expected.mutable_data_ptr<float>());
  out.push_back(expected);
  return out;
}

}  // namespace reval
