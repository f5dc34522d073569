// The unmasked tokens of a call: the positions of their rows, their actions and their temperatures. And the steps from
// a row's partial sums to its six numbers and its gradient.
//
// Letters: M unmasked tokens, p the probability of a word.
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
  int64_t all;                         // number of tokens, masked tokens included
  std::vector<int64_t> index;          // flat indices of the unmasked tokens, [M]
  std::vector<int64_t> actions;        // [M]
  std::vector<float> inv_temperature;  // [M], or [1] for all tokens
  float softcap;                       // 0: no softcap

  // library.py has checked that the actions lie in the vocabulary and that the temperatures are positive.
  Tokens(
      const at::Tensor& actions, const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures,
      std::optional<double> softcap);

  int64_t size() const { return static_cast<int64_t>(index.size()); }
  Transform transform(int64_t i) const { return {softcap, inv_temperature[inv_temperature.size() == 1 ? 0 : i]}; }
};

// The offsets, in elements, of the rows x[..., :] of the tokens with these flat indices.
std::vector<int64_t> row_offsets(const at::Tensor& x, const std::vector<int64_t>& index);

DType dtype_of(const at::Tensor& x);

// The six numbers of one token, as in `row_values` of backends/rows.py.
struct Row {
  float q, v, log_prob, entropy, row_max, log_sum;
};

// The Partials of a row's segments, merged in double.
struct Sums {
  static constexpr float kLowest = std::numeric_limits<float>::lowest();  // also the maximum of a row with only -inf
  float maximum = kLowest;
  // As in Partial. If all entries are -inf, `others` is -1. An entry equal to kLowest counts like any other entry.
  double others = -1, spread = 0;

  void add(const Partial& part, float inv_temperature);
  Row finish(Transform transform, float action_logit, bool with_entropy) const;
};

// Upstream gradients of one token. shared_gradient gives the numbers for the gradients of all logits except the
// action's, action_gradient the gradient of the action's logit.
struct Cotangents {
  float dq, dv, dlog_prob, dentropy;
};
RowGradient shared_gradient(Cotangents d, float row_max, float log_sum, float entropy);
float action_gradient(Cotangents d, const RowGradient& row, float action_logit, Transform transform);

}  // namespace reval
