// Keeps logits from the forward pass for the backward pass, in memory that exists anyway: d_weight [V, D].
//
// Letters: M unmasked tokens, V vocabulary, D width; tiles of words and strips of tokens as in linear.h.
//
// The rows of d_weight that belong to a tile of words are unused until the backward pass reaches this tile. So the
// forward pass stores the logits of the tile there, for as many strips as fit. The backward pass recomputes only the
// logits of the other strips. If D >= M, all strips fit, and the two passes take 6 M V D operations instead of 8 M V D.
//
// If hidden states and head are both 16 bits wide, a logit is kept as a 16-bit integer, otherwise as fp32. The integer
// counts steps of 2^-10 in log p, relative to the logit of the token's action. This rounding changes p by a factor of
// up to 1 + 2^-11. (The gradient is then rounded to bf16, which changes it by a factor of up to 1 + 2^-8.) The range of
// the integer is from 40 below the action to 24 above the action, in log p.
// - A lower logit counts as p = 0. Its p is less than exp(-40) = 4e-18 times p of the action.
// - A strip with a higher logit is not kept.
// - With a softcap, a strip with a lower logit is not kept either, because the softcap would bring the logit near
//   again.
#pragma once

#include <cmath>

#include "linear.h"

namespace reval {

// Tensors that the forward pass gives to the backward pass.
struct KeptTensors {
  at::Tensor room;           // the memory of d_weight, [V, D]
  at::Tensor strips;         // bool, one entry for each of the first strips: true if the strip is kept
  at::Tensor anchors;        // fp32 [M], approximate logits of the actions; empty if logits are kept in fp32
  at::Tensor action_logits;  // fp32 [M], exact logits of the actions

  std::vector<at::Tensor> list() const { return {room, strips, anchors, action_logits}; }
  static KeptTensors of(at::TensorList list) {
    return list.empty() ? KeptTensors() : KeptTensors{list[0], list[1], list[2], list[3]};
  }
};

class Kept {
 public:
  // If from.room is undefined, nothing is kept.
  Kept(const KeptTensors& from, const Cut& cut, const Tokens& tokens) : cut_(cut) {
    if (!from.room.defined()) return;
    room_ = static_cast<char*>(from.room.mutable_data_ptr());
    row_bytes_ = cut.width * from.room.element_size();
    strips_ = from.strips.mutable_data_ptr<bool>();
    count_ = from.strips.numel();
    exact_ = from.anchors.numel() == 0;
    softcap_ = tokens.softcap > 0;
    if (exact_) return;
    anchors_.resize(cut.strips * kStrip, 0.0f);
    std::copy_n(from.anchors.const_data_ptr<float>(), cut.tokens, anchors_.begin());
    steps_.resize(anchors_.size(), 1.0f);
    widths_.resize(anchors_.size(), 1.0f);
    for (int64_t i = 0; i < cut.tokens; ++i) {
      steps_[i] = 1024.0f * tokens.transform(i).inv_temperature;
      widths_[i] = 1.0f / steps_[i];
      const bool fits = std::isfinite(steps_[i]) && std::isfinite(widths_[i]) && !std::isinf(anchors_[i]);
      if (!fits && i / kStrip < count_) strips_[i / kStrip] = false;
    }
  }

  int64_t count() const { return count_; }
  bool has(int64_t strip) const { return strip < count_ && strips_[strip]; }

  // Keeps the logits x [words, kStrip] of a strip. Columns beyond the tokens of the strip are ignored.
  void put(int64_t tile, int64_t strip, const float* x) const {
    const int64_t words = cut_.words_of(tile), at = strip * kStrip;
    if (exact_) return kernels().columns.keep(x, words, static_cast<float*>(place(tile, strip)));
    auto to = static_cast<int16_t*>(place(tile, strip));
    const bool fits =
        kernels().columns.keep_steps(x, words, columns(strip), &anchors_[at], &steps_[at], softcap_, to);
    if (!fits) strips_[strip] = false;
  }

  // The logits [words, kStrip]. The result points to the kept logits themselves (fp32), or to `room` (from 16 bits).
  const float* get(int64_t tile, int64_t strip, float* room) const {
    if (exact_) return static_cast<const float*>(place(tile, strip));
    auto from = static_cast<const int16_t*>(place(tile, strip));
    const int64_t at = strip * kStrip;
    kernels().columns.restore_steps(from, cut_.words_of(tile), columns(strip), &anchors_[at], &widths_[at], room);
    return room;
  }

 private:
  // The memory of a tile's rows of d_weight is divided into one matrix [words, kStrip] per strip.
  void* place(int64_t tile, int64_t strip) const {
    return room_ + tile * cut_.words * row_bytes_ + strip * cut_.words_of(tile) * kStrip * (exact_ ? 4 : 2);
  }
  int64_t columns(int64_t strip) const { return multiple(cut_.tokens_of(strip), kColumns); }

  const Cut& cut_;
  bool exact_ = true, softcap_ = false;
  char* room_ = nullptr;
  int64_t row_bytes_ = 0;
  bool* strips_ = nullptr;
  int64_t count_ = 0;
  // For each token: the anchor, the number of steps per unit of logit, and its inverse. A step is 2^-10 in log p.
  std::vector<float> anchors_, steps_, widths_;
};

}  // namespace reval
