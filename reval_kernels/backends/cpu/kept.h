// Logits kept from the forward to the backward pass, in memory that is there anyway: that of d_weight [V, D].
//
// Until the backward pass comes to a tile of words, their rows of d_weight hold nothing. So the forward pass leaves the
// tile's logits there, for as many strips of tokens as fit; only those of the other strips are computed anew: none where
// D >= M, which makes 6 M V D operations of 8.
//
// Logits of bf16 hidden states and words are kept in 16 bits, others as they are in fp32. The 16 bits are a whole number
// of steps of 2^-10 in log p, relative to the token's action: that changes p by 2^-11, and rounding it to bf16 by up to
// 2^-8. They reach from 40 below the action (what lies lower, p < 4e-18 p(action), counts as 0) to 24 above it. A strip
// with a logit that lies higher is not kept; nor is one with a lower logit where a softcap would bring it near again.
#pragma once

#include <cmath>

#include "linear.h"

namespace reval {

// What the forward pass hands to the backward pass.
struct KeptTensors {
  at::Tensor room;           // d_weight, to be
  at::Tensor strips;         // bool: which of the first strips are there
  at::Tensor anchors;        // [M], about the logits of the actions; empty: kept in fp32
  at::Tensor action_logits;  // [M], to the bit

  std::vector<at::Tensor> list() const { return {room, strips, anchors, action_logits}; }
  static KeptTensors of(at::TensorList list) {
    return list.empty() ? KeptTensors() : KeptTensors{list[0], list[1], list[2], list[3]};
  }
};

class Kept {
 public:
  // Without `room` nothing is kept.
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

  // The logits x [words, kStrip], without what is right of the strip's tokens.
  void put(int64_t tile, int64_t strip, const float* x) const {
    const int64_t words = cut_.words_of(tile), at = strip * kStrip;
    if (exact_) return kernels().columns.keep(x, words, static_cast<float*>(place(tile, strip)));
    auto to = static_cast<int16_t*>(place(tile, strip));
    const bool fits =
        kernels().columns.keep_steps(x, words, columns(strip), &anchors_[at], &steps_[at], softcap_, to);
    if (!fits) strips_[strip] = false;
  }

  // Where they are now: where they were kept, or in `room`.
  const float* get(int64_t tile, int64_t strip, float* room) const {
    if (exact_) return static_cast<const float*>(place(tile, strip));
    auto from = static_cast<const int16_t*>(place(tile, strip));
    const int64_t at = strip * kStrip;
    kernels().columns.restore_steps(from, cut_.words_of(tile), columns(strip), &anchors_[at], &widths_[at], room);
    return room;
  }

 private:
  // A tile's rows of d_weight are cut into [words, kStrip] a strip.
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
  std::vector<float> anchors_, steps_, widths_;  // of every token: the last two log p per step and the other way round
};

}  // namespace reval
