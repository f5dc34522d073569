// The unmasked tokens of a call: where their rows lie, their actions and their temperatures.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <optional>
#include <vector>

#include "kernels.h"

namespace reval {

using OptionalTensor = std::optional<at::Tensor>;

struct Tokens {
  int64_t all;                         // tokens, masked ones too
  std::vector<int64_t> index;          // the unmasked among them, [M]
  std::vector<int64_t> actions;        // [M]
  std::vector<float> inv_temperature;  // [M], or one for all
  float softcap;                       // 0: none

  // library.py has checked that the actions lie in the vocabulary and that the temperatures are positive.
  Tokens(
      const at::Tensor& actions, const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures,
      std::optional<double> softcap);

  int64_t size() const { return static_cast<int64_t>(index.size()); }
  Transform transform(int64_t i) const { return {softcap, inv_temperature[inv_temperature.size() == 1 ? 0 : i]}; }
};

// Element offsets of x[..., :]'s rows, for the tokens of these indices.
std::vector<int64_t> row_offsets(const at::Tensor& x, const std::vector<int64_t>& index);

DType dtype_of(const at::Tensor& x);

// What one token's logits came to; the statistics of the portable backend's `row_values`.
struct Row {
  float q, v, log_prob, entropy, row_max, log_sum;
};

// A row's parts, merged in double.
struct Sums {
  static constexpr float kLowest = std::numeric_limits<float>::lowest();  // also the maximum of nothing but -inf
  float maximum = kLowest;
  double others = -1, spread = 0;  // as in Partial. Entries of kLowest count as they should: nothing but -inf is -1

  void add(const Partial& part, float inv_temperature);
  Row finish(Transform transform, float action_logit, bool with_entropy) const;
};

// What the action's own entry of the gradient is, and what all others share.
struct Cotangents {
  float dq, dv, dlog_prob, dentropy;
};
RowGradient shared_gradient(Cotangents d, float row_max, float log_sum, float entropy);
float action_gradient(Cotangents d, const RowGradient& row, float action_logit, Transform transform);

}  // namespace reval
