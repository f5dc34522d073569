// The functions behind torch.ops.reval_kernels_cpu (bellman.cpp registers its own), and how their per-token arguments are read and written.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstring>
#include <optional>
#include <vector>

#include "tokens.h"

namespace reval {

// Six new tensors [...] of zeros: q, v, log_prob, entropy, row_max, log_sum.
struct TokenOutputs {
  std::vector<at::Tensor> tensors;
  explicit TokenOutputs(at::IntArrayRef shape);
  void set(int64_t token, const Row& row);
};

// statistics: row_max, log_sum, entropy; cotangents: dq, dv, dlog_prob, dentropy; fp32 [...].
struct TokenInputs {
  std::vector<at::Tensor> tensors;
  TokenInputs(at::TensorList statistics, at::TensorList cotangents);
  float get(int which, int64_t token) const { return tensors[which].const_data_ptr<float>()[token]; }
  Cotangents cotangents(int64_t t) const { return {get(3, t), get(4, t), get(5, t), get(6, t)}; }
  RowGradient gradient(int64_t t) const { return shared_gradient(cotangents(t), get(0, t), get(1, t), get(2, t)); }
};

void store_scalar(DType type, void* row, int64_t index, float value);

std::vector<at::Tensor> token_values(
    const at::Tensor& logits, const at::Tensor& actions, const OptionalTensor& mask, double temperature,
    const OptionalTensor& temperatures, std::optional<double> softcap, bool with_entropy);

void token_values_backward(
    const at::Tensor& logits, const at::Tensor& actions, const OptionalTensor& mask, double temperature,
    const OptionalTensor& temperatures, std::optional<double> softcap, at::TensorList statistics,
    at::TensorList cotangents, const at::Tensor& out);

std::vector<at::Tensor> linear_token_values(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap,
    bool with_entropy);

std::vector<at::Tensor> linear_token_values_backward(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap,
    at::TensorList statistics, at::TensorList cotangents, bool needs_hidden, bool needs_weight, bool needs_bias,
    at::TensorList kept);

// The values; and what the backward pass above takes as `kept`, which begins with d_weight, to be (kept.h).
std::vector<at::Tensor> linear_keeping(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap);

// The values, and for every unmasked token sum over all words but the action of p * dz/dlogit * weight[word], [M, D]:
// all of the gradient of its hidden state that does not wait for the cotangents.
std::vector<at::Tensor> linear_expected(
    const at::Tensor& hidden, const at::Tensor& weight, const OptionalTensor& bias, const at::Tensor& actions,
    const OptionalTensor& mask, double temperature, const OptionalTensor& temperatures, std::optional<double> softcap);

}  // namespace reval
