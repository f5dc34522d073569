// Gradients of token values with respect to hidden states, head (d_weight) and bias.
//
// For each tile of the head and each strip of tokens: take the kept logits (kept.h) or recompute them, replace them by
// their gradients, and use these gradients in two matmuls, for d_hidden and for d_weight.
//
// The outer loop runs over the tiles of the head. So a tile of d_weight is summed in fp32 while it is in the cache, and
// no fp32 accumulator [V, D] is needed. Every sum has a fixed order. So the results do not depend on the number of
// threads, as long as it is at most the number of strips per block (4 to 16; fewer for a wide head). With more threads,
// a block has one strip per thread, and the order of the sums depends on the number of threads.
//
// Letters as in linear.h: M unmasked tokens, V vocabulary, D width, E the type of the operands.
#include <ATen/ops/zeros.h>

#include "kept.h"
#include "memory.h"

namespace reval {

using at::BFloat16;
using at::Tensor;

namespace {

// d_hidden and d_bias are null, and d_weight is empty, if this gradient is not needed.
template <typename E>
class Backward {
 public:
  Backward(
      const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tokens& tokens,
      const TokenInputs& inputs, float* d_hidden, const Tensor& d_weight, float* d_bias, const KeptTensors& kept)
      : tokens_(tokens), inputs_(inputs), d_hidden_(d_hidden), d_bias_(d_bias), d_weight_(d_weight),
        needs_weight_(d_weight.numel() > 0), by_words_(needs_weight_ || d_bias),
        cut_(tokens.size(), weight.size(0), weight.size(1), sizeof(E)), head_(weight, cut_, d_hidden != nullptr),
        bias_(wide_bias(bias)), kept_(kept, cut_, tokens),
        action_logits_(kept.room.defined() ? kept.action_logits.const_data_ptr<float>() : nullptr),
        in_place_(d_weight.scalar_type() == at::kFloat && kept_.count() <= cut_.block),
        threads_(at::get_num_threads()), anew_(strips_anew()),
        slots_(cut_.blocks == 1 ? cut_.strips : by_words_ ? 2 * cut_.block : threads_),
        states_(hidden, tokens, cut_, cut_.blocks == 1 ? anew_.back() : slots_, needs_weight_ ? slots_ : 0),
        inv_temperature_(inverse_temperatures(cut_, tokens)),
        strips_(std::min(cut_.block, cut_.strips)), ld_(kPairs<E> ? strips_ * kStrip + 64 / sizeof(E) : kStrip),
        next_strip_(kPairs<E> ? kStrip : cut_.words * kStrip),
        block_(cut_.words * (kPairs<E> ? ld_ : strips_ * kStrip)),
        gradients_((by_words_ ? 2 : 0) * block_), logits_(threads_ * kStrip * cut_.words),
        pairs_((kPairs<E> ? threads_ : 0) * kStrip * cut_.words),
        tile_gradient_(needs_weight_ && !in_place_ ? cut_.words * cut_.width : 0), bias_sums_(d_bias ? cut_.words : 0),
        part_(multiple(std::max<int64_t>(parts(cut_.words, threads_), 32), 16)),
        parts_(by_words_ ? parts(cut_.words, part_) : 0), strips_done_(cut_.strips), parts_done_(parts_) {
    prepare();
    make_items();
    const auto per_tile = static_cast<int64_t>(items_.size());
    pipeline_.run((cut_.tiles + 2) * per_tile, kPairs<E>, [&](int64_t i, int64_t thread) {
      const Item& item = items_[i % per_tile];
      const int64_t tile = i / per_tile - 1 + item.tile_offset;
      if (tile < 0 || tile >= cut_.tiles) return;
      if (item.kind == Item::kLoad) load(tile);
      if (item.kind == Item::kStrip) strip(tile, item.index, thread);
      if (item.kind == Item::kWords) words(tile, item.index / parts_, item.index % parts_, thread);
    });
  }

 private:
  // An item of work. items_ is the list of items for each tile, in the order in which threads take them. kLoad loads a
  // tile of the head, kStrip computes the gradients of a strip's logits, kWords adds to d_weight and d_bias for some
  // words.
  struct Item {
    enum Kind { kLoad, kStrip, kWords } kind;
    int64_t index;  // kStrip: number of the strip; kWords: block * parts_ + part
    // The item belongs to the current tile plus this offset. A tile is loaded half a block before it is needed, and the
    // words of a block are done half a block after its last strip. So threads seldom wait.
    int64_t tile_offset;
  };

  void make_items() {
    for (int64_t b = 0; b < cut_.blocks; ++b) {
      const int64_t before = b == 0 ? cut_.blocks - 1 : b - 1, half = cut_.strips_of_block(b) / 2;
      for (int64_t s = 0; s < cut_.strips_of_block(b); ++s) {
        if (s == half && head_.loads() && b == 0) items_.push_back({Item::kLoad, 0, 1});
        for (int64_t p = 0; s == half && p < parts_; ++p) {
          items_.push_back({Item::kWords, before * parts_ + p, b == 0 ? -1 : 0});
        }
        items_.push_back({Item::kStrip, b * cut_.block + s, 0});
      }
    }
  }

  // Collects RowGradient of all tokens for the column kernels. In the unused columns of the last strip, log_sum is
  // infinite, so their gradients are 0.
  void prepare() {
    for (auto* x : {&row_max_, &log_sum_, &entropy_, &from_all_, &from_entropy_}) x->resize(cut_.strips * kStrip);
    std::fill(log_sum_.begin() + cut_.tokens, log_sum_.end(), std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < cut_.tokens; ++i) {
      const RowGradient row = inputs_.gradient(tokens_.index[i]);
      row_max_[i] = row.row_max;
      log_sum_[i] = row.log_sum;
      entropy_[i] = row.entropy;
      from_all_[i] = row.from_all * inv_temperature_[i];
      from_entropy_[i] = row.from_entropy * inv_temperature_[i];
      with_entropy_ |= row.from_entropy != 0;
    }
  }

  // For each strip, the number of strips before it whose logits are recomputed; the last entry counts all strips.
  std::vector<int64_t> strips_anew() const {
    std::vector<int64_t> before{0};
    for (int64_t s = 0; s < cut_.strips; ++s) before.push_back(before.back() + !kept_.has(s));
    return before;
  }

  // The slot for the packed hidden states of a strip. With a single block, a strip keeps its slot. With several blocks,
  // and if d_weight or d_bias is needed (by_words_), the slot is used until the words of the block are done. Otherwise
  // each thread has one slot, which the thread's next strip overwrites.
  int64_t slot(int64_t tile, int64_t strip, int64_t thread) const {
    if (cut_.blocks == 1) return strip;
    return by_words_ ? step(tile, strip / cut_.block) % 2 * cut_.block + strip % cut_.block : thread;
  }
  // The number of blocks, over all tiles, before block b of this tile.
  int64_t step(int64_t tile, int64_t b) const { return tile * cut_.blocks + b; }
  // The gradients of a word's logits for a strip of the block.
  E* gradients(int64_t step, int64_t strip, int64_t word) const {
    return gradients_.at(step % 2 * block_ + strip * next_strip_ + word * ld_);
  }

  void load(int64_t tile) {
    pipeline_.wait(strips_done_, 0, cut_.strips, tile - 1);
    pipeline_.wait(loaded_, tile);
    head_.load(tile);
    loaded_.store(tile + 1, std::memory_order_release);
  }

  // Computes the gradients of a strip's logits for a tile, and adds their part of d_hidden.
  void strip(int64_t tile, int64_t s, int64_t thread) {
    const int64_t b = s / cut_.block, count = cut_.tokens_of(s), words = cut_.words_of(tile), width = cut_.width;
    pipeline_.wait(strips_done_[s], tile);
    if (head_.loads()) pipeline_.wait(loaded_, tile + 1);
    // gradients() and the slot have memory for two steps. Wait until the words of two steps ago are done with them.
    pipeline_.wait(parts_done_, 0, parts_, step(tile, b) - 1);
    const bool kept = kept_.has(s);
    const int64_t down = slot(tile, s, thread), across = cut_.blocks == 1 ? anew_[s] : down;
    if (tile == 0 || cut_.blocks > 1) states_.pack(s, kept ? -1 : across, needs_weight_ ? down : -1, thread);
    float* room = logits_.at(thread * kStrip * cut_.words);
    if (!kept) strip_logits<E>(cut_, tile, s, head_, states_.across(across), bias_, room);
    const float* x = kept ? kept_.get(tile, s, room) : room;
    E* by_word = by_words_ ? gradients(step(tile, b), s % cut_.block, 0) : nullptr;
    const E* right = differentiate(tile, s, x, by_word, thread);
    if (d_hidden_) {
      float* sum = d_hidden_ + s * kStrip * width;
      matmul<E>(
          width, count, summands<E>(words), head_.columns(tile), cut_.words, right, kStrip, tile > 0, sum, count);
      if (tile + 1 == cut_.tiles) to_rows(sum, width, count, states_.room(thread));
    }
    strips_done_[s].store(tile + 1, std::memory_order_release);
  }

  // Computes the gradients of the logits x. Writes them to by_word (a row per word, unless it is null). Returns them as
  // right operand of the matmul for d_hidden.
  const E* differentiate(int64_t tile, int64_t s, const float* x, E* by_word, int64_t thread) {
    const int64_t at = s * kStrip, words = cut_.words_of(tile), columns = multiple(cut_.tokens_of(s), kColumns);
    const float* inv = inv_temperature_.data() + at;
    const ColumnGradients by{&row_max_[at],  &log_sum_[at],      &entropy_[at],
                             &from_all_[at], &from_entropy_[at], with_entropy_};
    const Ahead ahead{  // the memory of d_hidden to which the next matmul adds
        d_hidden_ ? d_hidden_ + at * cut_.width : nullptr, d_hidden_ ? cut_.tokens_of(s) * cut_.width * 4 : 0};
    float own_gradients[kStrip];
    for_actions(cut_, tokens_, tile, s, [&](int64_t r, int64_t own) {
      const int64_t token = tokens_.index[at + r];
      const float logit = kept_.has(s) ? action_logits_[at + r] : x[own * kStrip + r];
      own_gradients[r] =
          action_gradient(inputs_.cotangents(token), inputs_.gradient(token), logit, tokens_.transform(at + r));
    });
    if constexpr (kPairs<E>) {
      E* pairs = pairs_.at(thread * kStrip * cut_.words);
      kernels().columns.gradient_bf16(
          x, words, columns, tokens_.softcap, inv, by, ahead, reinterpret_cast<uint16_t*>(by_word), ld_,
          reinterpret_cast<uint32_t*>(pairs));
      for_actions(cut_, tokens_, tile, s, [&](int64_t r, int64_t own) {
        pairs[(own / 2 * kStrip + r) * 2 + own % 2] = own_gradients[r];
        if (by_word) by_word[own * ld_ + r] = own_gradients[r];
      });
      return pairs;
    } else {
      float* out = by_word ? by_word : logits_.at(thread * kStrip * cut_.words);
      kernels().columns.gradient(x, words, columns, tokens_.softcap, inv, by, ahead, out, kStrip);
      for_actions(cut_, tokens_, tile, s, [&](int64_t r, int64_t own) { out[own * kStrip + r] = own_gradients[r]; });
      return out;
    }
  }

  // Adds the part of a block to d_weight [words, D] and d_bias of some words of a tile.
  void words(int64_t tile, int64_t b, int64_t part, int64_t thread) {
    const int64_t first = part * part_, count = std::min(part_, cut_.words_of(tile) - first), width = cut_.width;
    pipeline_.wait(parts_done_[part], step(tile, b));
    pipeline_.wait(strips_done_, b * cut_.block, b * cut_.block + cut_.strips_of_block(b), tile + 1);
    const E* rows = gradients(step(tile, b), 0, first);
    const int64_t word = tile * cut_.words + first, tokens = cut_.tokens_of_block(b);
    if (needs_weight_ && count > 0) {
      float* to = in_place_ ? d_weight_.mutable_data_ptr<float>() + word * width : tile_gradient_.at(first * width);
      constexpr int64_t panel = 64;  // columns per matmul: the columns of the hidden states then stay in the cache
      // In bf16, one matmul takes all tokens of the block, rounded up to kColumns. The rounding keeps the number of
      // different lengths small, because oneDNN keeps machine code for each length.
      const int64_t at_once = kPairs<E> ? multiple(tokens, kColumns) : kStrip;
      for (int64_t t = 0; t < tokens; t += at_once) {
        const int64_t s = b * cut_.block + t / kStrip;
        const E* states = states_.down(slot(tile, s, thread), s, thread);
        for (int64_t d = 0; d < width; d += panel) {
          matmul<E>(
              count, std::min(panel, width - d), kPairs<E> ? at_once : std::min(at_once, tokens - t),
              rows + t / kStrip * next_strip_, ld_, states + d * (kPairs<E> ? 2 : 1), width, b > 0 || t > 0, to + d,
              width);
        }
      }
      if (!in_place_ && b + 1 == cut_.blocks) {
        auto out = static_cast<char*>(d_weight_.mutable_data_ptr()) + word * width * d_weight_.element_size();
        kernels().layout.convert(kFloat, to, count * width, dtype_of(d_weight_), out);
      }
    }
    for (int64_t w = 0; d_bias_ && w < count; ++w) {
      double& sum = *bias_sums_.at(first + w);
      if (b == 0) sum = 0.0;
      for (int64_t t = 0; t < tokens; ++t) {
        sum += static_cast<float>(rows[t / kStrip * next_strip_ + w * ld_ + t % kStrip]);
      }
      d_bias_[word + w] = static_cast<float>(sum);
    }
    parts_done_[part].store(step(tile, b) + 1, std::memory_order_release);
  }

  const Tokens& tokens_;
  const TokenInputs& inputs_;
  float* d_hidden_;
  float* d_bias_;
  const Tensor& d_weight_;
  bool needs_weight_, by_words_, with_entropy_ = false;
  Cut cut_;
  Head<E> head_;
  Tensor bias_;
  Kept kept_;
  const float* action_logits_;  // exact logits of the actions, for kept strips
  // True if d_weight is summed in its own memory. Then it must be fp32, and the kept strips must all be in the first
  // block, because their logits are in the same memory and must be used up before the first sum is written.
  bool in_place_;
  int64_t threads_;
  std::vector<int64_t> anew_;
  int64_t slots_;
  States<E> states_;
  std::vector<float> inv_temperature_, row_max_, log_sum_, entropy_, from_all_, from_entropy_;
  int64_t strips_;                // strips per block
  // Distances in gradients_ (entries) between two words and between two strips. In bf16, ld_ is not a power of two,
  // because rows at such distances would compete for few places in the cache.
  int64_t ld_, next_strip_;
  int64_t block_;                 // entries of gradients_ per block
  Scratch<E> gradients_;          // gradients of logits, two blocks: bf16 [words, tokens], fp32 [strips, words, kStrip]
  Scratch<float> logits_;         // for each thread, the logits of a strip
  Scratch<E> pairs_;              // bf16: for each thread, the gradients of these logits in pairs
  Scratch<float> tile_gradient_;  // d_weight of a tile [words, D], if not in place
  Scratch<double> bias_sums_;     // d_bias of a tile [words]
  int64_t part_;                  // words of a tile in one item kWords
  int64_t parts_;                 // items kWords per tile and block
  std::vector<Item> items_;
  Pipeline pipeline_;
  Counters strips_done_;            // for each strip, the number of tiles that are finished
  Counters parts_done_;             // for each part of a tile, the number of steps that are finished
  std::atomic<int64_t> loaded_{0};  // number of tiles that are loaded
};

// Copies row i of sums [M, D] to the row of unmasked token i in `out`; all other rows of `out` become 0. `sums` may be
// the memory of `out`. The loop runs from the end, because each row moves towards the end or stays.
template <typename T>
void place_rows(const float* sums, const Tokens& tokens, int64_t width, T* out) {
  int64_t i = tokens.size() - 1;
  for (int64_t token = tokens.all - 1; token >= 0; --token) {
    const bool unmasked = i >= 0 && tokens.index[i] == token;
    T* to = out + token * width;
    if constexpr (std::is_same_v<T, float>) {
      if (unmasked && sums + i * width == to) return;  // in place: this row and all rows before it need not move
    }
    for (int64_t d = 0; d < width; ++d) to[d] = unmasked ? static_cast<T>(sums[i * width + d]) : static_cast<T>(0.0f);
    i -= unmasked;
  }
}

// Computes a small matmul with a known result. oneDNN does not guarantee the layout of brgemm's operands, so the layout
// is tested before it is used.
bool bf16_matmul_works() {
  if (!has_bf16_matmul()) return false;
  const Scratch<BFloat16> a(2 * 4), b(2 * 64);
  for (int k = 0; k < 8; ++k) *a.at(k) = static_cast<float>(k + 1);
  for (int k = 0; k < 4; ++k) {
    for (int n = 0; n < 32; ++n) *b.at(k / 2 * 64 + 2 * n + k % 2) = static_cast<float>(k * 32 + n);
  }
  std::vector<float> c(64);
  try {
    matmul<BFloat16>(2, 32, 4, a.at(0), 4, b.at(0), 32, false, c.data(), 32);
    at::native::cpublas::brgemm_release(true);
  } catch (const std::exception&) {  // c10::Error, or oneDNN's own
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

}  // namespace

bool takes_bf16(const Tensor& hidden, const Tensor& weight) {
  if (hidden.scalar_type() != at::kBFloat16 || weight.scalar_type() != at::kBFloat16 || weight.size(1) % 2 != 0 ||
      !at::globalContext().userEnabledMkldnn()) {  // checked in every call, because a user may change this setting
    return false;
  }
  static const bool works = bf16_matmul_works();
  return works;
}

Tensor accumulator(const Tensor& out, int64_t tokens) {
  if (out.scalar_type() == at::kFloat) return out.view({-1, out.size(-1)});
  return at::empty({tokens, out.size(-1)}, at::kFloat);
}

void place(const Tensor& sums, const Tokens& tokens, const Tensor& out) {
  const float* from = sums.const_data_ptr<float>();
  const int64_t width = out.size(-1);
  if (out.scalar_type() == at::kFloat) return place_rows(from, tokens, width, out.mutable_data_ptr<float>());
  if (out.scalar_type() == at::kHalf) return place_rows(from, tokens, width, out.mutable_data_ptr<at::Half>());
  place_rows(from, tokens, width, out.mutable_data_ptr<BFloat16>());
}

std::vector<Tensor> linear_token_values_backward(
    const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap,
    at::TensorList statistics, at::TensorList cotangents, bool needs_hidden, bool needs_weight, bool needs_bias,
    at::TensorList kept_tensors) {
  const Tokens tokens(actions, mask, temperature, temperatures, softcap);
  const TokenInputs inputs(statistics, cotangents);
  Tensor d_hidden = at::empty(needs_hidden ? hidden.sizes() : at::IntArrayRef{0}, hidden.options());
  const KeptTensors kept = KeptTensors::of(kept_tensors);
  Tensor d_weight = kept.room.defined()
                        ? kept.room
                        : empty_gradient(needs_weight ? weight.sizes() : at::IntArrayRef{0}, weight.scalar_type());
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

}  // namespace reval
